"""Work on several threads keeps its order and its errors; a view is a file of its own inside another one."""

from __future__ import annotations

import os
import threading
import zipfile
from pathlib import Path

import pytest

from mixmoe_megatron.checkpoint import streaming
from mixmoe_megatron.checkpoint.streaming import FileView, in_parallel, opened


def test_results_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    second_began = threading.Event()

    def work(number: int) -> int:
        if number == 1:
            second_began.set()
        assert second_began.wait(10)  # before the first is done with
        return number * number

    assert in_parallel(work, range(6)) == [0, 1, 4, 9, 16, 25]


def test_the_first_failure_arrives_and_what_was_not_begun_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    begun: list[int] = []
    failure_seen = threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number == 2:
            raise ValueError(f"item {number}")
        if number > 2:
            failure_seen.wait(0.2)

    with pytest.raises(ValueError, match="item 2"):
        in_parallel(work, range(40))
    assert begun[:3] == [0, 1, 2] and len(begun) < 40


def test_a_view_reads_and_writes_its_part_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_WRITE_BYTES", 3)
    path = tmp_path / "file"
    path.write_bytes(b"." * 20)
    with opened(path) as file:
        view = FileView(file, 4)
        assert view.write(b"0123456789") == 10 and view.tell() == 10
        view.seek(2)
        view.write(memoryview(b"ab"))
        assert view.seek(0, os.SEEK_END) == 10
    assert path.read_bytes() == b"....01ab456789......"
    with path.open("rb") as stream:
        view = FileView(stream.fileno(), 4, 10)
        assert view.read(3) == b"01a" and view.read() == b"b456789" and view.read(1) == b""
        assert view.seek(-2, os.SEEK_END) == 8 and view.read() == b"89" and stream.tell() == 0


def test_a_zip_archive_lies_in_the_middle_of_a_file(tmp_path: Path) -> None:
    with opened(tmp_path / "file") as file:
        with zipfile.ZipFile(FileView(file, 100), "w") as archive:
            archive.writestr("name", "content")
        size = os.fstat(file).st_size - 100
        os.pwrite(file, b"x" * 50, 100 + size)
    with (tmp_path / "file").open("rb") as stream, zipfile.ZipFile(FileView(stream.fileno(), 100, size)) as archive:
        assert archive.read("name") == b"content" and archive.testzip() is None


def test_room_is_taken_first(tmp_path: Path) -> None:
    with opened(tmp_path / "file", 5000) as file:
        assert os.fstat(file).st_size == 5000
    with opened(tmp_path / "file") as file:  # what it holds stays
        os.pwrite(file, b"x", 4999)
    assert (tmp_path / "file").read_bytes() == bytes(4999) + b"x"
