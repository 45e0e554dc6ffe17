"""bfloat16 under every layout: N processes are as near to one as roundings allow, and equal where none differ.

What is compared is each trained tensor's gradient: Adam's first moment after some steps, a mean of clipped gradients.
Rounding to bfloat16 moves it by some percent (noise, measured against float32). Where N processes take sums in another
order, they round otherwise, and both may be that far from float32: twice the noise, 6 to 8 %, is allowed between them.
A sum that is forgotten moves a gradient by about its own size, as the planted errors show. Every token visits all
experts of a group: else roundings change a token's expert here and there, and the noise is 10 to 30 %.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from mixmoe_megatron.hf import register_auto_classes
from mixmoe_megatron.methods.registry import phase_of_stage
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
from tests.helpers.conversion import load_weights_of
from tests.helpers.forked import run_job
from tests.helpers.training import checkpoint_tensors, make_tiny_world, saved_objects, train

STEPS, SAVED = 4, 2
BF16 = "--bf16 "
ALL_EXPERTS = {"moe_every": 2, "topk_per_group": 4}
MOST_NOISE = 0.06  # of bfloat16 against float32 in one process; it was 0.03 to 0.04
EXACT = 1e-6  # of a gradient: the order of float32 sums

#: layout -> (processes, flags)
SAME_SUMS = {
    "PP2": (2, PP),
    "PP2, recompute moe": (2, PP + SELECTIVE + "moe "),
    "PP4, stages that train nothing, overlap": (4, PP4 + OVERLAP),
    "VPP2 PP2, overlap": (2, VPP + OVERLAP),
    "DP2, distributed optimizer, overlap": (2, OVERLAP),
    "DP2 PP2, overlap": (4, PP + OVERLAP),
}
OTHER_SUMS = {
    "TP2 SP": (2, TP),
    "TP2 SP, recompute full": (2, TP + FULL),
    "TP2 ETP2": (2, TP + ETP),
    "TP2 EP2, 2 processes": (2, TP + EP),
    "TP2 EP2, 4 processes": (4, TP + EP + DISTRIBUTED_OPTIMIZER),
    "EP2, recompute moe": (2, EP + SELECTIVE + "moe "),
    "EP2 allgather": (2, EP + ALLGATHER),
    "EP2, distributed optimizer, overlap": (2, EP + OVERLAP),
    "EP2 PP2": (4, EP + PP + DISTRIBUTED_OPTIMIZER),
    "CP2": (2, CP),
    "DP2, gradients reduced in bfloat16": (2, OVERLAP + "--grad-reduce-in-bf16 "),
}
LAYOUTS = SAME_SUMS | OTHER_SUMS
QUICK = [
    ("TP2 SP, recompute full", 1),
    ("DP2, distributed optimizer, overlap", 1),
    ("EP2, recompute moe", 2),
    ("PP2", 2),
]


def quick_or_slow[Case](cases: list[Case], quick: list[Case]) -> list[object]:
    """Mark all cases slow that are not among the quick ones."""
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]  # type: ignore[misc]


class Run(NamedTuple):
    """A run's losses and, by the name of each trained tensor, Adam's first moment; float32."""

    losses: list[float]
    moments: dict[str, torch.Tensor]


class Runs:
    """A tiny model and its data, and runs of one process, each made once."""

    def __init__(self, world: Path):
        self.world = world
        make_tiny_world(world, dtype="bf16", topk_per_group="4")
        self.one = cache(self._one)

    def _one(self, stage: int, flags: str) -> Run:
        return self.train(stage, self.directory(stage, flags), flags)

    def directory(self, stage: int, flags: str) -> Path:
        """Where the checkpoint of a run of one process lies."""
        return self.world / f"stage{stage}{flags}".replace(" ", "")

    def parent(self, stage: int) -> Path:
        """The checkpoint that a stage starts from; that of stage 2 was trained in bfloat16."""
        if stage == 1:
            return self.world / "upcycled"
        self.one(1, BF16)
        return self.directory(1, BF16)

    def train(
        self,
        stage: int,
        save: Path,
        flags: str,
        processes: int = 1,
        parent: Path | None = None,
        prelude: Callable[[], None] | None = None,
    ) -> Run:
        """Train all steps, or go on with what `save` holds."""
        data = self.world / ("mono", "pairs")[stage - 1]
        parent = self.parent(stage) if parent is None else parent
        cached = f"--data-cache-path {self.world}/cache "
        losses, _ = train(stage, parent, data, save, STEPS, COMMON + cached + flags, processes, prelude)
        prefix = "optimizer.state.exp_avg."
        saved = saved_objects(save)
        return Run(losses, {key.removeprefix(prefix): saved[key] for key in saved if key.startswith(prefix)})

    def allowed(self, stage: int, flags: str = "") -> tuple[float, float]:
        """How far apart two runs in bfloat16 may be, in moments and losses."""
        bfloat16, float32 = self.one(stage, BF16 + flags), self.one(stage, flags)
        noise = distance(bfloat16, float32)
        assert 0 < noise < MOST_NOISE
        return 2 * noise, 2 * loss_gap(bfloat16, float32)


def distance(run: Run, expected: Run) -> float:
    """The largest distance of a tensor's moment from the expected one, relative to that."""
    assert run.moments.keys() == expected.moments.keys() and len(run.moments) == 10
    return max(float((run.moments[name] - value).norm() / value.norm()) for name, value in expected.moments.items())


