"""Timing by turns: what is compared takes turns, so that all meet the same machine; the fastest turn of each counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def fastest_turns(calls: Mapping[str, Callable[[], object]], turns: int, warmup: int) -> dict[str, float]:
    """Return the seconds of each call's fastest turn, the GPU's work included.

    Args:
        calls: Name to a call that does the work once.
        turns: Measured turns of each.
        warmup: Turns before them that do not count.
    """
    has_gpu = torch.cuda.is_available()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warmup + turns):
        for name, call in calls.items():
            if has_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if has_gpu:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(values[warmup:]) for name, values in seconds.items()}
