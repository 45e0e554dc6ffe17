"""bfloat16 under every layout: N processes are as near to float32 as one process in bfloat16 is.

Rounding to bfloat16 changes a gradient by some percent, so that N processes and one cannot agree to the digit. What must
hold is that N processes add nothing to it. So each trained tensor's gradient (Adam's first moment after some steps, a mean
of the clipped gradients) may be no farther from the float32 run's than one process's is, times SLACK. A sum that is
forgotten changes gradients by about their own size, many times the bound: the planted errors show it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from mixmoe_megatron.freezing import is_trained
from tests.distributed.conftest import COMMON
from tests.distributed.test_hf_training import contents
from tests.distributed.test_n_equals_one import (
    ALLGATHER,
    CP,
    DISTRIBUTED_OPTIMIZER,
    EP,
    ETP,
    FULL,
    OVERLAP,
    PP,
    PP4,
    SELECTIVE,
    TP,
    VPP,
    assert_frozen_tensors_kept,
    assert_optimizer_state_of_trained_tensors_only,
)
from tests.distributed.test_packing import PACK
from tests.distributed.test_resharding import resumed
from tests.helpers.conversion import load_weights_of, run_conversion
from tests.helpers.training import checkpoint_tensors, make_tiny_world, saved_objects, train

STEPS, SAVED = 4, 2
SLACK = 1.5
BF16 = COMMON + "--bf16 "

QUICK = {
    "TP2 SP, recompute full": (2, TP + FULL),
    "EP2, recompute moe": (2, EP + SELECTIVE + "moe"),
    "PP2": (2, PP),
    "DP2, distributed optimizer, overlap": (2, OVERLAP),
}
SLOW = {
    "TP2 SP": (2, TP),
    "EP2": (2, EP),
    "EP2 allgather": (2, EP + ALLGATHER),
    "EP2, distributed optimizer, overlap": (2, EP + OVERLAP),
    "TP2 EP2, 2 processes": (2, TP + EP),
    "TP2 EP2, 4 processes": (4, TP + EP + DISTRIBUTED_OPTIMIZER),
    "TP2 ETP2": (2, TP + ETP),
    "CP2": (2, CP),
    "VPP2 PP2, overlap": (2, VPP + OVERLAP),
    "PP2, recompute moe": (2, PP + SELECTIVE + "moe"),
    "PP4, stages that train nothing": (4, PP4 + OVERLAP),
    "DP2 PP2, overlap": (4, PP + OVERLAP),
    "DP2, gradients reduced in bfloat16": (2, OVERLAP + "--grad-reduce-in-bf16 "),
}
LAYOUTS = QUICK | SLOW


class Run(NamedTuple):
    """A run's losses and, by the name of each trained tensor, Adam's first moment."""

    losses: list[float]
    moments: dict[str, torch.Tensor]


class Runs:
    """A tiny bfloat16 model with its data, and runs of one process in float32 and bfloat16 that start from it."""

    def __init__(self, world: Path):
        self.world = world
        make_tiny_world(world, dtype="bf16")
        self.bfloat16: dict[int, Run] = {}
        self.float32: dict[int, Run] = {}
        for stage in (1, 2):
            self.bfloat16[stage] = self.train(stage, world / f"stage{stage}", BF16)
            self.float32[stage] = self.train(stage, world / f"stage{stage} float32", COMMON)

    def parent(self, stage: int) -> Path:
        """The checkpoint that a stage starts from; stage 2's was trained in bfloat16."""
        return self.world / ("upcycled", "stage1")[stage - 1]

    def train(self, stage: int, save: Path, flags: str, processes: int = 1, prelude: Any = None) -> Run:
        """Train from the stage's parent, or go on in `save`."""
        data = self.world / ("mono", "pairs")[stage - 1]
        losses, _ = train(stage, self.parent(stage), data, save, STEPS, flags, processes, prelude)
        return Run(losses, moments(save))


def moments(directory: Path) -> dict[str, torch.Tensor]:
    """Return Adam's first moments of the newest iteration of a checkpoint, by the tensors' names; float32."""
    prefix = "optimizer.state.exp_avg."
    return {key.removeprefix(prefix): value for key, value in saved_objects(directory).items() if key.startswith(prefix)}
