"""Conversions import neither torch nor transformers, which would take most of their time, and open each file once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixmoe_megatron.conversion.exported import mixmoe_config
from mixmoe_megatron.conversion.hf_config import megatron_args_from_hf
from mixmoe_megatron.hf import MixMoEConfig
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.model.sizes import model_sizes
from mixmoe_megatron.model.spectral import fold_router_weight
from tests.helpers.conversion import assert_bit_equal, base_fields, load_weights_of
from tests.helpers.mappings import checkpoint_of
from tests.helpers.tiny_hf import save_tiny_dense, tiny_dense_config

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import collections, importlib, json, sys
opened = collections.Counter()

def listen(event, arguments):
    # builtin open tells its mode, which reads headers and configurations; os.open, which reads values, tells none
    if event == "open" and arguments[1] is not None and isinstance(arguments[0], str):
        opened[arguments[0]] += 1

sys.addaudithook(listen)
main = importlib.import_module("checkpoints_conversion." + sys.argv[1]).main
try:
    status = main(sys.argv[2:])
except SystemExit as end:
    status = end.code
loaded = [name for name in ("torch", "transformers") if name in sys.modules]
print(json.dumps({"status": status, "loaded": loaded, "opened": opened}))
"""


def run_alone(directory: Path, command: str, words: Sequence[str]) -> dict[str, Any]:
    """Run a command in a process of its own; return the files that it opened, and how often."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", RUN, command, *words]
    run = subprocess.run(words, cwd=directory, env=environment, capture_output=True, text=True, check=True)
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["status"] == 0, run.stderr
    assert told["loaded"] == []
    opened: dict[str, Any] = told["opened"]
    return opened


@pytest.mark.parametrize("flags", [["--dense", "--check-finite"], [], ["--dtype", "bf16"]], ids=" ".join)
def test_a_weight_needs_no_torch_there_and_back(tmp_path: Path, flags: list[str]) -> None:
    model = save_tiny_dense(tmp_path / "hf", "llama", tokenizer=None, **base_fields("llama"))
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    (tmp_path / "hf" / "model.safetensors").unlink()
    there = ["--hf-dir", "hf", "--output-dir", "checkpoint", *flags]
    opened = run_alone(tmp_path, "hf_to_mixmoe", there)
    files = [path for path in (tmp_path / "hf").iterdir() if path.suffix in (".safetensors", ".json")]
    read = {path.name: opened[str(path)] for path in files if str(path) in opened}
    read |= {path.name: opened[name] for path in files if (name := f"hf/{path.name}") in opened}
    assert sum(name.endswith(".safetensors") for name in read) > 1
    assert read.keys() >= {"config.json", "model.safetensors.index.json"}
    assert all(times == 1 for name, times in read.items() if name != "generation_config.json"), read
    home = ["--checkpoint-dir", "checkpoint", "--output-dir", "back", "--check-finite"]
    run_alone(tmp_path, "mixmoe_to_hf", home)
    if "--dense" in flags:
        assert_bit_equal(load_weights_of(tmp_path / "back"), load_weights_of(tmp_path / "hf"))


def test_folded_and_random_routers_need_no_torch(tmp_path: Path) -> None:
    save_tiny_dense(tmp_path / "hf", "qwen2", tokenizer=None, dtype=torch.bfloat16)
    words = ["--mt-router-init", "random", "--spectral-transform", "dct", "--moe-every", "2"]
    run_alone(tmp_path, "hf_to_mixmoe", ["--hf-dir", "hf", "--output-dir", "stage1", *words])
    run_alone(tmp_path, "mixmoe_to_hf", ["--checkpoint-dir", "stage1", "--output-dir", "out"])
    held = checkpoint_of(tmp_path / "stage1" / "release")
    router = "decoder.layers.1.mlp.router.lm."
    expected = fold_router_weight(held[router + "weight"], held[router + "spectral_weight"], "dct")
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.router.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("command", ["hf_to_mixmoe", "mixmoe_to_hf", "add_mt_experts", "check_parity"])
def test_help_needs_no_torch(tmp_path: Path, command: str) -> None:
    run_alone(tmp_path, command, ["--help"])


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_an_exports_config_is_what_transformers_would_write(family: str, stage: int) -> None:
    base = tiny_dense_config(family, **base_fields(family)).to_dict()
    options = MixMoEOptions(num_experts_per_group=2, expert_scale=3.0, moe_every=2)
    sizes = model_sizes(megatron_args_from_hf(base), options, stage)
    written = mixmoe_config(base, options, sizes)
    if family == "mistral":
        base |= {"model_type": "llama", "sliding_window": None}
    expected = MixMoEConfig.from_base_config(
        base, moe_layers=[1, 3], stage=stage, num_experts_per_group=2, topk_per_group=1, moe_intermediate_size=32,
        group_combine="mean", router_prob_scaling=True, expert_scale=3.0, router_bias=True, mixmoe=options.to_dict(),
        architectures=["MixMoEForCausalLM"],
    )  # fmt: skip
    assert MixMoEConfig.from_dict(written).to_dict() == expected.to_dict()
    assert {"rope_theta", "rope_scaling", "_name_or_path"}.isdisjoint(written)
