"""Each stage begins where the one before ended, and learns from its first step on."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mixmoe_megatron.checkpoint.megatron_checkpoint import iteration_directory
from mixmoe_megatron.checkpoint.metadata import read_metadata
from mixmoe_megatron.conversion.parity import build_megatron_model, load_weights, single_process
from mixmoe_megatron.data.tokenizers import open_tokenizer
from mixmoe_megatron.methods.mixmoe import STAGE2
from mixmoe_megatron.methods.registry import phase_of_stage
from mixmoe_megatron.model.freezing import freeze_for_phase
from tests.end_to_end.conftest import Run
from tests.helpers.training import TINY_RUN, run_command, train

RECOMPUTE = {
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "selective": "--recompute-granularity selective --recompute-modules moe",
}


def test_stage_2_starts_with_the_logits_of_stage_1(stage1_run: Run) -> None:
    from mixmoe_megatron.training.startup import load_parent

    metadata = read_metadata(stage1_run.directory)
    assert metadata.phase.name == "stage1" and metadata.options is not None
    assert (metadata.options["preset"], metadata.options["group_combine"]) == ("recommended", "mean")
    tokens = torch.randint(0, metadata.megatron_args["vocab_size"], (2, 24))
    positions = torch.arange(24).expand(2, 24)
    with single_process(), torch.no_grad():
        stage1 = build_megatron_model(metadata)
        load_weights(stage1, iteration_directory(stage1_run.directory))
        stage2 = build_megatron_model(dataclasses.replace(metadata, phase=STAGE2))
        for parameter in stage2.parameters():
            parameter.fill_(float("nan"))  # the hook must fill every one
        assert load_parent([stage2], stage1_run.directory, phase_of_stage(2)) == [stage2]
        freeze_for_phase(stage2, phase_of_stage(2))
        end, start = (model(tokens, positions, None) for model in (stage1, stage2))
    assert end.std() > 0.1
    torch.testing.assert_close(start, end, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def first_steps(tiny_world: Path, stage1_run: Run) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of the first step of each stage, without recomputation."""
    losses, norms = train(2, stage1_run.directory, tiny_world / "pairs", None, 1)
    return {1: (stage1_run.losses[0], stage1_run.norms[0]), 2: (losses[0], norms[0])}


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("stage", [1, 2])
def test_the_first_gradient_is_not_zero(
    tiny_world: Path, first_steps: dict[int, tuple[float, float]], stage: int, recompute: str
) -> None:
    parent, data = (("upcycled", "mono"), ("stage1", "pairs"))[stage - 1]
    losses, norms = train(stage, tiny_world / parent, tiny_world / data, None, 1, RECOMPUTE[recompute])
    assert first_steps[stage][1] > 0
    assert (losses[0], norms[0]) == pytest.approx(first_steps[stage], abs=1e-3)


def test_training_stops_when_the_first_gradient_is_zero(tiny_world: Path, tmp_path: Path) -> None:
    """A text of nothing but EOS, none of which counts in the loss."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copyfile(tiny_world / f"mono{suffix}", tmp_path / f"mono{suffix}")
    tokens = np.memmap(tmp_path / "mono.bin", dtype=np.uint16, mode="r+")
    tokens[:] = open_tokenizer(tiny_world / "upcycled" / "tokenizer").eos_id
    tokens.flush()
    done = run_command(
        "tools/pretrain_mixmoe.py", "--mixmoe-stage", "1", "--init-from", tiny_world / "upcycled", "--data-path",
        tmp_path / "mono", "--train-iters", "2", "--eod-mask-loss", "--moe-aux-loss-coeff", "0", *TINY_RUN.split(),
        "--data-cache-path", tmp_path / "cache", check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the gradient of the first step is zero on every rank")


@pytest.mark.parametrize("extra", ["--padded-vocab-size 2048", "--make-vocab-size-divisible-by 1024"])
@pytest.mark.parametrize("base", [False, True], ids=["checkpoint", "Hugging Face"])
def test_rows_that_a_flag_adds_change_nothing(tiny_world: Path, extra: str, base: bool) -> None:
    """They are no tokens: the loss is that of the vocabulary."""
    parent = tiny_world / ("base" if base else "upcycled")
    expected = train(1, parent, tiny_world / "mono", None, 2)
    found = train(1, parent, tiny_world / "mono", None, 2, extra)
    assert found[0] == pytest.approx(expected[0], abs=2e-6) and found[1] == pytest.approx(expected[1], abs=2e-3)
