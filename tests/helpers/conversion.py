"""What the conversion tests share: a RoPE that Megatron supports, running the commands, comparing weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

#: Llama 3's scaling with the constants that Megatron fixes; it acts from the third of four frequencies on.
MEGATRON_ROPE: dict[str, Any] = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def base_fields(family: str) -> dict[str, Any]:
    """Return the fields that make a tiny config of tests.helpers.tiny_hf one that Megatron supports."""
    return MEGATRON_ROPE if family == "llama" else {}


def run_conversion(command: str, *arguments: str | Path) -> int:
    """Run a command of checkpoints_conversion in this process and return its exit status."""
    return importlib.import_module(f"checkpoints_conversion.{command}").main([str(a) for a in arguments])


def load_weights_of(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of the safetensors files of a directory."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def assert_bit_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Fail unless names, dtypes and every bit agree."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name
