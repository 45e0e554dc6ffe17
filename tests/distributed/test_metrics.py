"""What operators watch is the same under every layout: in the log line, and by layer and expert in TensorBoard."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixmoe_megatron.checkpoint.metadata import read_metadata
from mixmoe_megatron.data.parallel import target_share
from mixmoe_megatron.methods.registry import phase_of_stage
from mixmoe_megatron.model.flops import step_flops
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.model.sizes import model_sizes
from mixmoe_megatron.study.training_log import Curves, read_training_log
from tests.helpers.forked import run_job
from tests.helpers.training import make_tiny_world, train_words

LAYOUTS = {
    "expert parallel 2, recomputed": (
        2,
        "--expert-model-parallel-size 2 "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "pipeline 2, one stage without an MoE layer": (2, "--pipeline-model-parallel-size 2"),
    "tensor parallel 2, sequence parallel": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "expert tensor parallel 2": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2",
    ),
    "data parallel 2, distributed optimizer": (2, "--use-distributed-optimizer"),
    "expert 2 x pipeline 2, recomputed": (
        4,
        "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}
QUICK = ("pipeline 2, one stage without an MoE layer", "tensor parallel 2, sequence parallel")
LOGGED = [1, 2, 4]  # the first step, then every second
RATES = ("tokens_per_second", "tflops_per_rank")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny upcycled model whose last layer alone is an MoE layer, its data, and a checkpoint of stage 1."""
    directory = tmp_path_factory.mktemp("world")
    make_tiny_world(directory, moe_every="4")
    words = train_words(1, directory / "upcycled", directory / "mono", directory / "stage1", 2, "--lr 1e-2")
    run_job(words, 1, directory / "logs")
    return directory


def watch(world: Path, stage: int, run: Path, processes: int = 1, layout: str = "") -> tuple[Curves, Curves]:
    """Train four steps; return what the log line and what TensorBoard tell."""
    parent, data = (("upcycled", "mono"), ("stage1", "pairs"))[stage - 1]
    extra = f"{layout} --log-interval 2 --tensorboard-dir {run}/tensorboard --moe-per-layer-logging"
    job = run_job(train_words(stage, world / parent, world / data, None, 4, extra), processes, run / "logs")
    (run / "log").write_text(job.stdout(processes - 1), "utf-8")
    return read_training_log(run / "log"), read_training_log(run / "tensorboard")


@pytest.fixture(scope="module")
def one_process(world: Path) -> tuple[Curves, Curves]:
    """Stage 2 in one process."""
    return watch(world, 2, world / "one")


def check_equal(ours: Curves, expected: Curves, processes: int) -> None:
    names = [name for name in expected if name.startswith(("lm_", "mt_", "moe_")) and not name.startswith("lm_loss")]
    assert {name.split("_layer_")[0] for name in names} >= {"lm_load_max", "lm_load_entropy", "lm_output_norm"}
    for name in names:
        assert [step for step, _ in ours[name]] == LOGGED
        assert ours[name] == [(step, pytest.approx(value, rel=2e-5)) for step, value in expected[name]], name
    for per_token, one in zip(flops_per_token(ours, processes), flops_per_token(expected, 1), strict=True):
        assert per_token == pytest.approx(one, rel=1e-5)


def flops_per_token(curves: Curves, processes: int) -> list[float]:
    """Operations of a token: they depend on the lengths of the samples, padding left out, and on no layout."""
    tokens, flops = (dict(curves[name]) for name in RATES)
    assert list(tokens) == LOGGED
    return [processes * 1e12 * flops[step] / tokens[step] for step in LOGGED]


@pytest.mark.parametrize(
    "layout", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_every_layout_tells_the_same(
    world: Path, one_process: tuple[Curves, Curves], layout: str, tmp_path: Path
) -> None:
    processes, flags = LAYOUTS[layout]
    for ours, expected in zip(watch(world, 2, tmp_path, processes, flags), one_process, strict=True):
        check_equal(ours, expected, processes)


def test_operations_of_stage_2_count_the_logits_that_are_computed(
    world: Path, one_process: tuple[Curves, Curves]
) -> None:
    metadata = read_metadata(world / "stage1")
    sizes = model_sizes(metadata.megatron_args, MixMoEOptions.from_dict(metadata.options or {}), 2)
    share = target_share([world / "pairs"])
    shortest, longest = (step_flops(sizes, phase_of_stage(2), 1, 1.0, length, loss_share=share) for length in (1, 128))
    assert longest.total < step_flops(sizes, phase_of_stage(2), 1, 1.0, 1).total  # so this can tell
    for per_token in flops_per_token(one_process[0], 1):
        assert shortest.total < per_token < longest.total


def test_stage_1_and_what_tensorboard_gets(world: Path, tmp_path: Path) -> None:
    log, tensorboard = watch(world, 1, tmp_path / "one")
    for ours, expected in zip(watch(world, 1, tmp_path / "two", 2, "--expert-model-parallel-size 2"),
                              (log, tensorboard), strict=True):  # fmt: skip
        check_equal(ours, expected, 2)
    assert not any(name.startswith("mt_") for name in log)
    metadata = read_metadata(world / "upcycled")
    sizes = model_sizes(metadata.megatron_args, MixMoEOptions.from_dict(metadata.options or {}), 1)
    assert flops_per_token(log, 1) == pytest.approx(
        [step_flops(sizes, phase_of_stage(1), 1, 1.0, 32).total] * 3, rel=1e-5
    )
    shares = [dict(tensorboard[f"moe_lm_load_layer_3_expert_{expert}"]) for expert in range(4)]
    for step, largest in log["lm_load_max"]:
        assert sum(share[step] for share in shares) == pytest.approx(1.0, abs=1e-6)
        assert max(share[step] for share in shares) == pytest.approx(largest, rel=1e-5)
