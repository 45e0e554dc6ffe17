"""Test sets: what is read, which subset is taken, and the sentence for every mistake."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mixmoe_megatron.data.preparation.prepare import prepare
from mixmoe_megatron.data.preparation.protocol import Protocol
from mixmoe_megatron.data.preparation.sources import Source
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.segments import (
    named_paths,
    read_monolingual,
    read_test,
    select_subset,
    sha256_of_texts,
)

TABLE = "page\ten\txx\n" + "".join(f"p\tHouse {index}\tHaus {index}\n" for index in range(20))


def table(tmp_path: Path, text: str = TABLE) -> Path:
    path = tmp_path / "de-en.tsv.gz"
    path.write_bytes(gzip.compress(text.encode("utf-8", "surrogateescape")))
    return path


def test_direction_and_its_reverse(tmp_path) -> None:
    direction = read_test(f"de-en={table(tmp_path)}", ("xx", None))
    assert (direction.name, len(direction.sources)) == ("de-en", 20)
    assert (direction.sources[3], direction.references[3]) == ("Haus 3", "House 3")
    assert direction.reverse().name == "en-de"
    assert direction.reverse().sources == direction.references


def test_subset_is_seeded_nested_and_in_file_order(tmp_path) -> None:
    items = list(range(100))
    ten = select_subset(items, 10, 0)
    assert ten == sorted(ten) == select_subset(items, 10, 0)
    assert ten != items[:10]
    assert set(ten) < set(select_subset(items, 20, 0))
    assert ten != select_subset(items, 10, 1)
    assert select_subset(items, 0, 0) == select_subset(items, 1000, 0) == items
    limited = read_test(f"de-en={table(tmp_path)}", ("xx", "en"), limit=5)
    assert [source.split()[1] for source in limited.sources] == [text.split()[1] for text in limited.references]


def test_test_sets_by_name(tmp_path) -> None:
    (tmp_path / "devtest").mkdir()
    for code, text in (("deu_Latn", "Haus\n"), ("eng_Latn", "House\n")):
        (tmp_path / "devtest" / f"{code}.devtest").write_text(text, "utf-8")
    direction = read_test(f"de-en@flores=flores:{tmp_path}", (None, None))
    assert (direction.name, direction.sources, direction.references) == ("de-en@flores", ["Haus"], ["House"])
    assert direction.reverse().name == "en-de@flores"
    with pytest.raises(MixMoEError, match="sacreBLEU has no test set 'wmt17' for de-et"):
        read_test("de-et=sacrebleu:wmt17", (None, None))


ODD_ROWS = [
    ("Das Haus ist\nrot.", "The house\r\nis red."),
    ("Zwei\u2028Zeilen\x85mehr", "Two\vlines\fmore"),
    ("\ufeffNull\0byte ", "NUL\tbyte\u3000"),
    ("Gro\u0308ße", "size\x1c"),
]
ONE_LINERS = [
    ("Das Haus ist rot.", "The house is red."),
    ("Zwei Zeilen mehr", "Two lines more"),
    ("Null byte", "NUL byte"),
    ("Größe", "size"),
]


def test_one_cleaning_for_preparation_and_evaluation(tmp_path) -> None:
    lines = "".join(json.dumps({"de": german, "en": english}) + "\n" for german, english in ODD_ROWS)
    (tmp_path / "t.jsonl").write_text(lines, "utf-8")
    prepare(Protocol({"de-en": {"test": Source(files=(f"{tmp_path}/t.jsonl",))}}), tmp_path / "out")
    for path in ("t.jsonl", "out/de-en.test.tsv.gz"):
        direction = read_test(f"de-en={tmp_path / path}", (None, None))
        assert list(zip(direction.sources, direction.references, strict=True)) == ONE_LINERS
    (tmp_path / "mono.txt").write_text("\u200b\nZwei\u2028Zeilen\r\n\u00a0\nNull\0byte\n", "utf-8")
    assert read_monolingual(tmp_path / "mono.txt") == ["Zwei Zeilen", "Null byte"]


@pytest.mark.parametrize("side", ["\u200b", " \u00a0", "\u00ad\u2060", "\0"])
def test_a_side_that_looks_empty_is_empty(tmp_path, side) -> None:
    with pytest.raises(MixMoEError, match="segment 2: the side 'en' is empty"):
        read_test(f"de-en={table(tmp_path, f'de\ten\nHaus\tHouse\nTür\t{side}\n')}", (None, None))


@pytest.mark.parametrize(
    ("text", "place", "columns", "message"),
    [
        (TABLE, "de-xy", ("xx", "en"), "Unknown language code 'xy'"),
        (TABLE, "de-de", ("xx", "en"), "both 'de'"),
        (TABLE, "de", ("xx", "en"), "--test takes PAIR"),
        (TABLE, "de-en@a/b", ("xx", "en"), "--test takes PAIR"),
        (TABLE, "de-en", (None, None), "line 1: no column 'de'"),
        ("en\txx\nA\tB\nA\n", "de-en", ("xx", "en"), "segment 2: the row is broken"),
        ("en\txx\nA\tB\nA\t \n", "de-en", ("xx", "en"), "segment 2: the side 'de' is empty"),
        ("en\txx\nA\tB\nA\t\udcff\n", "de-en", ("xx", "en"), "segment 2: not UTF-8"),
        ("en\txx\n", "de-en", ("xx", "en"), "no test segment"),
    ],
)
def test_mistakes_in_a_test_set(tmp_path, text, place, columns, message) -> None:
    with pytest.raises(MixMoEError, match=message):
        read_test(f"{place}={table(tmp_path, text)}", columns)


def test_monolingual_text(tmp_path) -> None:
    path = tmp_path / "mono.txt"
    path.write_text("one\n\n two \n", encoding="utf-8")
    assert read_monolingual(path) == ["one", "two"]
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(MixMoEError, match="no text"):
        read_monolingual(path)


def test_named_paths() -> None:
    assert named_paths(["a=x/y", "b=c=d"], "--system") == {"a": Path("x/y"), "b": Path("c=d")}
    for values in (["a"], ["=x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(MixMoEError, match="--system"):
            named_paths(values, "--system")


def test_hash_knows_the_boundaries() -> None:
    assert sha256_of_texts(["ab", "c"]) != sha256_of_texts(["a", "bc"])
