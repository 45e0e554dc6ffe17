"""The processes of one conversion: one alone, or several that torchrun started, each doing its share.

The result never depends on their number: what goes into which file, and at which place, is settled by the plan.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import TypeVar

from mixmoe_megatron.errors import MixMoEError

_TIMEOUT = timedelta(days=1)  # the slowest share may be hours behind; torchrun ends the others when one process dies
R = TypeVar("R")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the conversion.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def together(self, work: Callable[[], R]) -> list[R]:
        """Run `work` on every rank, wait for all, and return what each gave, by rank.

        Raises:
            MixMoEError, OSError: on every rank, the first one that any rank raised.
        """
        if self.size == 1:
            return [work()]
        outcome: tuple[R | None, Exception | None]
        try:
            outcome = (work(), None)
        except (MixMoEError, OSError) as error:
            outcome = (None, error)
        import torch.distributed

        outcomes: list = [None] * self.size
        torch.distributed.all_gather_object(outcomes, outcome)
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return [result for result, _ in outcomes]

    def on_first(self, work: Callable[[], R]) -> R:
        """Run `work` on rank 0 only, and return on every rank what it gave. Raises as `together`."""
        return self.together(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Return which of some pieces of work are this rank's: neighbours, about total / size of the bytes.

        Args:
            sizes: of the pieces, in bytes.
        """
        middles = [end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True)]
        per_rank = max(sum(sizes), 1) / self.size
        return [piece for piece, middle in enumerate(middles) if int(middle / per_rank) == self.rank]


ALONE = Ranks()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Give the processes that torchrun started (environment variables RANK and WORLD_SIZE), or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield Ranks(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()
