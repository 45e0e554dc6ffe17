"""Text files as users have them: packed in any way, archives, other encodings, names with brackets."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from mixmoe_megatron.data.corpus import read_lines, read_rows
from mixmoe_megatron.data.preparation.prepare import prepare
from mixmoe_megatron.data.preparation.protocol import Protocol
from mixmoe_megatron.data.preparation.sources import Source
from mixmoe_megatron.data.text_files import format_of
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.segments import read_monolingual, read_test
from tools import prepare_data

TEXT = "Grüße aus der Stadt\nEin Haus\n".encode() * 3


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def lzma_alone(data: bytes) -> bytes:
    return lzma.compress(data, format=lzma.FORMAT_ALONE)


def zipped(data: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("all.txt", data)
    return sink.getvalue()


def tarred(data: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        member = tarfile.TarInfo("all.txt")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return sink.getvalue()


PACKERS: list[Callable[[bytes], bytes]] = [gzip.compress, lzma.compress, lzma_alone, bz2.compress, zstd]


@pytest.mark.parametrize("pack", PACKERS)
def test_packed_text_is_read_whatever_its_name(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    lines = TEXT.decode().splitlines()
    for name, data in (("one.txt", pack(TEXT)), ("two.gz", pack(TEXT) + pack(TEXT))):
        (tmp_path / name).write_bytes(data)
        expected = lines if name == "one.txt" else 2 * lines
        if name == "one.txt" or pack is not lzma_alone:  # this format has but one part
            assert [line for _, line in read_lines(tmp_path / name)] == expected
    (tmp_path / "empty").write_bytes(pack(b""))
    assert list(read_lines(tmp_path / "empty")) == []


@pytest.mark.parametrize("pack", PACKERS)
def test_what_follows_a_packed_part_is_never_left_out(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    for name, data in (("torn", pack(TEXT * 1000)[:-9]), ("more", pack(TEXT) + b"plain text\n")):
        (tmp_path / name).write_bytes(data)
        if name == "torn" or pack is not lzma_alone:
            with pytest.raises(MixMoEError, match=rf"{name}: broken (gzip|xz|lzma|bzip2|zstd) data after line \d+ \("):
                list(read_lines(tmp_path / name))


NOT_TEXT = {
    "zip": (zipped(TEXT), "a zip archive: unpack it"),
    "tar": (tarred(TEXT), "a tar archive: unpack it"),
    "tar.gz": (gzip.compress(tarred(TEXT)), r"unpacked \(gzip\), is a tar archive"),
    "tar.xz": (lzma.compress(tarred(TEXT)), r"unpacked \(xz\), is a tar archive"),
    "gzip twice": (gzip.compress(gzip.compress(TEXT)), r"unpacked \(gzip\), is gzip data once more"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(64), "a 7z archive"),
    "RAR": (b"Rar!\x1a\x07\x01\0" + bytes(64), "a RAR archive"),
    "lz4": (b"\x04\x22\x4d\x18" + bytes(64), "lz4 data: unpack it first"),
    "UTF-16": (TEXT.decode().encode("utf-16"), "UTF-16 text: write it as UTF-8 first: iconv -f UTF-16"),
    "UTF-32": (TEXT.decode().encode("utf-32"), "UTF-32 text"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "fetch that with git lfs pull"),
}


@pytest.mark.parametrize("kind", NOT_TEXT)
def test_what_is_no_text_is_refused(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, message = NOT_TEXT[kind]
    path = tmp_path / "news.txt.gz"
    path.write_bytes(data)
    with pytest.raises(MixMoEError, match=message):
        list(read_lines(path))
    for words in (["--mono", f"de.train={path}"], ["--mono", f"de.test={path}"]):
        assert prepare_data.main([*words, "--output-dir", str(tmp_path / "out")]) == 2
        assert f"error: {path}" in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "out").exists()


def test_text_that_only_looks_packed_is_text(tmp_path: Path) -> None:
    for first in ("BZh and others", "PAR1 is a gene", "LZIP it", "7z", "Rar! said the raven", "PK", "]"):
        (tmp_path / "text").write_text(f"{first}\nmore\n")
        assert [line for _, line in read_lines(tmp_path / "text")] == [first, "more"]


LATIN = "Größe\n".encode("latin-1")
BINARY = bytes(range(256)) * 40


@pytest.mark.parametrize(
    "data", [LATIN * 3, LATIN * 200 + TEXT * 200, BINARY, TEXT + "Nullen\n".encode("utf-16-le") * 9]
)
def test_mostly_undecodable_text_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "mono.txt").write_bytes(data)
    protocol = Protocol(monolingual={"de": {"train": Source(files=(str(tmp_path / "mono.txt"),))}})
    with pytest.raises(MixMoEError, match=r"mono.txt: \d+ of its first \d+ lines are not UTF-8 text: give a text file"):
        prepare(protocol, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_utf16_without_a_mark_is_refused_by_the_strict_readers(tmp_path: Path) -> None:
    path = tmp_path / "mono.txt"
    path.write_bytes("Ein Haus\nNoch eins\n".encode("utf-16-le"))
    with pytest.raises(MixMoEError, match=r"mono.txt: 3 of its first 3 lines are not UTF-8 text"):
        read_monolingual(path)
    with pytest.raises(MixMoEError, match=r"mono.txt: 3 of its first 3 lines are not UTF-8 text"):
        list(read_lines(path))


@pytest.mark.parametrize(("good", "bad"), [(3, 2), (200, 20), (9_900, 900)])
def test_a_little_undecodable_text_is_counted(tmp_path: Path, good: int, bad: int) -> None:
    lines = [f"Zeile {number}".encode() for number in range(good)]
    for number in range(bad):
        lines.insert(number * (good // bad) + 1, b"Gr\xfc\xdfe")
    (tmp_path / "mono.txt").write_bytes(b"\n".join(lines) + b"\n")
    protocol = Protocol(monolingual={"de": {"train": Source(files=(str(tmp_path / "mono.txt"),))}})
    counts = prepare(protocol, tmp_path / "out")["files"]["mono.de.train.txt.gz"]["counts"]
    assert counts == {"read": good + bad, "kept": good, "dropped_wrong_encoding": bad}


BROKEN = {
    "p.tsv": (
        "de\ten\n" + "a\tb\n" * 9 + "a\tb\t0.5\n" * 11,
        "11 of its first 20 lines have another number of columns",
    ),
    "p.jsonl": (
        '[{"de": "a", "en": "b"},\n' * 20 + '{"de": "a", "en": "b"}\n' * 19,
        "20 of its first 39 lines are not JSON",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_mostly_broken_table_is_refused(tmp_path: Path, name: str) -> None:
    text, message = BROKEN[name]
    (tmp_path / name).write_text(text)
    protocol = Protocol({"de-en": {"train": Source(files=(str(tmp_path / name),))}})
    with pytest.raises(MixMoEError, match=f"{name}: {message}"):
        prepare(protocol, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_blank_lines_of_jsonl_are_passed_over_by_both_readers(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"de": "a", "en": "b"}\n\n  \n{"de": "c", "en": "d"}\n\n')
    assert list(Source(files=(str(tmp_path / "p.jsonl"),)).rows(("de", "en"))) == [("a", "b"), ("c", "d")]
    assert [number for number, _ in read_rows(tmp_path / "p.jsonl", ["de"])] == [1, 4]


def test_formats_by_name() -> None:
    names = {"a.tsv": ".tsv", "a.TSV.GZ": ".tsv", "a.jsonl.xz": ".jsonl", "a.b.jsonl.bz2": ".jsonl",
             "a.parquet": ".parquet", "news.2020": ".2020", "gz": "", "de.txt.zst": ".txt"}  # fmt: skip
    assert {name: format_of(f"folder.tsv/{name}") for name in names} == names


def test_both_readers_know_the_same_formats(tmp_path: Path) -> None:
    """tools/preprocess_data.py took p.jsonl.zst for TSV, tools/prepare_data.py did not."""
    jsonl = b'{"de": "Haus", "en": "house"}\n'
    for suffix, pack in ((".zst", zstd), (".xz", lzma.compress), (".bz2", bz2.compress), ("", bytes)):
        path = tmp_path / f"p.jsonl{suffix}"
        path.write_bytes(pack(jsonl))
        assert [row for _, row in read_rows(path, ["de", "en"])] == [{"de": "Haus", "en": "house"}]
        assert list(Source(files=(str(path),)).rows(("de", "en"))) == [("Haus", "house")]


ODD_NAMES = ["news[2020].tsv", "*.tsv", "what?.tsv", "a b [!c].tsv", "Übersetzung [ä].tsv", "a=b,c.tsv"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_existing_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / "corpora [new]"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("decoy.tsv").write_text("de\ten\nHund\tDog\n")
    Path(name).write_text("de\ten\nKatze\tCat\n")
    for path in (name, str(folder / name)):
        assert list(Source(files=(path,)).rows(("de", "en"))) == [("Katze", "Cat")]
        assert read_test(f"de-en={path}", (None, None)).sources == ["Katze"]
        assert list(Source(aligned={"de": path, "en": path}).rows(("de", "en")))[1] == ("Katze\tCat",) * 2
        builder = Source(hub="csv", data_files=path, columns={"de": "de\ten"})
        assert list(builder.rows(("de",))) == [("Katze\tCat",)]
        assert prepare_data.main(["--parallel", f"de-en.train={path}", "--output-dir", "out"]) == 0
        shutil.rmtree("out")


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("de\ten\nHund\tDog\n")
    assert Source(files=(f"{tmp_path}/[a].tsv",)).paths() == [f"{tmp_path}/a.tsv"]
    with pytest.raises(MixMoEError, match=r"\[b\].tsv does not exist"):
        Source(files=(f"{tmp_path}/a.tsv", f"{tmp_path}/[b].tsv")).paths()


def test_a_file_may_be_called_as_a_test_set_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("flores:dev.tsv").write_text("de\ten\nHund\tDog\n")
    assert read_test("de-en=flores:dev.tsv", (None, None)).sources == ["Hund"]


def test_a_dataset_directory_with_brackets_is_not_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "set [1]"
    folder.mkdir()
    (folder / "train.txt").write_text("Haus\n")
    with pytest.raises(MixMoEError, match=r"for a pattern: rename that directory"):
        list(Source(hub=str(folder)).rows(("de",)))
