"""Budgets matched to the reference's: operations by steps, trained parameters by the size of what a method adds.

Without this all systems train for the same steps, so on the same tokens, and each method has its own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.planning.parameters import count_parameters
from mixmoe_megatron.study.footprint import count_training_flops, trained_model
from mixmoe_megatron.study.grid import MATCHED_BY, Grid
from mixmoe_megatron.study.jobs import Job

REFERENCE = "mixmoe"


def counted_jobs(grid: Grid, names: Sequence[str]) -> list[Job]:
    """Return the jobs that matching reads: starts and token files, a few seconds each.

    Args:
        grid: The study, not matched.
        names: Of its systems.
    """
    trainings = [training for name in [REFERENCE, *names] for training in grid.trainings(name, 1)]
    return [job for training in trainings for job in (training.start, *training.data)]


def matched_steps(grid: Grid, names: Sequence[str], root: Path) -> dict[tuple[str, str], int]:
    """Return the steps with which each training takes the operations of the reference's on the same kind of text.

    Mixed text takes those of both kinds; a kind that the reference does not read, a review, keeps its steps.

    Args:
        grid: The study, not matched.
        names: Of its systems.
        root: Directory of all jobs; `counted_jobs` have run.

    Raises:
        MixMoEError: They have not, or the grid lacks the reference.
    """
    _check(grid, names, root)
    sequence = int(grid.size["sequence"])
    flops = {
        (name, training.kind): (
            training.steps,
            count_training_flops(trained_model(training, root), training, sequence, root),
        )
        for name in [REFERENCE, *names]
        for training in grid.trainings(name, 1)
    }
    wanted = {kind: counted for (name, kind), (_, counted) in flops.items() if name == REFERENCE}
    wanted["mixed"] = sum(wanted.values())
    return {
        (name, kind): max(1, round(steps * wanted.get(kind, counted) / counted))
        for (name, kind), (steps, counted) in flops.items()
    }


def matched_starts(grid: Grid, names: Sequence[str], root: Path) -> dict[str, tuple[str, ...]]:
    """Return what gives systems about as many trained parameters as the reference trains at a time.

    Only methods have this whose entry in the grid names an option for it, ``matched_by``: what they train is in
    proportion to it.

    Args:
        grid: The study, not matched.
        names: Of its systems.
        root: Directory of all jobs; `counted_jobs` have run.

    Raises:
        MixMoEError: They have not, or the grid lacks the reference.
    """
    _check(grid, names, root)
    wanted = count_parameters(trained_model(grid.trainings(REFERENCE, 1)[0], root)).trained
    starts: dict[str, tuple[str, ...]] = {}
    for name in names:
        system = grid.content["systems"][name]
        if system and (flag := grid.content["methods"][system["method"]].get("matched_by")):
            model = trained_model(grid.trainings(name, 1)[0], root)
            now = MATCHED_BY[flag](model)
            starts[name] = (flag, str(max(1, round(now * wanted / count_parameters(model).trained))))
    return starts


def _check(grid: Grid, names: Sequence[str], root: Path) -> None:
    if REFERENCE not in grid.content["systems"]:
        raise MixMoEError(f"Budgets are matched to the system {REFERENCE}, which the grid lacks.")
    if not all(job.is_done(root) for job in counted_jobs(grid, names)):
        raise MixMoEError("To match budgets, the systems' starts must be there: run it once without --dry-run.")
