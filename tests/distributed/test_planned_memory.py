"""The planner's bytes are what real processes hold after a training step, in both stages, under seven layouts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints_conversion import hf_to_mixmoe
from mixmoe_megatron.checkpoint.metadata import read_metadata
from mixmoe_megatron.conversion.prepared import describe_model
from mixmoe_megatron.methods.registry import PHASES, method_of, phase_of_stage
from mixmoe_megatron.planning.layouts import Batch, ParallelLayout
from mixmoe_megatron.planning.memory import stage_memory
from tests.helpers.forked import run_job
from tests.helpers.training import train_words

ESSENTIAL = [ParallelLayout(dp=2, ep=2)]
SLOW = [ParallelLayout(tp=2), ParallelLayout(dp=2), ParallelLayout(pp=2)]
SLOW += [
    ParallelLayout(tp=2, dp=2, ep=2),
    ParallelLayout(pp=2, dp=2, ep=2),
    ParallelLayout(tp=2, dp=2, etp=2),
]  # four processes
LAYOUTS = [*ESSENTIAL, *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW)]


@pytest.mark.usefixtures("stage1")
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_planned_bytes_are_what_processes_hold(world: Path, tmp_path: Path, layout: ParallelLayout, stage: int) -> None:
    parent, data = (("upcycled", "mono"), ("stage1", "pairs"))[stage - 1]
    assert_planned(world, tmp_path, layout, stage, parent, data, "fp32")


@pytest.mark.parametrize("flag", ["", pytest.param("--grad-reduce-in-bf16", marks=pytest.mark.slow)])
def test_planned_bytes_in_bf16(world: Path, tmp_path: Path, flag: str) -> None:
    """Frozen tensors have neither gradients nor float32 copies."""
    assert_planned(world, tmp_path, ParallelLayout(dp=2, ep=2), 1, "upcycled", "mono", "bf16", flag)


@pytest.mark.parametrize(
    "phase",
    ["dense", "lora", "llama_pro", "moe", "lpr_experts", pytest.param("lpr_router", marks=pytest.mark.slow),
     "llama_moe_v2", "llama_moe_v2_residual"],
)  # fmt: skip
def test_planned_bytes_of_other_methods(world: Path, tmp_path: Path, phase: str) -> None:
    method = method_of(PHASES[phase])
    words = ["--hf-dir", world / "base", "--output-dir", tmp_path / "start", "--method", method.name]
    assert hf_to_mixmoe.main(list(map(str, words))) == 0
    # MoE-LPR's ranks differ under expert parallelism
    layout = ParallelLayout(dp=2, ep=2) if method.name == "moe_lpr" else ParallelLayout(tp=2)
    assert_planned(world, tmp_path / "logs", layout, phase, str(tmp_path / "start"), "mono", "bf16")


def assert_planned(
    world: Path,
    logs: Path,
    layout: ParallelLayout,
    which: int | str,
    parent: str,
    data: str,
    dtype: str,
    flag: str = "",
) -> None:
    """Train one step in so many processes and compare every rank's bytes with the plan."""
    phase = PHASES[which] if isinstance(which, str) else phase_of_stage(which)
    model = replace(describe_model(read_metadata(world / parent), 0), phase=phase)
    batch = Batch(2, 8, 32, dtype=dtype, grads_in_fp32=not flag)
    flags = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather", *layout.flags()]
    flags += ["--micro-batch-size", "2", *(["--bf16"] if dtype == "bf16" else []), *flag.split()]
    flags += (
        ["--lpr-coeff", "0"] if "lpr_coeff" in phase.defaults else []
    )  # a loss holds nothing, and wants its own data
    flags += ["--data-cache-path", str(world / "cache")]
    words = train_words(which, world / parent, world / data, None, 1, " ".join(flags))
    job = run_job(["tests/helpers/measured_run.py", *words[1:]], layout.world_size, logs)
    planned = [memory for pp_rank in range(layout.pp) for memory in stage_memory(model, layout, batch, pp_rank)]
    for rank, memory in enumerate(planned):
        (line,) = (line for line in job.stdout(rank).splitlines() if line.startswith("MEMORY "))
        expected = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
        assert json.loads(line.removeprefix("MEMORY ")) == expected, f"rank {rank}"
