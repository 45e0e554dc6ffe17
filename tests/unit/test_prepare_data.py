"""Prepared corpora: what is kept, what is dropped and why, what is held out; sources of every kind; bad input."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from mixmoe_megatron.data.preparation.filters import FilterOptions, filter_rows
from mixmoe_megatron.data.preparation.prepare import prepare
from mixmoe_megatron.data.preparation.protocol import Protocol, load_protocol
from mixmoe_megatron.data.preparation.sources import Source
from mixmoe_megatron.errors import MixMoEError
from tools import prepare_data

PAIRS = [("Ein Haus", "A house"), ("Zwei Häuser", "Two houses"), ("Drei Häuser", "Three houses")]

BAD_LINES: list[tuple[bytes, bytes, str]] = [
    (b"Guten Tag", b"Good day", "kept"),
    (b"Guten Tag", b"Good day", "duplicate"),
    (b"Gr\xc3\xbc\xc3\x9fe", b"Greetings \xf0\x9f\x91\x8b", "kept"),  # an emoji
    (b"Gru\xcc\x88\xc3\x9fe", b"Greetings \xf0\x9f\x91\x8b", "duplicate"),  # the same, decomposed
    (b"Gr\xfc\xdfe", b"Greetings", "wrong_encoding"),  # Latin-1
    (b"", b"Nothing", "empty"),
    (b"   \xc2\xa0", b"Nothing", "empty"),
    (b"\xe2\x80\x8b\xc2\xad", b"Invisible", "empty"),  # a zero-width space and a soft hyphen
    (b"Gr\xc3\xbc\xe2\x80\x8b\xc3\x9fe", b"\xef\xbb\xbfGreetings\xc2\xa0\xf0\x9f\x91\x8b", "duplicate"),  # as it looks
    (b"Null\x00byte", b"NUL byte", "control_character"),
    (b"Ein\x1bEscape", b"An escape", "control_character"),
    (b"Zwei\xe2\x80\xa8Zeilen", b"Two lines", "control_character"),  # U+2028
    (b"\xd8\xb3\xd9\x84\xd8\xa7\xd9\x85", b"\xd7\xa9\xd7\x9c\xd7\x95\xd7\x9d", "kept"),  # right to left
    (b"x" * 100_000, b"long", "too_many_characters"),
    (b"ein " * 201, b"two hundred and one", "too_many_words"),
    (b"zu viele", b"too\tmany columns", "broken_row"),
    (b"Ende\r", b"End", "kept"),  # a carriage return at a cell's end is white space
    (b"Das ist ein Testsatz", b"another side", "in_test"),
    (b"andere Seite", b"THIS IS  A TEST SENTENCE", "in_test"),  # without regard to case and white space
    (b"dritte Seite", b"This is a\xc2\xa0test sen\xc2\xadtence\xe2\x81\xa0", "in_test"),  # and to the eye
    (b"Ein Satz", b"This is a validation sentence", "in_valid"),
]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A training file with every kind of bad line, its test and validation sets, CRLF at the ends of some lines."""
    lines = [b"de\ten"] + [a + b"\t" + b + (b"\r" if n % 2 else b"") for n, (a, b, _) in enumerate(BAD_LINES)]
    (tmp_path / "train.tsv").write_bytes(b"\n".join(lines) + b"\n")
    write_tsv(tmp_path / "test.tsv", [("Das ist ein Testsatz", "This is a test sentence")])
    write_tsv(tmp_path / "valid.tsv", [("Das prüft", "This is a validation sentence")])
    return tmp_path


def write_tsv(path: Path, pairs: list[tuple[str, str]]) -> None:
    path.write_text("de\ten\n" + "".join(f"{a}\t{b}\n" for a, b in pairs), "utf-8")


def splits(directory: Path) -> dict[str, dict[str, Source]]:
    return {"de-en": {name: Source(files=(str(directory / f"{name}.tsv"),)) for name in ("train", "valid", "test")}}


