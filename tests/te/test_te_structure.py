"""The model on Transformer Engine's modules is the torch one in all but its kernels: parts, freezing, checkpoints."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.forked import run_job
from tests.helpers.training import ROOT, checkpoint_tensors, make_tiny_world, run_command, train_words

LAYOUTS = {
    "one process": {},
    "EP2": {"expert_model_parallel_size": 2},
    "TP2": {"tensor_model_parallel_size": 2},
}
RUNS = {"stage1": ("upcycled", "mono"), "stage2": ("stage1", "pairs"), "lora": ("adapted", "mono")}
TRAINED = {
    "stage1": {"LM experts", "LM routers"}, "stage2": {"MT experts", "MT routers"}, "lora": {"adapters"}
}  # fmt: skip


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, upcycled/, data, and one run each of stage 1, stage 2 and LoRA with the torch backend."""
    directory = tmp_path_factory.mktemp("te")
    make_tiny_world(directory)
    words = ["--method", "lora", "--hf-dir", directory / "base", "--output-dir", directory / "adapted"]
    run_command("checkpoints_conversion/hf_to_mixmoe.py", *words)
    for phase, (parent, data) in RUNS.items():
        words = train_words(phase, directory / parent, directory / data, directory / str(phase), 2)
        # Where Transformer Engine is installed Megatron takes its optimizer kernels, which need a GPU.
        subprocess.run([".venv/bin/python", *words], cwd=ROOT, check=True, capture_output=True, timeout=280)
    return directory


@pytest.fixture(scope="session", params=LAYOUTS)
def exchanged(request: pytest.FixtureRequest, world: Path) -> Path:
    """Checkpoints of all runs, and stage 2's start, taken through Transformer Engine under a layout."""
    output = world / request.param.replace(" ", "_")
    output.mkdir()
    jobs = [("stage1", "start2", "stage2"), *((phase, phase, phase) for phase in RUNS)]
    layout = LAYOUTS[request.param]
    listed = [[str(world / source), str(output / name), phase, layout] for source, name, phase in jobs]
    (output / "jobs.json").write_text(json.dumps(listed))
    run_job(["tests/te/exchange.py", str(output / "jobs.json")], 2 if layout else 1, output / "logs")
    return output


def seen(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]


@pytest.mark.parametrize("phase", RUNS)
def test_the_same_parts_train(exchanged: Path, phase: str) -> None:
    modules = {"TEGroupedMLP", "TELayerNormColumnParallelLinear"}
    if phase == "lora":
        modules = {"TELoRAColumnParallelLinear", "TELoRARowParallelLinear"}
    for rank in seen(exchanged / phase):
        assert rank["te"]["parts"] == rank["torch"]["parts"]
        assert {name for name, part in rank["te"]["parts"].items() if part[0]} == TRAINED[phase]
        assert {*modules, "TEDotProductAttention"} <= set(rank["te"]["modules"])
        assert not any("TE" in name for name in rank["torch"]["modules"])


@pytest.mark.parametrize("phase", RUNS)
def test_checkpoints_have_the_same_keys_shapes_and_offsets(exchanged: Path, phase: str) -> None:
    """A rank's experts may be cut into other pieces (one an expert, one a rank); together they cover the same."""
    for rank in seen(exchanged / phase):
        te, torch_pieces = rank["te"]["pieces"], rank["torch"]["pieces"]
        assert te.keys() == torch_pieces.keys()
        for key, pieces in te.items():
            if ".experts.experts." in key or "_experts.experts." in key:
                assert covered(pieces) == covered(torch_pieces[key]), key
            else:
                assert pieces == torch_pieces[key], key


def covered(pieces: list[Any]) -> Counter[tuple[Any, ...]]:
    """The single experts that the pieces hold: global shape, offset behind the expert axis, shape, type, expert."""
    result: Counter[tuple[Any, ...]] = Counter()
    for shape, offset, local, dtype in pieces:
        experts = local[0] if len(local) == len(shape) else 1
        for expert in range(experts):
            result[*shape, *offset[1:], *local[-2:], dtype, offset[0] + expert] += 1
    return result


@pytest.mark.parametrize("phase", RUNS)
def test_weights_go_through_and_back_bit_by_bit(world: Path, exchanged: Path, phase: str) -> None:
    written = checkpoint_tensors(world / phase)
    for implementation in ("te", "torch"):
        read = checkpoint_tensors(exchanged / phase / implementation)
        assert read.keys() == written.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in written.items())


def test_stage2_starts_from_stage1(world: Path, exchanged: Path) -> None:
    parent, start = checkpoint_tensors(world / "stage1"), checkpoint_tensors(exchanged / "start2" / "te")
    assert all(torch.equal(start[name], tensor) for name, tensor in parent.items())
    twins = {name: name.replace(".mt_experts.", ".lm_experts.").replace(".mt.", ".lm.") for name in start}
    copies = {name: twin for name, twin in twins.items() if name != twin}
    assert len(copies) == len(start) - len(parent) > 0
    assert all(torch.equal(start[name], start[twin]) for name, twin in copies.items())


@pytest.mark.parametrize("phase", RUNS)
def test_export_to_hugging_face(world: Path, exchanged: Path, tmp_path: Path, phase: str) -> None:
    for name, source in (("torch", world / phase), ("te", exchanged / phase / "te")):
        run_command(
            "checkpoints_conversion/mixmoe_to_hf.py", "--checkpoint-dir", source, "--output-dir", tmp_path / name
        )
    tensors, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("te", "torch"))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("phase", RUNS)
def test_the_training_command_builds_it(world: Path, tmp_path: Path, phase: str) -> None:
    """The real command up to the first step: its flags, the parent's weights, the report of what trains."""
    parent, data = RUNS[phase]
    flags = "" if phase == "lora" else "--expert-model-parallel-size 2"
    words = train_words(phase, world / parent, world / data, None, 1, f"--dry-run {flags}")
    tables = {}
    for name, extra in (("torch", []), ("te", ["--transformer-impl", "transformer_engine"])):
        script = "tests/te/dry_run.py" if extra else words[0]
        output = run_job([script, *words[1:], *extra], 2, tmp_path / name).output()
        assert ("backend te" in output) == (bool(extra) and phase != "lora")
        # A stacked weight is one tensor, a grouped linear of Transformer Engine one an expert: counts of elements only.
        rows = [line.split() for line in output.splitlines() if " trained " in line or " frozen " in line]
        tables[name] = [row[:-3] + row[-2:] for row in rows]
    assert tables["te"] == tables["torch"] and len(tables["te"]) >= (4 if phase == "lora" else 6)
