"""How the bytes of a conversion move at the speed of a copy: read ahead, write small blocks, sync meanwhile."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from mixmoe_megatron.conversion.plan import LazyTensor

# Linux 6.x spends five times as long on a write of many megabytes, for which it looks for huge page-cache folios.
_BLOCK_BYTES = 1 << 18
_SYNC_BYTES = 1 << 27
_MALLOPT = {-8: 1, -4: 0, -1: 2**31 - 1}  # glibc's M_ARENA_MAX (one for all threads), M_MMAP_MAX, M_TRIM_THRESHOLD


def keep_freed_memory() -> None:
    """Let tensors take the memory of freed ones, which the kernel would else clear page by page for each of them.

    For a process that only converts: what it once had stays its own to its end. Does nothing where malloc is not
    glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _MALLOPT.items():
            mallopt(parameter, value)


def write_each(tensors: Sequence[LazyTensor], write: Callable[[LazyTensor, Tensor], None]) -> None:
    """Give each tensor and its values to `write`, and read the next one meanwhile; two are in memory.

    Raises:
        MixMoEError: what a tensor's `read` raises.
    """
    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(tensor.read) for tensor in tensors[:1]]
        for number, tensor in enumerate(tensors, start=1):
            values = coming.pop().result()
            coming += [reader.submit(following.read) for following in tensors[number : number + 1]]
            write(tensor, values)
            del values  # before the next but one is read


class DiskFile:
    """A file to write whose bytes go to the disk while later ones are written: all are there when the block ends.

    Args:
        path: made if missing; what it holds stays.

    Raises:
        OSError: the disk is full, or fails.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), "wb", buffering=0)
        self._beside = ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None
        self._unsynced = 0

    def __enter__(self) -> DiskFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self._sync()
                self._sync()
        finally:
            self._beside.shutdown()
            self._file.close()

    def _sync(self) -> None:
        """Start to sync what was written so far, when what was started before is done."""
        if self._syncing is not None:
            self._syncing.result()
        self._syncing = self._beside.submit(os.fsync, self._file.fileno())

    def tell(self) -> int:
        """Return the position at which the next byte is written."""
        return self._file.tell()

    def write(self, data: Any, position: int | None = None) -> int:
        """Write all of a buffer, at `position` if given, and return its bytes."""
        if position is not None:
            self._file.seek(position)
        rest = memoryview(data).cast("B")
        size = len(rest)
        while len(rest):
            rest = rest[self._file.write(rest[:_BLOCK_BYTES]) :]
        self._unsynced += size
        if self._unsynced > _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._unsynced = 0
            self._sync()
        return size
