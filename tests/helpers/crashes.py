"""Kill a process, or let its disk be full, at an exact point of what it changes on the disk; list those points.

Each function gives a prelude for `forked.Job`: it watches the rank from inside, by Python's audit events.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

_CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def record_changes(directory: Path, log: Path) -> Callable[[], None]:
    """Each rank lists what it changes in `directory`, in LOG.RANK, one line a change."""
    return partial(_watch, str(directory), partial(_write_down, str(log)))


def die_at_change(directory: Path, rank: int, number: int) -> Callable[[], None]:
    """A rank kills itself just before its change with this number (from 0)."""
    return partial(_watch, str(directory), partial(_die, rank, number))


def full_disk_from(directory: Path, rank: int, path: str) -> Callable[[], None]:
    """From the moment when a rank opens `path` (relative to `directory`), no file can be opened for writing there."""
    return partial(_watch, str(directory), partial(_refuse, rank, path, []))


def file_size_limit_from(directory: Path, rank: int, path: str, limit: int) -> Callable[[], None]:
    """From the moment when a rank opens `path`, the system lets it write no file of more than `limit` bytes."""
    return partial(_watch, str(directory), partial(_limit, rank, path, limit))


def die_at_size(directory: Path, rank: int, path: str, limit: int) -> Callable[[], None]:
    """A rank dies in the write that makes `path` (relative to `directory`) longer than `limit` bytes: a torn file."""
    return partial(_watch, str(directory), partial(_limit, rank, path, limit, deadly=True))


def _watch(directory: str, on_change: Callable[[int, str, str], None]) -> None:
    """Call on_change(number, event, path below directory) just before each change."""
    count = 0

    def on_event(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event not in _CHANGES or not str(arguments[0]).startswith(directory):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        on_change(count, event, str(arguments[0]).removeprefix(directory).removeprefix("/"))
        count += 1

    sys.addaudithook(on_event)


def _is_rank(rank: int) -> bool:
    return os.environ["RANK"] == str(rank)


def _write_down(log: str, number: int, event: str, path: str) -> None:
    descriptor = os.open(f"{log}.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{event} {path}\n".encode())
    os.close(descriptor)


def _die(rank: int, wanted: int, number: int, event: str, path: str) -> None:
    if _is_rank(rank) and number == wanted:
        os.kill(os.getpid(), signal.SIGKILL)


def _refuse(rank: int, first: str, begun: list[bool], number: int, event: str, path: str) -> None:
    if _is_rank(rank) and event == "open" and (begun or path.startswith(first)):
        begun.append(True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def _limit(rank: int, wanted: str, limit: int, number: int, event: str, path: str, deadly: bool = False) -> None:
    if _is_rank(rank) and event == "open" and path == wanted:
        if deadly:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
