"""How the bytes of a conversion move at the speed of a copy: block by block, on a few threads.

As with a copy, the system brings them to the disk in its own time: after a power failure in the minute after a
conversion, convert again. The source is still there.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MOST_THREADS = 4  # by then the disk, or the memory, is busy
# Linux 6.x spends five times as long on a write of many megabytes, for which it looks for huge page-cache folios.
_WRITE_BYTES = 1 << 18


def in_parallel[T, R](work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return what `work` gives for each item; several are under way at a time.

    Raises what `work` raises for the first item that fails; those not yet begun are left out.
    """
    with ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def opened(path: Path, num_bytes: int = 0) -> Iterator[int]:
    """Open a file for writing, made if missing; what it holds stays.

    Args:
        path: of the file.
        num_bytes: for which to take room on the disk first, at once; that saves the kernel most of its work later.

    Raises:
        OSError: the disk is full, or fails.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        if num_bytes:
            os.posix_fallocate(file, 0, num_bytes)
        yield file
    finally:
        os.close(file)


class FileView(io.RawIOBase):
    """An open file from some position on, as a file of its own. Reading and writing leave the file's position alone.

    Args:
        file: descriptor of the file, which the caller closes.
        offset: in the file, of the first byte.
        length: in bytes; None: to the end of what is written.
    """

    def __init__(self, file: int, offset: int, length: int | None = None) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length or 0, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def writable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position, which the view's end does not limit, and return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read what the buffer holds, or up to the view's end; return the number of bytes."""
        wanted = max(0, min(len(buffer), self._length - self._position))
        read = os.preadv(self._file, [memoryview(buffer)[:wanted]], self._offset + self._position)
        self._position += read
        return read

    def write(self, data: Any) -> int:
        """Write all of a buffer, small pieces at a time, and return its bytes.

        Raises:
            OSError: the disk is full, or fails.
        """
        bytes_ = memoryview(data).cast("B")
        done = 0
        while done < len(bytes_):
            piece = bytes_[done : done + _WRITE_BYTES]
            done += os.pwrite(self._file, piece, self._offset + self._position + done)
        self._position += done
        self._length = max(self._length, self._position)
        return done
