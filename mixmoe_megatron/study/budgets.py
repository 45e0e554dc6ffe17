"""Budgets matched by operations: each training gets as many steps as the operations of the reference's pay for.

Without this all systems train for the same steps, so on the same tokens. Trained parameters are not matched but told:
a system of another size is a line in the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.study.footprint import count_training_flops, trained_model
from mixmoe_megatron.study.grid import Grid
from mixmoe_megatron.study.jobs import Job

REFERENCE = "mixmoe"


def counted_jobs(grid: Grid, names: Sequence[str]) -> list[Job]:
    """Return the jobs that `matched_steps` reads: starts and token files, a few seconds each.

    Args:
        grid: The study, not matched.
        names: Of its systems.
    """
    trainings = [training for name in [REFERENCE, *names] for training in grid.trainings(name, 1)]
    return [job for training in trainings for job in (training.start, *training.data)]


def matched_steps(grid: Grid, names: Sequence[str], root: Path) -> dict[tuple[str, str], int]:
    """Return the steps with which each training takes the operations of the reference's on the same kind of text.

    Args:
        grid: The study, not matched.
        names: Of its systems.
        root: Directory of all jobs; `counted_jobs` have run.

    Raises:
        MixMoEError: They have not, or the grid lacks the reference.
    """
    if REFERENCE not in grid.content["systems"]:
        raise MixMoEError(f"Operations are matched to the system {REFERENCE}, which the grid lacks.")
    if not all(job.is_done(root) for job in counted_jobs(grid, names)):
        raise MixMoEError("To match operations, the systems' starts must be there: run it once without --dry-run.")
    sequence, wanted = int(grid.size["sequence"]), dict[str, float]()
    steps = {}
    for name in [REFERENCE, *names]:
        for training in grid.trainings(name, 1):
            flops = count_training_flops(trained_model(training, root), training, sequence, root)
            steps[name, training.kind] = max(1, round(training.steps * wanted.setdefault(training.kind, flops) / flops))
    return steps
