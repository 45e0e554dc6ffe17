"""End a process with SIGKILL at an exact point of its work on the disk, from inside it, and list those points."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

_CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


def record_changes(directory: Path, log: Path) -> Callable[[], None]:
    """A prelude for `forked.Job`: each rank lists what it changes in `directory`, in LOG.RANK, one line a change."""
    return partial(_watch, str(directory), str(log), -1, None)


def die_at_change(directory: Path, rank: int, number: int) -> Callable[[], None]:
    """A prelude for `forked.Job`: a rank kills itself just before its change with this number (from 0)."""
    return partial(_watch, str(directory), None, number, rank)


def _watch(directory: str, log: str | None, number: int, rank: int | None) -> None:
    mine = os.environ["RANK"]
    count = 0

    def on_event(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event not in _CHANGES or not str(arguments[0]).startswith(directory):
            return
        if event == "open" and not isinstance(arguments[2], int):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):  # type: ignore[operator]
            return
        if log is not None:
            descriptor = os.open(f"{log}.{mine}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, f"{event} {str(arguments[0]).removeprefix(directory)}\n".encode())
            os.close(descriptor)
        elif count == number and mine == str(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    sys.addaudithook(on_event)
