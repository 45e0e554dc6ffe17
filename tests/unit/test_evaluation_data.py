"""Test sets: what is read, which subset is taken, and the sentence for every mistake."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.segments import (
    named_paths,
    read_direction,
    read_monolingual,
    select_subset,
    sha256_of_texts,
)

TABLE = "page\ten\txx\n" + "".join(f"p\tHouse {index}\tHaus {index}\n" for index in range(20))


def table(tmp_path: Path, text: str = TABLE) -> Path:
    path = tmp_path / "de-en.tsv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    return path


def test_direction_and_its_reverse(tmp_path) -> None:
    direction = read_direction(table(tmp_path), ("de", "en"), ("xx", "en"))
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
    limited = read_direction(table(tmp_path), ("de", "en"), ("xx", "en"), limit=5)
    assert [source.split()[1] for source in limited.sources] == [text.split()[1] for text in limited.references]


@pytest.mark.parametrize(
    ("text", "languages", "columns", "message"),
    [
        (TABLE, ("de", "xy"), ("xx", "en"), "Unknown language code 'xy'"),
        (TABLE, ("de", "de"), ("xx", "en"), "both 'de'"),
        (TABLE, ("de", "en"), ("de", "en"), "line 1: no column 'de'"),
        ("en\txx\nA\tB\nA\n", ("de", "en"), ("xx", "en"), "line 3: 1 columns"),
        ("en\txx\nA\tB\nA\t \n", ("de", "en"), ("xx", "en"), "line 3: the column 'xx' is empty"),
        ("en\txx\n", ("de", "en"), ("xx", "en"), "no test segment"),
    ],
)
def test_mistakes_in_a_test_set(tmp_path, text, languages, columns, message) -> None:
    with pytest.raises(MixMoEError, match=message):
        read_direction(table(tmp_path, text), languages, columns)


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
