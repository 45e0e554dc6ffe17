"""Settings of the whole suite: threads and offline mode before torch is imported, seeds, and the grouping of tests."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

# Set before torch and transformers are imported; inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TESTS = Path(__file__).resolve().parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests/distributed, and under pytest-xdist keep a file on one worker and distributed tests on one in all.

    A file's expensive fixtures are then built once, and tests that start several processes never overlap.
    """
    with_xdist = config.pluginmanager.hasplugin("xdist")
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder == "distributed":
            item.add_marker(pytest.mark.distributed)
        if with_xdist:
            one_worker = folder == "end_to_end" or item.get_closest_marker("distributed") is not None
            item.add_marker(pytest.mark.xdist_group("several processes" if one_worker else str(item.path)))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Give each test the same random numbers, in whatever order and on whatever worker it runs."""
    random.seed(0)
    for name in ("numpy", "torch"):
        if name in sys.modules:
            module = sys.modules[name]
            (module.random.seed if name == "numpy" else module.manual_seed)(0)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Return the repository's top folder."""
    return TESTS.parent
