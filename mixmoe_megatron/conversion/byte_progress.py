"""How far a conversion is: bytes, rate and the time that is left, as a bar on a terminal and as log lines elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0

logger = logging.getLogger(__name__)


@contextmanager
def progress(total: int, label: str, rank: int = 0) -> Iterator[Callable[[int], None]]:
    """Give a function that any thread tells of each finished piece. Rank 0 speaks for all: the shares are about equal.

    Args:
        total: bytes of all pieces of this process.
        label: what is going on, such as `to Megatron`.
        rank: of this process.
    """
    start = last = time.monotonic()
    with tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=True if rank else None) as bar:
        done, one_at_a_time = 0, threading.Lock()

        def advance(num_bytes: int) -> None:
            nonlocal done, last
            with one_at_a_time:
                done += num_bytes
                bar.update(num_bytes)
                if bar.disable and rank == 0 and (now := time.monotonic()) - last > _SECONDS_BETWEEN_LINES:
                    last = now
                    line = tqdm.format_meter(done, total, now - start, ncols=0, unit="B", unit_scale=True)
                    logger.info("%s: %s", label, line.strip())

        yield advance
