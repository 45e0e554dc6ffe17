"""Conversion and parallelism: any layout in between keeps every bit; any number of ranks writes the same bytes."""

from __future__ import annotations

import errno
import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.conversion import assert_bit_equal, base_fields, load_weights_of, run_conversion
from tests.helpers.forked import Job, run_job
from tests.helpers.tiny_hf import save_tiny_dense, tiny_mixmoe

FAMILIES = ("llama", "qwen2", "mistral")
KINDS = ("dense", "stage1", "stage2")
MODELS = [
    f"{family}-{'tied' if tied else 'untied'}-{kind}"
    for family in FAMILIES
    for tied in (False, True)
    for kind in KINDS
    if not (family == "mistral" and kind != "dense")  # a Mix-MoE Mistral is a Mix-MoE Llama
]
ESSENTIAL = ["llama-untied-stage2", "qwen2-tied-dense", "qwen2-tied-stage1", "mistral-untied-dense"]
LAYOUTS = {
    "TP2": {"tensor_model_parallel_size": 2},
    "EP2": {"expert_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "TP2xEP2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
}
VOCAB_SIZE = 509  # odd: every tensor-parallel size pads it


def layouts_of(name: str) -> list[str]:
    """The layouts under which a model is saved; a dense one has no experts to spread."""
    return [layout for layout in LAYOUTS if not (name.endswith("dense") and "EP2" in layout)]


def cases(models: list[str]) -> list[tuple[str, str]]:
    return [(name, layout) for name in models for layout in ("checkpoint", *layouts_of(name))]


def convert(root: Path, models: list[str]) -> Path:
    """Write models as Hugging Face directory and checkpoint, and the checkpoints saved again under every layout."""
    jobs = []
    for name in models:
        family, tied, kind = name.split("-")
        hf, checkpoint = root / name / "hf", root / name / "checkpoint"
        fields = {**base_fields(family), "vocab_size": VOCAB_SIZE}
        if kind == "dense":
            save_tiny_dense(hf, family, tied == "tied", tokenizer=None, **fields)
        else:
            tiny_mixmoe(family, int(kind[-1]), tie_word_embeddings=tied == "tied", **fields).save_pretrained(hf)
        flags = ["--dense"] if kind == "dense" else []
        assert run_conversion("hf_to_mixmoe", "--hf-dir", hf, "--output-dir", checkpoint, *flags) == 0
        jobs += [[str(checkpoint), str(root / name / layout), LAYOUTS[layout]] for layout in layouts_of(name)]
    (root / "jobs.json").write_text(json.dumps(jobs))
    run_job(["tests/helpers/resave.py", str(root / "jobs.json")], 2, root / "logs")
    return root


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("converted"), ESSENTIAL)


@pytest.fixture(scope="module")
def all_converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("converted"), MODELS)


@pytest.mark.parametrize(("name", "layout"), cases(ESSENTIAL))
def test_bits_survive_every_layout(converted: Path, tmp_path: Path, name: str, layout: str) -> None:
    checkpoint = converted / name / layout
    assert run_conversion("mixmoe_to_hf", "--checkpoint-dir", checkpoint, "--output-dir", tmp_path / "back") == 0
    assert_bit_equal(load_weights_of(tmp_path / "back"), load_weights_of(converted / name / "hf"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), cases(MODELS))
def test_bits_of_every_model_survive(all_converted: Path, tmp_path: Path, name: str, layout: str) -> None:
    test_bits_survive_every_layout(all_converted, tmp_path, name, layout)


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_share_the_work_and_write_the_same_bytes(converted: Path, tmp_path: Path, processes: int) -> None:
    hf = converted / "qwen2-tied-dense" / "hf"
    there = ["checkpoints_conversion/hf_to_mixmoe.py", "--hf-dir", str(hf), "--output-dir"]
    home = ["checkpoints_conversion/mixmoe_to_hf.py", "--max-shard-size", "40KB", "--checkpoint-dir"]
    small_files = partial(set_file_bytes, 40_000)
    for count in (1, processes):
        job = Job([*there, str(tmp_path / f"m{count}")], count, tmp_path / f"logs{count}", prelude=small_files)
        assert not any(job.wait()), job.output()
        words = [*home, str(tmp_path / f"m{count}"), "--output-dir", str(tmp_path / f"hf{count}")]
        run_job(words, count, tmp_path / f"logs{count}")
    assert len(list((tmp_path / "m1" / "release").glob("*.distcp"))) > processes
    assert len(list((tmp_path / "hf1").glob("*.safetensors"))) > processes
    for kind in ("m", "hf"):
        assert contents(tmp_path / f"{kind}1") == contents(tmp_path / f"{kind}{processes}")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def set_file_bytes(value: int) -> None:
    """Cut a checkpoint into more files than its size asks for."""
    from mixmoe_megatron.checkpoint import torch_dist_writer

    torch_dist_writer._FILE_BYTES = value


