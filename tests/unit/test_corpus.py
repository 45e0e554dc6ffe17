"""Readers of text, TSV and JSONL, gzip or not, the text filters, and errors that name file and line."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from mixmoe_megatron.data.corpus import (
    Deduplicator,
    batched,
    clean,
    drop,
    has_control_characters,
    read_lines,
    read_rows,
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
    assert clean("\u3000 re\u0301sume\u0301 \t") == "r\u00e9sum\u00e9"


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
    assert list(batched(range(5), 2)) == [[0, 1], [2, 3], [4]]


def test_the_example_data_is_what_its_readme_lists(repo_root: Path) -> None:
    folder = repo_root / "examples" / "data"
    rows = re.findall(r"^\| `(\S+\.gz)` \| (\d+) \| (\d+) \| `(\w{64})` \|$", (folder / "README.md").read_text(), re.M)
    assert sorted(name for name, *_ in rows) == sorted(path.name for path in folder.glob("*.gz"))
    for name, lines, size, digest in rows:
        packed = (folder / name).read_bytes()
        text = gzip.decompress(packed)
        assert (hashlib.sha256(packed).hexdigest(), text.count(b"\n"), len(text)) == (digest, int(lines), int(size))
