"""Readers of text, TSV and JSONL, gzip or not, the text filters, and errors that name file and line."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from itertools import batched
from pathlib import Path

import pytest

from mixmoe_megatron.data.corpus import (
    Deduplicator,
    clean,
    drop,
    has_control_characters,
    one_line,
    read_lines,
    read_rows,
    read_table,
    reading,
    summarise,
)
from mixmoe_megatron.errors import MixMoEError


def test_lines_of_plain_and_gzip_text(tmp_path: Path) -> None:
    content = "\ufefferste\r\nzwei\u2028te\x85\n\nletzte".encode()
    (tmp_path / "plain").write_bytes(content)
    (tmp_path / "zipped").write_bytes(gzip.compress(content))
    expected = [(1, "erste"), (2, "zwei\u2028te\x85"), (3, ""), (4, "letzte")]
    assert list(read_lines(tmp_path / "plain")) == list(read_lines(tmp_path / "zipped")) == expected


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "text"
    with pytest.raises(MixMoEError, match=r"Cannot read .*text: No such file"):
        list(read_lines(path))
    path.write_bytes(b"gut\nschlecht \xff\n")
    with pytest.raises(MixMoEError, match="text, line 2: not UTF-8"):
        list(read_lines(path))
    path.write_bytes(gzip.compress(b"abc\n" * 1000)[:-12])
    with pytest.raises(MixMoEError, match="broken gzip data"):
        list(read_lines(path))


def test_tsv_columns(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv.gz"
    path.write_bytes(gzip.compress(b'page\ten\txx\np1\tThe "house"\tDas "Haus"\np2\t\tleer\n'))
    assert list(read_rows(path, ["xx", "en"])) == [
        (2, {"xx": 'Das "Haus"', "en": 'The "house"'}),
        (3, {"xx": "leer", "en": ""}),
    ]
    path.write_bytes(gzip.compress("\ufeffid\tdeu \tGro\u0308\u00dfe\r\n1\teins\tzwei\r\n".encode()))
    assert list(read_rows(path, ["deu", "Größe"])) == [(2, {"deu": "eins", "Größe": "zwei"})], "names as they look"
    path.write_bytes(gzip.compress(b"page\ten\txx\n"))
    with pytest.raises(MixMoEError, match=r"pairs.tsv.gz, line 1: no column 'de' in the header; it has page, en, xx"):
        list(read_rows(path, ["de"]))


@pytest.mark.parametrize(("row", "columns"), [("p1\tonly two", 2), ("p1\ta\tb\tc", 4), ("", 1)])
def test_a_row_of_another_width_names_file_and_line(tmp_path: Path, row: str, columns: int) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text(f"page\ten\txx\np1\ta\tb\n{row}\n")
    with pytest.raises(MixMoEError, match=rf"pairs.tsv, line 3: {columns} columns where the header has 3"):
        list(read_rows(path, ["en", "xx"]))


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    records = [{"en": "a\nb", "xx": "c"}, {"en": "d"}]
    path.write_text("\n\n".join(json.dumps(record) for record in records))
    assert list(read_rows(path, ["en"])) == [(1, {"en": "a\nb"}), (3, {"en": "d"})]
    with pytest.raises(MixMoEError, match=r"pairs\.jsonl, line 3: no text under the key 'xx'"):
        list(read_rows(path, ["en", "xx"]))
    path.write_text('{"en": 1}\n')
    with pytest.raises(MixMoEError, match="line 1: no text under the key 'en'"):
        list(read_rows(path, ["en"]))
    path.write_text("[1, 2\n")
    with pytest.raises(MixMoEError, match="line 1: not JSON"):
        list(read_rows(path, ["en"]))


def test_clean_is_nfc_without_outer_whitespace() -> None:
    assert clean("\ufeff\u3000 re\u0301sume\u0301 \t") == "r\u00e9sum\u00e9"


@pytest.mark.parametrize(
    "seam", ["\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029", "\t", "\0", " \n\t"]
)
def test_one_line_has_no_seam(seam: str) -> None:
    line = one_line(f"{seam}Das Haus{seam}ist rot.{seam}")
    assert line.replace("  ", " ") == "Das Haus ist rot." and len(f"{line}\n".splitlines()) == 1
    assert one_line("zwei  Blanks\u00a0und \u200d bleiben") == "zwei  Blanks\u00a0und \u200d bleiben"


ALIKE = [
    "Größe  des Hauses",
    "Gro\u0308\u00dfe des\u00a0Hauses",
    "\u200bGröße des Hau\u00adses\ufeff",
    "Größe\u2009des\tHauses ",
    "Gro\u200d\u0308ße des \u2060Hauses",
    "Größe\u3000des\ufe0f Hauses\u202c",
    "Größe des\nHauses\0",
]


@pytest.mark.parametrize("text", ALIKE)
def test_what_looks_alike_reads_alike(text: str) -> None:
    seen = Deduplicator()
    assert reading(text) == "Größe des Hauses"
    assert seen.is_new("Größe des Hauses") and not seen.is_new(text)
    assert seen.is_new("größe des Hauses") and seen.is_new("Grösse des Hauses")


@pytest.mark.parametrize(
    "text", ["", " \u00a0", "\u200b", "\u200d\u2060", "\u00ad", "\ufeff", "\u3164\u115f", "\u2800", "\0\x07", "\ufe0f"]
)
def test_what_looks_empty_reads_empty(text: str) -> None:
    assert reading(text) == ""


@pytest.mark.parametrize("text", ["a\0b", "bell\x07", "next\x85line", "line\u2028break", "half \ud800", "esc\x1b[0m"])
def test_control_characters(text: str) -> None:
    assert has_control_characters(text)


@pytest.mark.parametrize(
    "text", ["plain", "a\u00a0b", "tab\tand\nline", "ideographic\u3000space", "soft\u00adhyphen 😀"]
)
def test_harmless_characters(text: str) -> None:
    assert not has_control_characters(text)
    assert has_control_characters("two\nlines", allowed="\t")


def test_deduplicator_keeps_sides_apart() -> None:
    seen = Deduplicator()
    assert [seen.is_new("a", "b"), seen.is_new("a", "b"), seen.is_new("ab"), seen.is_new("b", "a")] == [
        True, False, True, True,
    ]  # fmt: skip


def test_counts_and_batches() -> None:
    counts = Counter(read=3, kept=1)
    drop(counts, "too_short", 2)
    assert summarise(counts) == "3 read, 1 kept, 2 dropped too short"
    assert list(batched(range(5), 2)) == [(0, 1), (2, 3), (4,)]


def test_the_example_data_is_what_its_readme_lists(repo_root: Path) -> None:
    folder = repo_root / "examples" / "data"
    rows = re.findall(r"^\| `(\S+\.gz)` \| (\d+) \| (\d+) \| `(\w{64})` \|$", (folder / "README.md").read_text(), re.M)
    assert sorted(name for name, *_ in rows) == sorted(path.name for path in folder.glob("*.gz"))
    for name, lines, size, digest in rows:
        packed = (folder / name).read_bytes()
        text = gzip.decompress(packed)
        assert (hashlib.sha256(packed).hexdigest(), text.count(b"\n"), len(text)) == (digest, int(lines), int(size))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("pairs.parquet", "", r"pairs.parquet: give TSV or JSONL; tools/prepare_data.py makes TSV of Parquet\."),
        ("pairs.tsv", "", "pairs.tsv is empty: a TSV file begins with a line of column names"),
        ("pairs.jsonl", '{"de": "a", "fr": "b"}\n', "pairs.jsonl: no column 'en'; it has de, fr: name one of these"),
        ("pairs.jsonl", "[1]\n", "pairs.jsonl, line 1: no text under the key 'de'"),
        ("pairs.jsonl", "null\n", "pairs.jsonl, line 1: no text under the key 'de'"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(MixMoEError, match=message):
        list(read_rows(tmp_path / name, ["de", "en"]))


def test_a_lenient_reader_gives_none_for_a_broken_row(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_bytes(b"de\ten\na\tb\n\xff\tb\na\nc\td\n")
    (tmp_path / "p.jsonl").write_text(
        '{"translation": {"de": "a", "en": "b"}}\n[\n{"de": "a"}\n{"de": "c", "en": "d"}\n'
    )
    assert list(read_table(tmp_path / "p.tsv", ["en", "de"], lenient=True)) == [
        (2, ("b", "a")), (3, ("b", "\udcff")), (4, None), (5, ("d", "c")),
    ]  # fmt: skip
    assert list(read_table(tmp_path / "p.jsonl", ["en", "de"], lenient=True)) == [
        (1, ("b", "a")), (2, None), (3, None), (4, ("d", "c")),
    ]  # fmt: skip
