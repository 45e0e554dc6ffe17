"""What the tests of several processes share: one tiny world with a stage 1, trained by one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.training import make_tiny_world, train

Log = tuple[list[float], list[float]]

#: Steps of the runs that several processes are held to; four micro-batches of two sequences a step.
STEPS = 20
COMMON = "--micro-batch-size 2 "


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model (base/, upcycled/) with data (mono, pairs). To be read only."""
    directory = tmp_path_factory.mktemp("world")
    make_tiny_world(directory)
    return directory


@pytest.fixture(scope="session")
def stage1(world: Path) -> Log:
    """Losses and gradient norms of stage 1 in one process; its checkpoint is stage1/ of the world."""
    return train(1, world / "upcycled", world / "mono", world / "stage1", STEPS, COMMON)


@pytest.fixture(scope="session")
def one_process(world: Path, stage1: Log) -> dict[int, Log]:
    """Losses and gradient norms of both stages in one process; checkpoints stage1/ and stage2/ of the world."""
    stage2 = train(2, world / "stage1", world / "pairs", world / "stage2", STEPS, COMMON)
    assert all(len(losses) == STEPS and norms[0] > 0 for losses, norms in (stage1, stage2))
    return {1: stage1, 2: stage2}
