"""What the end-to-end tests share: one tiny model with its data, one run of stage 1."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.training import make_tiny_world, train


class Run(NamedTuple):
    """A finished training run: its checkpoint directory, losses (nats a token) and gradient norms of its steps."""

    directory: Path
    losses: list[float]
    norms: list[float]


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with base/, upcycled/ and the token files mono and pairs."""
    directory = tmp_path_factory.mktemp("tiny_world")
    make_tiny_world(directory)
    return directory


@pytest.fixture(scope="session")
def stage1_run(tiny_world: Path) -> Run:
    """Six uninterrupted steps of stage 1."""
    directory = tiny_world / "stage1"
    return Run(directory, *train(1, tiny_world / "upcycled", tiny_world / "mono", directory, 6))
