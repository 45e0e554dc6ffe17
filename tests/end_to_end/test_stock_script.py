"""A stock Megatron script with our `--spec` trains what our own command trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mixmoe_megatron.checkpoint.metadata import read_metadata
from mixmoe_megatron.integrations.stock_megatron import stock_flags
from mixmoe_megatron.machine import Machine
from mixmoe_megatron.methods.registry import phase_of_stage
from tests.end_to_end.conftest import Run
from tests.helpers.conversion import run_conversion
from tests.helpers.forked import Job, run_job
from tests.helpers.tiny_hf import save_tiny_dense
from tests.helpers.training import TINY_RUN, checkpoint_tensors, logged, make_tiny_data, make_tiny_world, train

STEPS = 6


def stock_words(stage: int, parent: Path, data: Path, save: Path, extra: str = "") -> list[str]:
    own = f"--pretrained-checkpoint {parent} --load {save} --save {save} --save-interval 1000 --train-iters {STEPS} "
    own += f"--data-path 1 {data} --data-cache-path {save.parent}/cache {TINY_RUN} {extra}"
    flags = [*Machine().flags(), *stock_flags(stage, own.split()), *own.split()]
    return [
        "tests/helpers/stock_entry.py",
        "--spec",
        "mixmoe_megatron.integrations.stock_megatron",
        f"stage{stage}",
        *flags,
    ]


def run_stock(stage: int, parent: Path, data: Path, save: Path, extra: str = "", processes: int = 1) -> Job:
    return run_job(stock_words(stage, parent, data, save, extra), processes, save.parent / f"{save.name}_logs")


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.fixture(scope="module")
def stock_stage1(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("stock") / "stage1"
    job = run_stock(1, tiny_world / "upcycled", tiny_world / "mono", directory)
    return directory, job.stdout(0)


def test_stage1_gives_the_losses_of_our_own_command(stage1_run: Run, stock_stage1: tuple[Path, str]) -> None:
    directory, output = stock_stage1
    losses, norms = logged(output)
    assert losses == pytest.approx(stage1_run.losses[:STEPS], abs=2e-6)
    assert norms == pytest.approx(stage1_run.norms[:STEPS], abs=2e-3)
    assert len(re.findall(r"lm_load_balancing_loss: [0-9.E+-]+ ", output)) == STEPS
    metadata = read_metadata(directory)
    assert metadata.phase.name == "stage1" and metadata.parent["phase"] == "upcycled"


def test_stage1_moves_the_lm_group_alone(tiny_world: Path, stock_stage1: tuple[Path, str]) -> None:
    before = checkpoint_tensors(tiny_world / "upcycled")
    moved = changed(before, checkpoint_tensors(stock_stage1[0]))
    assert moved == {name for name in before if phase_of_stage(1).is_trained(name)}


def test_stage2_starts_from_stage1_and_moves_the_mt_group_alone(
    tiny_world: Path, stock_stage1: tuple[Path, str], tmp_path: Path
) -> None:
    """Two expert-parallel processes; the parent was written by one."""
    before = checkpoint_tensors(stock_stage1[0])
    extra = "--expert-model-parallel-size 2 --lr 0 --min-lr 0"
    run_stock(2, stock_stage1[0], tiny_world / "pairs", tmp_path / "still", extra, processes=2)
    start = checkpoint_tensors(tmp_path / "still")
    assert not changed(before, start), "learning rate 0"
    twins = {name: name.replace(".mt_experts.", ".lm_experts.").replace(".mt.", ".lm.") for name in start}
    twins = {name: twin for name, twin in twins.items() if name != twin}
    assert twins and all(torch.equal(start[name], start[twin]) for name, twin in twins.items()), "MT := LM"
    job = run_stock(2, stock_stage1[0], tiny_world / "pairs", tmp_path / "stage2")
    assert changed(start, checkpoint_tensors(tmp_path / "stage2")) == {
        name for name in start if phase_of_stage(2).is_trained(name)
    }
    assert "lm_load_balancing_loss" in job.stdout(0) and "mt_load_balancing_loss" in job.stdout(0)


def test_the_same_command_goes_on(tiny_world: Path, stage1_run: Run, tmp_path: Path) -> None:
    words = stock_words(1, tiny_world / "upcycled", tiny_world / "mono", tmp_path / "run", "--exit-interval 4")
    run_job(words, 1, tmp_path / "logs1")
    again = stock_words(1, tiny_world / "upcycled", tiny_world / "mono", tmp_path / "run")
    losses, _ = logged(run_job(again, 1, tmp_path / "logs2").stdout(0))
    fifth, sixth = stage1_run.losses[4:]
    # Megatron logs in a process's second step the mean of its first two losses.
    assert losses == pytest.approx([fifth, (fifth + sixth) / 2], abs=2e-6)


def test_the_schedule_of_the_checkpoint_is_kept_when_asked_for(tiny_world: Path, tmp_path: Path) -> None:
    parent, data, constant = tiny_world / "upcycled", tiny_world / "mono", "--lr-decay-style constant"
    words = stock_words(1, parent, data, tmp_path / "run", f"--exit-interval 2 {constant}")
    run_job(words, 1, tmp_path / "logs1")
    kept = f"{constant} --exit-interval 4 --lr 7e-4 --use-checkpoint-opt_param-scheduler"
    output = run_job(stock_words(1, parent, data, tmp_path / "run", kept), 1, tmp_path / "logs2").stdout(0)
    assert set(re.findall(r"learning rate: (\S+)", output)) == {"1.000000E-03"}


def test_options_come_with_the_checkpoint(tmp_path: Path) -> None:
    make_tiny_world(tmp_path, preset="paper", num_experts_per_group="2", spectral_transform="dct")
    losses, _ = train(1, tmp_path / "upcycled", tmp_path / "mono", None, STEPS)
    job = run_stock(1, tmp_path / "upcycled", tmp_path / "mono", tmp_path / "stock")
    assert logged(job.stdout(0))[0] == pytest.approx(losses, abs=2e-6)
    assert read_metadata(tmp_path / "stock").options["spectral_transform"] == "dct"


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        (1, "--moe-router-topk 2", "moe_router_topk=2 contradicts the Mix-MoE options, which give 1"),
        (1, "--finetune", "give that checkpoint as --pretrained-checkpoint"),
        (2, "", "the checkpoint is of stage 'upcycled', but this step needs 'stage1'"),
    ],
)
def test_refusals(tiny_world: Path, tmp_path: Path, stage: int, change: str, message: str) -> None:
    words = stock_words(1, tiny_world / "upcycled", tiny_world / "mono", tmp_path / "run", change)
    words[words.index("stage1")] = f"stage{stage}"
    job = Job(words, 1, tmp_path / "logs")
    assert job.wait() != [0]
    assert "MixMoEError: " in job.output() and message in job.output()
    assert not (tmp_path / "run").exists()


def test_a_rope_base_that_is_not_whole(tmp_path: Path) -> None:
    """Stock parsers take whole ones only: the flag is left out, and the value comes from the checkpoint."""
    save_tiny_dense(tmp_path / "base", "qwen2", rope_theta=3.5)
    words = ["--hf-dir", tmp_path / "base", "--output-dir", tmp_path / "upcycled", "--moe-every", "2"]
    assert run_conversion("hf_to_mixmoe", *words) == 0
    make_tiny_data(tmp_path, tmp_path / "upcycled" / "tokenizer")
    losses, _ = train(1, tmp_path / "upcycled", tmp_path / "mono", None, 2)
    job = run_stock(1, tmp_path / "upcycled", tmp_path / "mono", tmp_path / "run", "--train-iters 2")
    assert logged(job.stdout(0))[0] == pytest.approx(losses, abs=2e-6)
