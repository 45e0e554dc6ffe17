"""Two processes equal one, in both stages: expert, tensor (with sequence) and data parallelism with its optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixmoe_megatron.freezing import is_trained
from tests.helpers.training import checkpoint_tensors, make_tiny_world, train

STEPS = 20
LAYOUTS = {
    "expert parallel 2": "--expert-model-parallel-size 2",
    "tensor parallel 2, sequence parallel": "--tensor-model-parallel-size 2 --sequence-parallel",
    "data parallel 2, distributed optimizer": "--use-distributed-optimizer",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny upcycled model with data, trained for 20 steps in each stage by one process."""
    directory = tmp_path_factory.mktemp("world")
    make_tiny_world(directory)
    return directory


@pytest.fixture(scope="module")
def one_process(world: Path) -> dict[int, list[float]]:
    """Losses of the 20 steps of stages 1 and 2 in one process."""
    losses = {}
    for stage, parent, data in ((1, "upcycled", "mono"), (2, "stage1", "pairs")):
        losses[stage], norms = train(stage, world / parent, world / data, world / f"stage{stage}", STEPS)
        assert len(losses[stage]) == STEPS
        assert norms[0] > 0
    return losses


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_equal_one(
    world: Path, one_process: dict[int, list[float]], stage: int, layout: str, tmp_path: Path
) -> None:
    parent, data = (("upcycled", "mono"), ("stage1", "pairs"))[stage - 1]
    losses, _ = train(stage, world / parent, world / data, tmp_path / "run", STEPS, LAYOUTS[layout], processes=2)
    assert losses == pytest.approx(one_process[stage], abs=1e-5, rel=0)
    assert_frozen_tensors_kept(world / parent, tmp_path / "run", stage)
    expected = checkpoint_tensors(world / f"stage{stage}")
    for name, tensor in checkpoint_tensors(tmp_path / "run").items():
        difference = (tensor - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-3)
        assert difference < 1e-4, f"{name} differs by {difference:.1e} of its largest value"


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_tensors_are_bit_identical_after_20_steps(
    world: Path, one_process: dict[int, list[float]], stage: int
) -> None:
    assert_frozen_tensors_kept(world / ("upcycled", "stage1")[stage - 1], world / f"stage{stage}", stage)


def assert_frozen_tensors_kept(parent: Path, child: Path, stage: int) -> None:
    """Check that what a stage freezes has the parent's bits, and that what it trains has moved."""
    before, after = checkpoint_tensors(parent), checkpoint_tensors(child)
    assert before.keys() <= after.keys()
    for name, tensor in after.items():
        if is_trained(name, stage):
            origin = before[name.replace(".mt.", ".lm.").replace(".mt_experts.", ".lm_experts.")]
            assert not torch.equal(tensor, origin), f"{name} did not train"
        else:
            assert torch.equal(tensor, before[name]), f"{name} is frozen in stage {stage} but changed"