def test_a_fault_of_one_rank_ends_all(converted: Path, tmp_path: Path) -> None:
    """The NaN lies in the share of the last rank; both ranks say so, and nothing is left."""
    hf = tmp_path / "in" / "hf"
    model = save_tiny_dense(hf, "qwen2", tokenizer=None)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    model.save_pretrained(hf)
    words = ["checkpoints_conversion/hf_to_mixmoe.py", "--check-finite", "--hf-dir", str(hf), "--output-dir"]
    job = Job([*words, str(tmp_path / "out")], 2, tmp_path / "in" / "logs", prelude=partial(set_file_bytes, 40_000))
    assert job.wait() == [2, 2]
    assert job.output().count("error: lm_head.weight holds values that are NaN or infinite") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def fill_disk_at_the_end() -> None:
    """Let the disk be full when rank 0 alone writes what comes last."""
    write_text = Path.write_text

    def full(path: Path, *words: Any, **named: Any) -> int:
        if path.name in ("metadata.json", "model.safetensors.index.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, *words, **named)

    Path.write_text = full  # type: ignore[method-assign]


@pytest.mark.parametrize("command", ["hf_to_mixmoe", "mixmoe_to_hf"])
def test_a_disk_that_is_full_at_the_end_ends_all(converted: Path, tmp_path: Path, command: str) -> None:
    """Nobody waits for a rank that has given up."""
    model = converted / "llama-untied-stage2"
    given: list[Any] = ["--hf-dir", model / "hf"]
    if command == "mixmoe_to_hf":
        given = ["--checkpoint-dir", model / "checkpoint", "--max-shard-size", "40KB"]
    words = [f"checkpoints_conversion/{command}.py", *map(str, given), "--output-dir", str(tmp_path / "out")]
    job = Job(words, 2, tmp_path / "logs", prelude=fill_disk_at_the_end)
    assert job.wait() == [2, 2]
    assert job.output().count("No space left on device") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def kill_at(number: int) -> None:
    """Let this process be killed when it converts its n-th block, or, for -1, before the result is renamed."""
    from mixmoe_megatron.checkpoint import output_dir
    from mixmoe_megatron.conversion import plan

    blocks, seen = plan.LazyTensor.blocks, []

    def counted(self):  # type: ignore[no-untyped-def]
        for block in blocks(self):
            seen.append(self.name)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            yield block

    plan.LazyTensor.blocks = counted  # type: ignore[method-assign]
    if number < 0:
        output_dir._put_in_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("command", ["hf_to_mixmoe", "mixmoe_to_hf"])
@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.slow), 9, -1])
def test_killed_conversions_leave_nothing_that_looks_finished(
    converted: Path, tmp_path: Path, command: str, number: int
) -> None:
    model, out = converted / "llama-untied-stage2", tmp_path / "out"
    source = ["--hf-dir", model / "hf"] if command == "hf_to_mixmoe" else ["--checkpoint-dir", model / "checkpoint"]
    words = [f"checkpoints_conversion/{command}.py", *map(str, source), "--output-dir", str(out)]
    job = Job(words, 1, tmp_path / "logs", prelude=partial(kill_at, number))
    assert job.wait() == [-signal.SIGKILL]
    assert not out.exists() and list(tmp_path.glob(".out.partial-*"))
    assert run_conversion(command, *source, "--output-dir", out) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "out"]
