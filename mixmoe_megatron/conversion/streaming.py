"""How the bytes of a conversion move at the speed of a copy: read ahead, write small blocks.

As with a copy, the system brings them to the disk in its own time. What a power failure cuts off is found by its size
when it is read (`check_files`, safetensors' header); the source is still there.
"""

from __future__ import annotations

import ctypes
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from mixmoe_megatron.conversion.plan import LazyTensor

# Linux 6.x spends five times as long on a write of many megabytes, for which it looks for huge page-cache folios.
_BLOCK_BYTES = 1 << 18
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


def open_to_write(path: Path) -> io.FileIO:
    """Open a file for `write_all`: made if missing; what it holds stays."""
    return io.FileIO(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), "w")


def write_all(file: io.FileIO, data: Any, position: int | None = None) -> int:
    """Write all of a buffer, at `position` if given, and return its bytes.

    Raises:
        OSError: the disk is full, or fails.
    """
    if position is not None:
        file.seek(position)
    rest = memoryview(data).cast("B")
    size = len(rest)
    while len(rest):
        rest = rest[file.write(rest[:_BLOCK_BYTES]) :]
    return size
