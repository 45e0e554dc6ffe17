"""A progress line that moves: rewritten twice a second on a terminal, elsewhere a log line each half minute."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

logger = logging.getLogger(__name__)
_TERMINAL_SECONDS, _LOG_SECONDS = 0.5, 30.0
_CLEAR_LINE = "\r\x1b[K"


def time_text(seconds: float) -> str:
    """Return a duration as people say it: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class Progress:
    """How far a piece of work is, with its speed and the time that is left.

    Args:
        label: What the line begins with.
        total: Items in all.
        done: Items that were done before.
        work: Measure of what is left, such as its tokens: the time left is told from the part of it that is done.
        unit: What the items are called.
        stream: Where the line is shown if that is a terminal; None: stderr.
        clock: Seconds.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        work: float,
        done: int = 0,
        unit: str = "segments",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._total, self._done, self._unit = label, total, done, unit
        self._work, self._worked, self._tokens = work, 0.0, 0
        self._stream, self._clock = stream or sys.stderr, clock
        self._terminal = self._stream.isatty()
        self._start = self._shown = clock()

    def __enter__(self) -> Progress:
        """Return the progress."""
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the line from a terminal."""
        if self._terminal:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()

    def advance(self, items: int, work: float, tokens: int) -> None:
        """Count finished items, and show the line if it is time to.

        Args:
            items: How many.
            work: Their part of the work.
            tokens: Tokens made or read for them.
        """
        self._done, self._worked, self._tokens = self._done + items, self._worked + work, self._tokens + tokens
        self.show()

    def show(self, running: int = 0, note: str = "") -> None:
        """Show the line if the last one is old enough.

        Args:
            running: Tokens of the items under way.
            note: How far these are.
        """
        now = self._clock()
        if now - self._shown < (_TERMINAL_SECONDS if self._terminal else _LOG_SECONDS):
            return
        self._shown = now
        line = self._line(now - self._start, self._tokens + running, note)
        if self._terminal:
            self._stream.write(_CLEAR_LINE + line[: shutil.get_terminal_size().columns - 1])
            self._stream.flush()
        else:
            logger.info(line)

    def _line(self, seconds: float, tokens: int, note: str) -> str:
        parts = [f"{self._label}: {self._done} of {self._total} {self._unit}"]
        if note:
            parts.append(note)
        parts.append(f"{tokens / seconds:.0f} tokens/s")
        if self._worked:
            parts.append(f"{time_text(seconds * (self._work - self._worked) / self._worked)} left")
        return ", ".join(parts)
