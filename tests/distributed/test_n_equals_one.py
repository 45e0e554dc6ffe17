"""N processes equal one, in both stages: every parallel layout, alone and combined, with recomputation and overlap.

Four micro-batches a step in one process; with data parallelism the ranks share them, else they accumulate gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from mixmoe_megatron.checkpoint.megatron_checkpoint import iteration_directory
from mixmoe_megatron.methods.registry import PHASES, phase_of_stage
from tests.distributed.conftest import COMMON, STEPS, Log
from tests.helpers.logit_rows import compute_all_logits, refuse_all_logits
from tests.helpers.training import checkpoint_tensors, train

TP = "--tensor-model-parallel-size 2 --sequence-parallel "
EP = "--expert-model-parallel-size 2 "
PP = "--pipeline-model-parallel-size 2 "
PP4 = "--pipeline-model-parallel-size 4 "
VPP = PP + "--num-virtual-stages-per-pipeline-rank 2 "
CP = "--context-parallel-size 2 "
ETP = "--expert-tensor-parallel-size 2 "
DISTRIBUTED_OPTIMIZER = "--use-distributed-optimizer "
OVERLAP = DISTRIBUTED_OPTIMIZER + "--overlap-grad-reduce --overlap-param-gather "
ALLGATHER = "--moe-token-dispatcher-type allgather "
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
SELECTIVE = "--recompute-granularity selective --recompute-modules "

#: layout -> (processes, flags). EP2 of two processes is DP2 for the routers.
ESSENTIAL = {
    "TP2 SP": (2, TP),
    "EP2": (2, EP),
    "DP2, distributed optimizer, overlap": (2, OVERLAP),
    "PP2": (2, PP),
    "CP2": (2, CP),
    "TP2 EP2, 2 processes": (2, TP + EP),
    "TP2 PP2": (4, TP + PP + DISTRIBUTED_OPTIMIZER),
}
SLOW = {
    "DP2, distributed optimizer": (2, DISTRIBUTED_OPTIMIZER),
    "EP2, distributed optimizer, overlap": (2, EP + OVERLAP),
    "EP2 allgather": (2, EP + ALLGATHER),
    "EP2, recompute moe": (2, EP + SELECTIVE + "moe core_attn"),
    "TP2 SP allgather": (2, TP + ALLGATHER),
    "TP2 EP2, 2 processes, allgather": (2, TP + EP + ALLGATHER),
    "TP2 EP2, 2 processes, recompute full": (2, TP + EP + FULL),
    "TP2 EP2, 2 processes, recompute moe_act": (2, TP + EP + SELECTIVE + "moe_act"),
    "TP2 EP2, 4 processes": (4, TP + EP + DISTRIBUTED_OPTIMIZER),
    "TP2 EP4, 4 processes": (4, TP + "--expert-model-parallel-size 4"),
    "TP4 SP, more ranks than key-value heads": (4, "--tensor-model-parallel-size 4 --sequence-parallel"),
    "TP2 ETP2": (2, TP + ETP),
    "TP1 ETP2": (2, ETP),
    "TP2 ETP2 EP2, 4 processes": (4, TP + ETP + EP + DISTRIBUTED_OPTIMIZER),
    "PP2, recompute moe": (2, PP + SELECTIVE + "moe"),
    "PP2 uneven, a stage of one layer": (2, PP + "--decoder-first-pipeline-num-layers 1"),
    "PP4, stages that train nothing": (4, PP4),
    "PP4, stages that train nothing, overlap": (4, PP4 + OVERLAP),
    "PP4, stages that train nothing, recompute full": (4, PP4 + FULL),
    "PP4, stages without a layer": (4, PP4 + DISTRIBUTED_OPTIMIZER + "--pipeline-model-parallel-layout E|tt|tt|L"),
    "VPP2 PP2": (2, VPP),
    "VPP2 PP2, recompute full": (2, VPP + FULL),
    "VPP2 PP2, overlap": (2, VPP + OVERLAP),
    "VPP2 PP2 TP2": (4, TP + VPP),
    "EP2 PP2": (4, EP + PP + DISTRIBUTED_OPTIMIZER),
    "EP2 PP2 allgather": (4, EP + PP + ALLGATHER),
    "EP2 PP2, recompute full": (4, EP + PP + DISTRIBUTED_OPTIMIZER + FULL),
    "DP2 PP2, overlap": (4, PP + OVERLAP),
    "CP2, distributed optimizer": (2, CP + DISTRIBUTED_OPTIMIZER),
    "CP2 EP2, 2 processes": (2, CP + EP),
    "CP2 TP2": (4, CP + TP + DISTRIBUTED_OPTIMIZER),
    "CP2 PP2": (4, CP + PP + DISTRIBUTED_OPTIMIZER),
    "DP4, distributed optimizer": (4, DISTRIBUTED_OPTIMIZER),
}
LAYOUTS = ESSENTIAL | SLOW
if "GPUS" in os.environ:  # `make test-gpus`: a process a GPU
    ESSENTIAL, SLOW = (
        {name: layout for name, layout in layouts.items() if layout[0] <= int(os.environ["GPUS"])}
        for layouts in (ESSENTIAL, SLOW)
    )


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("layout", [*ESSENTIAL, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_n_processes_equal_one(
    world: Path, one_process: dict[int, Log], stage: int, layout: str, tmp_path: Path
) -> None:
    processes, flags = LAYOUTS[layout]
    parent, data = (("upcycled", "mono"), ("stage1", "pairs"))[stage - 1]
    run = tmp_path / "run"
    prelude = refuse_all_logits if stage == 2 else None  # each micro-batch has prompts, which carry no loss
    losses, norms = train(stage, world / parent, world / data, run, STEPS, COMMON + flags, processes, prelude)
    assert losses == pytest.approx(one_process[stage][0], abs=1e-5, rel=0)
    assert norms == pytest.approx(one_process[stage][1], rel=2e-3)
    assert_frozen_tensors_kept(world / parent, run, stage)
    assert_optimizer_state_of_trained_tensors_only(run, phase_of_stage(stage).is_trained)
    expected = checkpoint_tensors(world / f"stage{stage}")
    for name, tensor in checkpoint_tensors(run).items():
        difference = (tensor - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-3)
        assert difference < 1e-4, f"{name} differs by {difference:.1e} of its largest value"


@pytest.mark.parametrize("layout", ["one process", pytest.param("TP2 SP", marks=pytest.mark.slow)])
def test_logits_of_all_rows_train_the_same(
    world: Path, one_process: dict[int, Log], layout: str, tmp_path: Path
) -> None:
    processes, flags = LAYOUTS.get(layout, (1, ""))
    save = tmp_path / "run"
    parts = world / "stage1", world / "pairs", save, STEPS, COMMON + flags, processes
    losses, norms = train(2, *parts, prelude=compute_all_logits)
    assert losses == pytest.approx(one_process[2][0], abs=1e-5, rel=0)
    assert norms == pytest.approx(one_process[2][1], rel=2e-3)
    expected = checkpoint_tensors(world / "stage2")
    for name, tensor in checkpoint_tensors(save).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("phase", "parent"), [("one_stage", "upcycled"), ("stage2_unfrozen", "stage1")])
def test_the_ablations_train_both_groups(
    world: Path, one_process: dict[int, Log], phase: str, parent: str, tmp_path: Path
) -> None:
    alone, run, flags = tmp_path / "alone", tmp_path / "run", COMMON + "--seq-length 160 "
    expected = train(phase, world / parent, world / "pairs", alone, STEPS, flags)
    losses, norms = train(phase, world / parent, world / "pairs", run, STEPS, flags + EP, 2)
    assert losses == pytest.approx(expected[0], abs=1e-5, rel=0)
    assert norms == pytest.approx(expected[1], rel=2e-3)
    before, after = checkpoint_tensors(world / parent), checkpoint_tensors(alone)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {name for name in before if PHASES[phase].is_trained(name)}
    assert_optimizer_state_of_trained_tensors_only(run, PHASES[phase].is_trained)


@pytest.mark.parametrize("stage", [1, 2])
def test_one_process_keeps_frozen_tensors_too(world: Path, one_process: dict[int, Log], stage: int) -> None:
    assert_frozen_tensors_kept(world / ("upcycled", "stage1")[stage - 1], world / f"stage{stage}", stage)
    assert_optimizer_state_of_trained_tensors_only(world / f"stage{stage}", phase_of_stage(stage).is_trained)


def assert_frozen_tensors_kept(parent: Path, child: Path, stage: int) -> None:
    """Check that what a stage freezes has the parent's bits, and that what it trains has moved."""
    before, after = checkpoint_tensors(parent), checkpoint_tensors(child)
    assert before.keys() <= after.keys()
    for name, tensor in after.items():
        if phase_of_stage(stage).is_trained(name):
            origin = before[name.replace(".mt.", ".lm.").replace(".mt_experts.", ".lm_experts.")]
            assert not torch.equal(tensor, origin), f"{name} did not train"
        else:
            assert torch.equal(tensor, before[name]), f"{name} is frozen in stage {stage} but changed"


def assert_optimizer_state_of_trained_tensors_only(directory: Path, is_trained: Callable[[str], bool]) -> None:
    """Check that each trained tensor has all that Adam keeps in a checkpoint, and no frozen tensor any of it."""
    keys = FileSystemReader(iteration_directory(directory)).read_metadata().state_dict_metadata
    trained = {name for name in checkpoint_tensors(directory) if is_trained(name)}
    kept: dict[str, set[str]] = {}
    for key in keys:
        if key.startswith("optimizer.state."):
            kind, _, name = key.removeprefix("optimizer.state.").partition(".")
            kept.setdefault(kind, set()).add(name)
    assert {"exp_avg", "exp_avg_sq"} <= kept.keys()
    for kind, names in kept.items():
        assert names == trained, kind