def loss_gap(run: Run, expected: Run) -> float:
    assert len(run.losses) == len(expected.losses)
    return max(abs(a - b) for a, b in zip(run.losses, expected.losses, strict=True))


def assert_near(run: Run, expected: Run, allowed: tuple[float, float]) -> None:
    assert distance(run, expected) < allowed[0]
    assert loss_gap(run, expected) < allowed[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(("layout", "stage"), quick_or_slow([(name, s) for name in LAYOUTS for s in (1, 2)], QUICK))
def test_n_processes_equal_one(runs: Runs, layout: str, stage: int, tmp_path: Path) -> None:
    processes, flags = LAYOUTS[layout]
    run = runs.train(stage, tmp_path / "run", BF16 + flags, processes)
    allowed = (EXACT, 2e-6) if layout in SAME_SUMS else runs.allowed(stage)
    assert_near(run, runs.one(stage, BF16), allowed)
    assert_state(runs.parent(stage), tmp_path / "run", stage)


def assert_state(parent: Path, child: Path, stage: int) -> None:
    """Check the frozen tensors' bits, and that trained tensors alone have float32 copies, rounded in the model."""
    assert_frozen_tensors_kept(parent, child, stage)
    assert_optimizer_state_of_trained_tensors_only(child, phase_of_stage(stage).is_trained)
    saved, trained = saved_objects(child), 0
    distributed = any(key.startswith("optimizer.state.param.") for key in saved)
    main_param = "param" if distributed else "fp32_param"  # as Megatron's optimizers call it
    for name, tensor in checkpoint_tensors(child).items():
        assert tensor.dtype is torch.bfloat16, name
        if phase_of_stage(stage).is_trained(name):
            main = saved[f"optimizer.state.{main_param}.{name}"]
            assert main.dtype is torch.float32 and torch.equal(main.bfloat16(), tensor), name
            trained += not torch.equal(main, tensor.float())
    assert trained == 10, "the float32 copies hold no more digits than the model"


def _no_gradient_sum_over_data_parallel_ranks() -> None:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    _ParamAndGradBucketGroup.start_grad_sync = lambda self, force_all_reduce=False: None


def _no_gradient_sum_of_tensors_that_are_not_sharded() -> None:
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    vars(module)["_allreduce_non_tensor_model_parallel_grads"] = lambda *args: None


def _gradients_stay_on_the_expert_ranks() -> None:
    from megatron.core.tensor_parallel.mappings import _AllToAll

    _AllToAll.backward = staticmethod(lambda ctx, grad: (None, grad, None, None, None))


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (DISTRIBUTED_OPTIMIZER, _no_gradient_sum_over_data_parallel_ranks),
        (TP, _no_gradient_sum_of_tensors_that_are_not_sharded),
        (EP, _gradients_stay_on_the_expert_ranks),
    ],
)
def test_a_planted_error_is_far_outside(runs: Runs, flags: str, error: Callable[[], None], tmp_path: Path) -> None:
    run = runs.train(1, tmp_path / "run", BF16 + flags, processes=2, prelude=error)
    assert distance(run, runs.one(1, BF16)) > 3 * runs.allowed(1)[0]


#: layout -> (processes, flags)
CHANGES = {
    "1": (1, ""),
    "TP2": (2, TP),
    "EP2": (2, EP),
    "PP2": (2, PP),
    "DP2": (2, ""),
    "TP2xEP2": (4, TP + EP),
}
GO_ON = [(1, "TP2", "EP2"), (2, "1", "1")]
GO_ON_SLOWLY = [(1, "1", "PP2"), (2, "EP2", "TP2"), (2, "PP2", "DP2"), (1, "EP2", "TP2xEP2"), (2, "TP2xEP2", "1")]


