"""Settings of the whole suite: threads and offline mode before torch is imported; seeds."""

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


if os.environ.get("DEVICE") != "cuda":  # `make test-gpus`; all else is written for the CPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


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
    return Path(__file__).resolve().parents[1]
