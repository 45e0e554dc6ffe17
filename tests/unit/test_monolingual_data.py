"""Monolingual token files: documents, filters and counts, pages, the manifest, and that a failure leaves nothing."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from mixmoe_megatron.data.monolingual import MonolingualOptions, build_monolingual
from mixmoe_megatron.data.storage import check_same_tokenizer, read_manifest
from mixmoe_megatron.data.tokenizers import TextTokenizer, open_tokenizer
from mixmoe_megatron.errors import MixMoEError
from tests.helpers.tiny_tokenizers import KINDS, make_tokenizer

LONG = "The river runs through the town and the children play."
ALL = MonolingualOptions(min_tokens=0)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return open_tokenizer(make_tokenizer(request.param, tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return open_tokenizer(make_tokenizer("bpe", tmp_path_factory.mktemp("tokenizer")))


def texts_of(prefix: Path, tokenizer: TextTokenizer) -> list[str]:
    return [tokenizer.decode(document) for document in IndexedDataset(str(prefix))]


def test_a_document_is_bos_text_eos(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.write_text(f"{LONG}\n  Other: {LONG}\t\n", encoding="utf-8")
    manifest = build_monolingual([source], tokenizer, tmp_path / "deep" / "mono")
    documents = IndexedDataset(str(tmp_path / "deep" / "mono"))
    expected = tokenizer.encode([LONG, f"Other: {LONG}"], add_special_tokens=True)
    assert [list(document) for document in documents] == [[*ids, tokenizer.eos_id] for ids in expected]
    assert (expected[0][0] == 1) == (tokenizer.bos_id is not None)
    assert documents.index.dtype == np.uint16
    assert list(documents.document_indices) == [0, 1, 2]
    assert manifest["tokens"] == sum(len(ids) + 1 for ids in expected)


def test_filters_are_counted(bpe: TextTokenizer, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text(f"{LONG}\n\n   \nbad\0 {LONG}\n{LONG}\nHi.\n{LONG} </s> more\n", encoding="utf-8")
    second.write_text(f"{LONG}\n{LONG} 2\n", encoding="utf-8")
    manifest = build_monolingual([first, second], bpe, tmp_path / "mono")
    assert manifest["counts"] == {
        "read": 9,
        "kept": 3,
        "dropped_empty": 2,
        "dropped_control_character": 1,
        "dropped_duplicate": 2,
        "dropped_too_short": 1,
    }
    assert sum(manifest["counts"].values()) == 2 * manifest["counts"]["read"]
    assert texts_of(tmp_path / "mono", bpe) == [LONG, f"{LONG} </s> more", f"{LONG} 2"]
    kept = build_monolingual([first], bpe, tmp_path / "mono", MonolingualOptions(keep_duplicates=True))
    assert kept["documents"] == 3


def test_texts_that_look_empty_or_alike_count_as_such(bpe: TextTokenizer, tmp_path: Path) -> None:
    lines = [LONG, f"\ufeff{LONG}", LONG.replace(" ", "\u2009"), "\u200b\u2060", "\u3164", "\u00ad \u00a0"]
    (tmp_path / "text").write_text("\n".join(lines), encoding="utf-8")
    counts = build_monolingual([tmp_path / "text"], bpe, tmp_path / "mono")["counts"]
    assert counts == {"read": 6, "kept": 1, "dropped_duplicate": 2, "dropped_empty": 3}


def test_min_tokens_means_more_than(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    length = len(tokenizer.encode([LONG], add_special_tokens=False)[0])
    (tmp_path / "text").write_text(LONG, encoding="utf-8")
    build_monolingual([tmp_path / "text"], tokenizer, tmp_path / "mono", MonolingualOptions(min_tokens=length - 1))
    with pytest.raises(MixMoEError, match=r"No document is left of .*1 dropped too short"):
        build_monolingual([tmp_path / "text"], tokenizer, tmp_path / "mono", MonolingualOptions(min_tokens=length))


@pytest.mark.parametrize(
    ("columns", "group_by", "expected"),
    [
        (("xx",), None, ["Haus", "Tür", "Hof"]),
        (("xx",), "page", ["Haus\nTür", "Hof"]),
        (("en", "xx"), None, ["house\nHaus", "door\nTür", "yard\nHof"]),
        (("en", "xx"), "page", ["house\nHaus\ndoor\nTür", "yard\nHof"]),
    ],
)
def test_columns_and_pages(
    bpe: TextTokenizer, tmp_path: Path, columns: tuple[str, ...], group_by: str | None, expected: list[str]
) -> None:
    source = tmp_path / "pages.tsv"
    source.write_text("page\ten\txx\na\thouse\tHaus\na\tdoor\tTür\nb\tyard\tHof\n", encoding="utf-8")
    options = MonolingualOptions(min_tokens=0, columns=columns, group_by=group_by)
    build_monolingual([source], bpe, tmp_path / "mono", options)
    assert texts_of(tmp_path / "mono", bpe) == expected


def test_wrong_options_and_inputs(bpe: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(MixMoEError, match="--group-by needs --columns"):
        MonolingualOptions(group_by="page")
    with pytest.raises(MixMoEError, match="must not be negative"):
        MonolingualOptions(min_tokens=-1)
    (tmp_path / "empty").write_text("")
    with pytest.raises(MixMoEError, match=r"No document is left of .*empty: 0 read"):
        build_monolingual([tmp_path / "empty"], bpe, tmp_path / "mono")
    with pytest.raises(MixMoEError, match="Give the output prefix without a suffix"):
        build_monolingual([tmp_path / "empty"], bpe, tmp_path / "mono.bin")
    with pytest.raises(MixMoEError, match="Cannot make the directory"):
        build_monolingual([tmp_path / "empty"], bpe, tmp_path / "empty" / "below" / "mono")


def test_a_failed_build_leaves_the_old_files_and_no_rubbish(bpe: TextTokenizer, tmp_path: Path) -> None:
    good, bad, prefix = tmp_path / "good", tmp_path / "bad", tmp_path / "out" / "mono"
    good.write_text("one\n" * 2, encoding="utf-8")
    bad.write_bytes(b"two\n" + b"\xff")
    build_monolingual([good], bpe, prefix, ALL)
    before = {path.name: path.read_bytes() for path in prefix.parent.iterdir()}
    assert sorted(before) == ["mono.bin", "mono.idx", "mono.json"]
    with pytest.raises(MixMoEError, match="bad, line 2: not UTF-8"):
        build_monolingual([bad], bpe, prefix, ALL)
    assert {path.name: path.read_bytes() for path in prefix.parent.iterdir()} == before


def test_manifest(bpe: TextTokenizer, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(LONG, encoding="utf-8")
    prefix = tmp_path / "mono"
    written = build_monolingual([tmp_path / "text"], bpe, prefix)
    read = read_manifest(prefix, kind="monolingual")
    assert read == json.loads(json.dumps(written))
    assert len(read["sources"][0]["sha256"]) == 64
    check_same_tokenizer(prefix, read, bpe)
    other = open_tokenizer(make_tokenizer("sentencepiece", tmp_path_factory.mktemp("other")))
    with pytest.raises(MixMoEError, match="built with another tokenizer"):
        check_same_tokenizer(prefix, read, other)
    with pytest.raises(MixMoEError, match="holds monolingual data where parallel data is needed"):
        read_manifest(prefix, kind="parallel")
    (tmp_path / "mono.json").write_text(json.dumps(read | {"format_version": 99}))
    with pytest.raises(MixMoEError, match="format version 99"):
        read_manifest(prefix)
    (tmp_path / "mono.json").write_text(json.dumps(read | {"tokens": 7}))
    with pytest.raises(MixMoEError, match=r"mono\.bin has \d+ bytes where its manifest says 14"):
        read_manifest(prefix)
    (tmp_path / "mono.json").write_text("[]")
    with pytest.raises(MixMoEError, match="not a data manifest"):
        read_manifest(prefix)
    os.remove(tmp_path / "mono.json")
    with pytest.raises(MixMoEError, match=r"mono\.json does not exist; build the data"):
        read_manifest(prefix)


def test_the_command(bpe: TextTokenizer, tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = runpy.run_path(str(repo_root / "tools" / "preprocess_data.py"))["main"]
    common = ["--tokenizer", str(bpe.directory), "--output-prefix", str(tmp_path / "mono")]
    source = repo_root / "examples" / "data" / "mono.de.test.txt.gz"
    assert command(["mono", "--input", str(source), *common]) == 0
    assert read_manifest(tmp_path / "mono", "monolingual")["counts"]["read"] == 113
    assert command(["mono", "--input", "nowhere.txt", *common]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: Cannot read nowhere.txt: No such file or directory."


def test_a_blend_by_temperature(
    bpe: TextTokenizer, tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = runpy.run_path(str(repo_root / "tools" / "preprocess_data.py"))["main"]
    large, small = str(tmp_path / "large"), str(tmp_path / "small")
    for prefix, documents in ((large, 64), (small, 4)):
        lines = "\n".join(f"{LONG} {number % 10}" for number in range(documents))
        (tmp_path / "text").write_text(lines)
        build_monolingual([tmp_path / "text"], bpe, prefix, MonolingualOptions(keep_duplicates=True))
    tokens = [read_manifest(prefix)["tokens"] for prefix in (large, small)]
    assert tokens[0] == 16 * tokens[1]
    for temperature, weights in (("1", (16 / 17, 1 / 17)), ("2", (4 / 5, 1 / 5)), ("inf", (1 / 2, 1 / 2))):
        assert command(["blend", large, small, "--temperature", temperature]) == 0
        words = capsys.readouterr().out.split()
        assert words[1::2] == [large, small]
        assert list(map(float, words[::2])) == pytest.approx(weights, abs=1e-6)
    for words, message in ((["--temperature", "0.5"], "--temperature must be 1 or more"), (["nowhere"], "nowhere.bin")):
        assert command(["blend", large, *words]) == 2
        assert message in capsys.readouterr().err
