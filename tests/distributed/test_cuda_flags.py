"""The contract with CUDA machines: with exactly the flags that one gets, phases train what they train on a CPU.

{no Transformer Engine, a stand-in} x {no Apex, a stand-in}: the flags of that machine, Megatron's own start-up, dataset
helpers included, the model, the distributed optimizer with both overlaps, checkpoints. CPU mode answers for the device.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.helpers.cuda_machine import become, h100
from tests.helpers.forked import run_job
from tests.helpers.training import checkpoint_tensors, logged, make_tiny_world, run_command, train, train_words

STEPS = 3
CLUSTER = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
SHARED = "llama_moe_v2_residual"
LORA = "lora"
#: whether Apex is there -> the stages that train, and phases; in stage 0 and of a shared expert its kernel computes
#: gradients
RUNS: dict[bool, tuple[int | str, ...]] = {False: (1, 2, LORA), True: (1, 2, 0, SHARED)}
PARENTS = {
    0: ("dense_parent", "mono"), 1: ("upcycled", "mono"), 2: ("stage1", "pairs"), SHARED: ("shared_parent", "mono"),
    LORA: ("lora_parent", "mono"),
}  # fmt: skip
STAGES = {1: "stage1", 2: "stage2", 0: "dense", SHARED: "shared", LORA: "lora"}
WITHOUT_EXPERTS = (0, LORA)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, the parents, data, and the runs with CPU mode's flags: their checkpoints, losses.json."""
    directory = tmp_path_factory.mktemp("cuda_flags")
    make_tiny_world(directory)
    for method, name in (("full", "dense_parent"), (SHARED, "shared_parent"), (LORA, "lora_parent")):
        words = ["--method", method, "--hf-dir", directory / "base", "--output-dir", directory / name]
        run_job(["checkpoints_conversion/hf_to_mixmoe.py", *map(str, words)], 1, directory / f"{name}_logs")
    losses = {}
    for stage, name in STAGES.items():
        parent, data = PARENTS[stage]
        losses[name], _ = train(stage, directory / parent, directory / data, directory / name, STEPS, CLUSTER)
    (directory / "losses.json").write_text(json.dumps(losses))
    return directory


def job_words(world: Path, stage: int | str, extra: str, save: Path) -> list[str]:
    parent, data = PARENTS[stage]
    return train_words(stage, world / parent, world / data, save, STEPS, f"{CLUSTER} {extra}")


def check(world: Path, stage: int | str, save: Path, output: str) -> None:
    """The losses and the trained weights are those of the run with CPU mode's flags."""
    name = STAGES[stage]
    expected = json.loads((world / "losses.json").read_text())[name]
    assert logged(output)[0] == pytest.approx(expected, abs=1e-5)
    tensors, wanted = checkpoint_tensors(save), checkpoint_tensors(world / name)
    assert tensors.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(tensors[key], tensor, atol=2e-5, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("apex", [False, True], ids=["no_apex", "apex"])
def test_without_transformer_engine(world: Path, tmp_path: Path, apex: bool) -> None:
    for stage in RUNS[apex]:
        save = tmp_path / STAGES[stage]
        words = job_words(world, stage, "", save)
        job = run_job(words, 1, Path(f"{save}_logs"), prelude=partial(become, h100(False, apex)))
        assert ("--no-gradient-accumulation-fusion" in job.output()) != apex
        check(world, stage, save, job.stdout(0))


def test_with_transformer_engine(world: Path, tmp_path: Path) -> None:
    """With and without Apex; there also its fused permutation, whose router gradients hang on those of the tokens."""
    runs = [(stage, apex, tmp_path / f"{STAGES[stage]}_{apex}") for apex, stages in RUNS.items() for stage in stages]
    extra = {False: "", True: "--moe-permute-fusion"}
    jobs = [[job_words(world, stage, extra[apex], save), f"{save}_logs", apex] for stage, apex, save in runs]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run_command("-m", "tests.helpers.cuda_machine", tmp_path / "jobs.json")
    for stage, _, save in runs:
        output = "".join(Path(f"{save}_logs", name).read_text("utf-8") for name in ("0.out", "0.err"))
        assert "backend te" in output or stage in WITHOUT_EXPERTS
        check(world, stage, save, output)
