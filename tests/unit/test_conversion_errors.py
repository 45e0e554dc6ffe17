"""Broken input to the conversion commands: exit status 2, one sentence, nothing left behind."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixmoe_megatron.metadata import read_metadata, write_metadata
from tests.helpers.conversion import base_fields, run_conversion
from tests.helpers.tiny_hf import save_tiny_dense, tiny_mixmoe


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face dense and Mix-MoE directories, and a dense and an upcycled checkpoint."""
    root = tmp_path_factory.mktemp("originals")
    save_tiny_dense(root / "dense", "llama", tokenizer=None, **base_fields("llama"))
    tiny_mixmoe("llama", 1, **base_fields("llama")).save_pretrained(root / "mixmoe")
    for name, flags in (("dense_checkpoint", ["--dense"]), ("upcycled", [])):
        assert run_conversion("hf_to_mixmoe", "--hf-dir", root / "dense", "--output-dir", root / name, *flags) == 0
    return root


def edit_config(directory: Path, **fields) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_metadata(directory: Path, **fields) -> None:
    metadata = read_metadata(directory)
    for name, value in fields.items():
        setattr(metadata, name, value)
    write_metadata(directory, metadata)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def only_pickled(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")


def index_outside(directory: Path) -> None:
    shutil.move(directory / "model.safetensors", directory.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


Q = "model.layers.0.self_attn.q_proj.weight"
IMPORT_CASES: dict[str, tuple[str, Callable[[Path], object], list[str], str]] = {
    "no directory": ("dense", shutil.rmtree, [], "no config.json"),
    "no weights": ("dense", lambda d: (d / "model.safetensors").unlink(), [], "neither model.safetensors"),
    "truncated": ("dense", lambda d: truncate(d / "model.safetensors"), [], "not a whole safetensors file"),
    "pickled": ("dense", only_pickled, [], "pickled weights"),
    "traversal": ("dense", index_outside, [], "not a file of this directory"),
    "architecture": (
        "dense",
        lambda d: edit_config(d, architectures=["GPT2LMHeadModel"]),
        [],
        "GPT2LMHeadModel is not supported",
    ),
    "bias": ("dense", lambda d: edit_config(d, attention_bias=True), [], "attention_bias"),
    "wrong shape": ("dense", lambda d: edit_config(d, num_key_value_heads=4), [], "k_proj.weight has shape"),
    "missing key": ("dense", lambda d: edit_weights(d, lambda t: t.pop(Q)), [], f"lack {Q}"),
    "unused key": ("dense", lambda d: edit_weights(d, lambda t: t.update(x=torch.ones(1))), [], "no mapping uses: x"),
    "dtype": ("dense", lambda d: edit_weights(d, lambda t: t.update({Q: t[Q].to(torch.int8)})), [], "dtype torch.int8"),
    "untied output": (
        "dense",
        lambda d: edit_config(d, tie_word_embeddings=True),
        [],
        "differs from model.embed_tokens",
    ),
    "not divisible": (
        "dense",
        lambda d: None,
        ["--num-experts-per-group", "3"],
        "not divisible by num_experts_per_group=3",
    ),
    "bad option": ("dense", lambda d: None, ["--spectral-transform", "wavelet"], "spectral_transform must be one of"),
    "no MoE layer": ("dense", lambda d: None, ["--moe-every", "9"], "no MoE layer"),
    "option of a dense": ("dense", lambda d: None, ["--dense", "--moe-every", "2"], "leave out --moe-every"),
    "option of a Mix-MoE": ("mixmoe", lambda d: None, ["--preset", "paper"], "leave out --preset"),
    "Mix-MoE kept dense": ("mixmoe", lambda d: None, ["--dense"], "does not go with a Mix-MoE model"),
    "Mix-MoE stage": ("mixmoe", lambda d: edit_config(d, stage=2), [], "has shape"),
    "Mix-MoE bad stage": ("mixmoe", lambda d: edit_config(d, stage=3), [], "stage must be 1 or 2"),
}


@pytest.mark.parametrize("case", IMPORT_CASES)
def test_import(originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    origin, damage, flags, message = IMPORT_CASES[case]
    shutil.copytree(originals / origin, tmp_path / "in" / "hf")
    damage(tmp_path / "in" / "hf")
    assert (
        run_conversion("hf_to_mixmoe", "--hf-dir", tmp_path / "in" / "hf", "--output-dir", tmp_path / "out", *flags)
        == 2
    )
    assert_refused(tmp_path, capsys, message)


def assert_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str) -> None:
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and not shown.out
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


class Exploit:
    """Unpickled naively, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def poison(directory: Path) -> None:
    (directory / "release" / ".metadata").write_bytes(pickle.dumps(Exploit(directory.parent.parent / "exploited")))


SHARD = Path("release") / "__0_0.distcp"
EXPORT_CASES: dict[str, tuple[str, Callable[[Path], object], list[str], str]] = {
    "no directory": ("upcycled", shutil.rmtree, [], "no mixmoe_metadata.json"),
    "no tracker": (
        "upcycled",
        lambda d: (d / "latest_checkpointed_iteration.txt").unlink(),
        [],
        "saving was interrupted",
    ),
    "bad tracker": (
        "upcycled",
        lambda d: (d / "latest_checkpointed_iteration.txt").write_text("x"),
        [],
        "expected a number",
    ),
    "no iteration": ("upcycled", lambda d: None, ["--iteration", "7"], "iter_0000007 does not exist"),
    "no .metadata": ("upcycled", lambda d: (d / "release" / ".metadata").unlink(), [], ".metadata is missing"),
    "damaged .metadata": ("upcycled", lambda d: truncate(d / "release" / ".metadata"), [], "cannot be read"),
    "poisoned .metadata": ("upcycled", poison, [], "not allowed"),
    "no shard": ("upcycled", lambda d: (d / SHARD).unlink(), [], "lacks __0_0.distcp, which holds"),
    "damaged shard": ("upcycled", lambda d: (d / SHARD).write_bytes(b"x" * 999), [], "is truncated: it ends before"),
    "stage 2 of stage 1": ("upcycled", lambda d: edit_metadata(d, stage="stage2"), [], "hold LM experts only"),
    "dense of Mix-MoE": (
        "upcycled",
        lambda d: edit_metadata(d, stage="dense", options=None),
        [],
        "hold LM experts only",
    ),
    "layers": ("dense_checkpoint", lambda d: edit_metadata_args(d, num_layers=5), [], "lack decoder.layers.4"),
    "contradiction": ("dense_checkpoint", lambda d: edit_metadata_args(d, norm_epsilon=0.5), [], "norm_epsilon is 0.5"),
    "small vocabulary": (
        "dense_checkpoint",
        lambda d: edit_metadata_args(d, vocab_size=600),
        [],
        "fewer than the vocabulary",
    ),
    "bad size": ("upcycled", lambda d: None, ["--max-shard-size", "big"], "not a size"),
}


def edit_metadata_args(directory: Path, **fields) -> None:
    edit_metadata(directory, megatron_args={**read_metadata(directory).megatron_args, **fields})


@pytest.mark.parametrize("case", EXPORT_CASES)
def test_export(originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    origin, damage, flags, message = EXPORT_CASES[case]
    shutil.copytree(originals / origin, tmp_path / "in" / "m")
    damage(tmp_path / "in" / "m")
    arguments = ["--checkpoint-dir", tmp_path / "in" / "m", "--output-dir", tmp_path / "out", *flags]
    assert run_conversion("mixmoe_to_hf", *arguments) == 2
    assert_refused(tmp_path, capsys, message)


@pytest.mark.parametrize("command", ["hf_to_mixmoe", "mixmoe_to_hf"])
def test_existing_output_is_kept_unless_forced(originals: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    source = (
        ["--hf-dir", originals / "dense"] if command == "hf_to_mixmoe" else ["--checkpoint-dir", originals / "upcycled"]
    )
    assert run_conversion(command, *source, "--output-dir", tmp_path / "out") == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    assert run_conversion(command, *source, "--output-dir", tmp_path / "out", "--force") == 0
    assert not (tmp_path / "out" / "precious").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]