@pytest.mark.parametrize(("stage", "source", "target"), quick_or_slow(GO_ON + GO_ON_SLOWLY, GO_ON))
def test_goes_on_under_any_layout(runs: Runs, stage: int, source: str, target: str, tmp_path: Path) -> None:
    """Saved after two steps; in its second step a resumed run logs the mean of its first two losses."""
    for layout, more in ((source, f"--exit-interval {SAVED}"), (target, "")):
        processes, flags = CHANGES[layout]
        run = runs.train(stage, tmp_path / "run", BF16 + DISTRIBUTED_OPTIMIZER + flags + more, processes)
    whole = runs.one(stage, BF16)
    losses = [whole.losses[SAVED], (whole.losses[SAVED] + whole.losses[SAVED + 1]) / 2]
    exact = {source, target} <= {"1", "PP2", "DP2"}
    assert_near(run, Run(losses, whole.moments), (EXACT, 2e-6) if exact else runs.allowed(stage))
    assert_state(runs.parent(stage), tmp_path / "run", stage)


def logit_noise(export: Path) -> float:
    """How far an exported model's logits in bfloat16 are from those in float32, relative to the largest."""
    register_auto_classes()
    float32, bfloat16 = (
        AutoModelForCausalLM.from_pretrained(export, dtype=dtype).eval()(torch.arange(64)[None]).logits.detach().float()
        for dtype in (torch.float32, torch.bfloat16)
    )
    return float((bfloat16 - float32).abs().max() / float32.abs().max())


def test_from_and_to_hugging_face(runs: Runs, tmp_path: Path) -> None:
    """A float32 base is rounded at load, the export is the conversion's, its logits as near as roundings allow."""
    run, hf, export = tmp_path / "run", tmp_path / "hf", tmp_path / "export"
    options = json.dumps(ALL_EXPERTS, separators=(",", ":"))
    flags = f"{BF16}--hf-save {hf} --upcycle-options {options}"
    straight = runs.train(1, run, flags, parent=runs.world / "base")
    assert_near(straight, runs.one(1, BF16), (EXACT, 2e-6))

    def convert(command: str, *words: str | Path) -> None:
        words = (f"checkpoints_conversion/{command}.py", "--checkpoint-dir", run, *words)
        run_job([str(word) for word in words], 1, tmp_path / f"{command}{len(words)}")

    convert("mixmoe_to_hf", "--output-dir", export)
    assert contents(hf / f"iter_{STEPS:07}") == contents(export)
    weights = load_weights_of(export)
    assert {value.dtype for name, value in weights.items() if ".router." not in name} == {torch.bfloat16}
    assert {value.dtype for name, value in weights.items() if ".router." in name} == {torch.float32}
    convert("check_parity", "--hf-dir", export)  # of the same weights, computed in float32: 1e-4
    convert("check_parity", "--hf-dir", export, "--dtype", "bf16", "--tolerance", str(2 * logit_noise(export)))
    from_export = runs.train(
        2, tmp_path / "stage2", BF16, parent=export
    )  # the routers are folded, so rounded otherwise
    assert_near(from_export, runs.one(2, BF16), runs.allowed(2))


PACKED_SLOW = {"EP2": EP, "DP2": OVERLAP, "TP2 SP": TP}


@pytest.mark.parametrize(
    "layout", ["PP2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("EP2", "DP2", "TP2 SP"))]
)
def test_packed(runs: Runs, layout: str, tmp_path: Path) -> None:
    flags = ({"PP2": PP} | PACKED_SLOW)[layout]
    run = runs.train(2, tmp_path / "run", BF16 + PACK + flags, processes=2)
    allowed = (EXACT, 2e-6) if layout in ("PP2", "DP2") else runs.allowed(2, PACK)
    assert_near(run, runs.one(2, BF16 + PACK), allowed)
    assert_state(runs.parent(2), tmp_path / "run", 2)


def test_float16_is_nearer_to_float32(runs: Runs, tmp_path: Path) -> None:
    """It has three more digits than bfloat16; the loss scale starts where nothing overflows."""
    run = runs.train(1, tmp_path / "run", "--fp16 --initial-loss-scale 1024")
    noise, gap = runs.allowed(1)
    assert_near(run, runs.one(1, ""), (noise / 3, gap / 3))