def lines_of(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()


@pytest.mark.parametrize("workers", [1, 2])
def test_every_kind_of_bad_line_is_counted(hostile: Path, workers: int) -> None:
    manifest = prepare(Protocol(splits(hostile)), hostile / "out", workers)
    counts = manifest["files"]["de-en.train.tsv.gz"]["counts"]
    reasons = [reason for *_, reason in BAD_LINES]
    expected = {f"dropped_{reason}": reasons.count(reason) for reason in set(reasons) - {"kept"}}
    assert counts == {"read": len(BAD_LINES), "kept": reasons.count("kept"), **expected}
    kept = [(a, b) for a, b, reason in BAD_LINES if reason == "kept"]
    assert lines_of(hostile / "out" / "de-en.train.tsv.gz") == [
        "de\ten", *(f"{a.decode().strip()}\t{b.decode()}" for a, b in kept)
    ]  # fmt: skip


def test_optional_filters() -> None:
    rows = [
        ("gleich", "glei\u00adch\u200b"),
        ("kurz", "a very very long other side"),
        ("Haus", "house"),
        ("eins", "one two three"),
    ]
    options = FilterOptions(drop_copies=True, max_length_ratio=3.0, min_words=1, max_words=2)
    kept, counts = filter_rows(rows, ("de", "en"), options)
    assert kept == [("Haus", "house")]
    assert counts == {"read": 4, "dropped_copy": 1, "dropped_too_many_words": 2}
    options = FilterOptions(max_length_ratio=3.0)
    assert filter_rows(rows, ("de", "en"), options)[1] == {"read": 4, "dropped_length_ratio": 2}
    long = " ".join(["Wort"] * 300)
    assert filter_rows([(long,)], ("de",), FilterOptions())[0] == [(long,)], "word limits are for pairs"


def test_language_identification() -> None:
    rows = [
        ("Das ist ein ganz gewöhnlicher deutscher Satz.", "This is quite an ordinary English sentence."),
        ("This is quite an ordinary English sentence.", "Another ordinary sentence of English words."),
    ]
    kept, counts = filter_rows(rows, ("de", "en"), FilterOptions(language_id=True))
    assert kept == rows[:1]
    assert counts["dropped_other_language"] == 1


def test_the_sample_depends_on_the_seed_and_the_lines_only(tmp_path: Path) -> None:
    pairs = [(f"Satz {n}", f"Sentence {n}") for n in range(200)]
    chosen = {}
    for name, order, seed in (("a", pairs, 1), ("b", pairs[::-1] + pairs[:50], 1), ("c", pairs, 2)):
        write_tsv(tmp_path / f"{name}.tsv", order)
        source = {"de-en": {"train": Source(files=(str(tmp_path / f"{name}.tsv"),))}}
        manifest = prepare(Protocol(source, seed=seed, pairs_per_language=40), tmp_path / name)
        assert manifest["files"]["de-en.train.tsv.gz"]["lines"] == 40
        chosen[name] = lines_of(tmp_path / name / "de-en.train.tsv.gz")
    assert chosen["a"] == chosen["b"]
    assert chosen["a"] != chosen["c"]
    assert len(set(chosen["a"])) == 41


def sources(directory: Path) -> dict[str, Source]:
    """The same three pairs in every format."""
    text = "de\ten\n" + "".join(f"{a}\t{b}\n" for a, b in PAIRS)
    records = [{"de": a, "en": b} for a, b in PAIRS]
    jsonl = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "p.tsv.gz").write_bytes(gzip.compress(text.encode()))
    (directory / "p.jsonl").write_text(jsonl, "utf-8")
    with pyarrow.CompressedOutputStream(str(directory / "p.jsonl.zst"), "zstd") as stream:
        stream.write(jsonl.encode())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), directory / "p.parquet")
    mirror = directory / "mirror" / "de-en"  # as the WMT datasets lie on the hub
    mirror.mkdir(parents=True)
    nested = pyarrow.Table.from_pylist([{"translation": record} for record in records])
    pyarrow.parquet.write_table(nested, mirror / "train-00000-of-00001.parquet")
    card = {"configs": [{"config_name": "de-en", "data_files": [{"split": "train", "path": "de-en/train-*"}]}]}
    (directory / "mirror" / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n", "utf-8")
    flores = directory / "flores" / "devtest"
    flores.mkdir(parents=True)
    for place, (language, code) in enumerate((("de", "deu_Latn"), ("en", "eng_Latn"))):
        side = "".join(f"{pair[place]}\n" for pair in PAIRS)
        (directory / f"p.{language}").write_text(side, "utf-8")
        (flores / f"{code}.devtest").write_text(side, "utf-8")
    return {
        "tsv.gz": Source(files=(f"{directory}/*.tsv.gz",)),
        "jsonl": Source(files=(f"{directory}/p.jsonl",)),
        "jsonl.zst": Source(files=(f"{directory}/p.jsonl.zst",)),
        "parquet": Source(files=(f"{directory}/p.parquet",)),
        "parquet of the hub": Source(files=(str(mirror / "train-00000-of-00001.parquet"),)),
        "aligned": Source(aligned={"en": f"{directory}/p.en", "de": f"{directory}/p.de"}),
        "hub": Source(hub=str(directory / "mirror"), config="de-en", split="train"),
        "flores": Source(flores=str(directory / "flores"), split="devtest"),
    }


def test_sources_of_every_kind_give_the_same_rows(tmp_path: Path) -> None:
    for kind, source in sources(tmp_path).items():
        assert list(source.rows(("de", "en"))) == PAIRS, kind
        assert list(source.rows(("en", "de"))) == [pair[::-1] for pair in PAIRS], kind
    (tmp_path / "p.txt").write_text("Ein Haus\nZwei Häuser\n", "utf-8")
    assert list(Source(files=(str(tmp_path / "p.txt"),), max_rows=1).rows(("de",))) == [("Ein Haus",)]
    builder = Source(hub="text", data_files=str(tmp_path / "p.txt"))
    assert list(builder.rows(("de",))) == [("Ein Haus",), ("Zwei Häuser",)]


def test_sacrebleu_test_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From sacreBLEU's own cache, filled as it fills it: nothing is fetched."""
    from sacrebleu.dataset import DATASETS

    monkeypatch.setattr(DATASETS["wmt19"], "_outdir", str(tmp_path))
    for pair, sides in (("ru-en", ("Дом", "House")), ("en-ru", ("Garden", "Сад"))):
        for field in DATASETS["wmt19"].fieldnames(pair):
            text = {"src": sides[0], "ref": sides[1]}.get(field, "-")
            (tmp_path / f"wmt19.{pair}.{field}").write_text(text + "\n", "utf-8")
    for config, expected in (("ru-en", ("Дом", "House")), ("en-ru", ("Сад", "Garden")), (None, ("Дом", "House"))):
        assert list(Source(sacrebleu="wmt19", config=config).rows(("ru", "en"))) == [expected]
    with pytest.raises(MixMoEError, match="no test set 'wmt19' for tr-en"):
        list(Source(sacrebleu="wmt19").rows(("tr", "en")))


def test_a_second_run_does_nothing_and_a_changed_one_starts_over(hostile: Path) -> None:
    out = hostile / "out"
    first = prepare(Protocol(splits(hostile)), out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(Protocol(splits(hostile)), out) == first
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (out / "de-en.test.tsv.gz").write_bytes(b"")  # a file of another length is not a finished one
    assert prepare(Protocol(splits(hostile)), out) == first
    assert prepare(Protocol(splits(hostile), filters=FilterOptions(max_words=300)), out) != first


def test_a_killed_run_leaves_nothing_that_looks_finished(tmp_path: Path, repo_root: Path) -> None:
    write_tsv(tmp_path / "long.tsv", [(f"Satz {n}", f"Sentence {n}") for n in range(200_000)])
    words = ["--output-dir", str(tmp_path / "out"), "--parallel", f"de-en.train={tmp_path / 'long.tsv'}"]
    command = [sys.executable, str(repo_root / "tools/prepare_data.py"), *words]
    process = subprocess.Popen(command, env={"PYTHONPATH": str(repo_root)}, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out" / ".preparing" / "de-en.train.tsv.gz").exists():
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".preparing"]
    assert prepare_data.main(words) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["de-en.train.tsv.gz", "manifest.json"]


def test_the_papers_protocol_is_valid() -> None:
    protocol = load_protocol("paper")
    assert list(protocol.parallel) == ["cs-en", "de-en", "fi-en", "tr-en", "et-en", "ru-en", "zh-en"]
    assert protocol.pairs_per_language == 300_000
    assert {pair: str(splits["train"].hub) for pair, splits in protocol.parallel.items()} == {
        "cs-en": "wmt/wmt17", "de-en": "wmt/wmt17", "fi-en": "wmt/wmt17", "tr-en": "wmt/wmt18", "et-en": "wmt/wmt18",
        "ru-en": "wmt/wmt19", "zh-en": "wmt/wmt19",
    }  # fmt: skip
    assert list(protocol.only(["fi"]).parallel) == ["fi-en"]


BAD_PROTOCOLS: dict[str, tuple[Any, str]] = {
    "no mapping": ([], "a protocol is a mapping"),
    "unknown key": ({"pairs": {}}, "unknown key 'pairs'"),
    "nothing": ({}, "names no parallel and no monolingual text"),
    "language": ({"monolingual": {"xx": {"train": "t"}}}, "Unknown language code 'xx'"),
    "same language": ({"parallel": {"de-de": {"train": "t"}}}, "are the same"),
    "one language": ({"parallel": {"de": {"train": "t"}}}, "two language codes"),
    "two sources": ({"monolingual": {"de": {"train": {"files": "a", "hub": "b"}}}}, "exactly one of"),
    "source key": ({"monolingual": {"de": {"train": {"path": "a"}}}}, "unknown key 'path'"),
    "filter key": ({"filters": {"max": 3}}, "filters are a mapping of min_words"),
    "filter value": ({"filters": {"min_words": 0}, "monolingual": {"de": {"train": "t"}}}, "1 or more"),
    "number": ({"seed": "one", "monolingual": {"de": {"train": "t"}}}, "seed is a whole number"),
    "missing file": ({"monolingual": {"de": {"train": "nowhere.txt"}}}, "nowhere.txt does not exist"),
    "missing column": ({"parallel": {"fi-en": {"train": "pairs.tsv"}}}, "no column 'fi' in the header; it has de, en"),
    "text as pairs": ({"parallel": {"de-en": {"train": "lines.txt"}}}, "a pair of languages needs"),
    "not aligned": ({"parallel": {"de-en": {"train": {"aligned": {"de": "lines.txt", "en": "one.txt"}}}}}, "aligned"),
    "no such dataset": ({"monolingual": {"de": {"train": {"hub": "./no-such-folder"}}}}, "Cannot read the dataset"),
    "empty": ({"monolingual": {"de": {"train": "blank.txt"}}}, "no line is left"),
    "broken test set": ({"parallel": {"de-en": {"test": "half.tsv"}}}, "Row 1 of the test set half.tsv is broken"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PROTOCOLS)
def test_bad_input_is_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tsv(tmp_path / "pairs.tsv", PAIRS)
    write_tsv(tmp_path / "half.tsv", [("", "half")])
    for file, text in (("lines.txt", "eins\nzwei\n"), ("one.txt", "one\n"), ("blank.txt", "\n\n")):
        (tmp_path / file).write_text(text, "utf-8")
    value, message = BAD_PROTOCOLS[name]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(value), "utf-8")
    assert prepare_data.main(["--output-dir", "out", "--protocol", "p.yaml"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_flags_alone_and_flags_over_a_protocol(tmp_path: Path) -> None:
    write_tsv(tmp_path / "a.tsv", PAIRS)
    (tmp_path / "m.txt").write_text("Ein Haus\nEin Garten\n", "utf-8")
    words = ["--output-dir", str(tmp_path / "out"), "--parallel", f"de-en.train={tmp_path / 'a.tsv'}"]
    words += ["--mono", f"de.train={tmp_path / 'm.txt'}", "--seed", "3", "--max-words", "7"]
    protocol = prepare_data.protocol_of(prepare_data.build_parser().parse_args(words))
    assert (protocol.seed, protocol.filters.max_words) == (3, 7)
    assert prepare_data.main(words) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "de-en.train.tsv.gz", "manifest.json", "mono.de.train.txt.gz"
    ]  # fmt: skip
    for wrong in ("de-en=x", "de-en.train", ".train=x"):
        assert prepare_data.main(["--output-dir", str(tmp_path / "no"), "--parallel", wrong]) == 2


@pytest.mark.slow
def test_a_million_lines_in_bounded_memory(tmp_path: Path, repo_root: Path) -> None:
    with open(tmp_path / "long.tsv", "w", encoding="utf-8") as stream:
        stream.write("de\ten\n")
        for n in range(1_000_000):
            stream.write(
                f"Dies ist der Satz mit der Nummer {n}, nicht länger\tThis is sentence number {n}, no longer\n"
            )
    code = (
        "import pathlib, re, sys; sys.path.insert(0, sys.argv.pop(1)); from tools.prepare_data import main; "
        "status, own = main(sys.argv[1:]), pathlib.Path('/proc/self/status').read_text(); "
        "print(status, re.search(r'VmHWM:\\s+(\\d+) kB', own)[1])"  # ru_maxrss would count the parent's memory
    )
    words = ["--output-dir", str(tmp_path / "out"), "--parallel", f"de-en.train={tmp_path / 'long.tsv'}"]
    done = subprocess.run([sys.executable, "-c", code, str(repo_root), *words], capture_output=True, text=True)
    status, kilobytes = map(int, done.stdout.split())
    assert status == 0, done.stderr[-2000:]
    assert "1000000 kept" in done.stderr
    assert "rows a second" in done.stderr
    assert kilobytes < 1_000_000
