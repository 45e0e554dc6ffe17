"""LoRA between Megatron and Hugging Face: merged into the dense model, or as a PEFT adapter directory, both ways.

Source: PEFT 0.17, the files that `PeftModel.from_pretrained` reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixmoe_megatron.checkpoint.bits import Bits, from_float32, to_float32
from mixmoe_megatron.checkpoint.hf_files import own_file
from mixmoe_megatron.checkpoint.safetensors_io import SafetensorsReader
from mixmoe_megatron.checkpoint.stored import Region, whole
from mixmoe_megatron.checkpoint.tensors import LazyTensor, TensorSource
from mixmoe_megatron.conversion.hf_config import ADAPTER_FILE
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.lora import LoRAOptions
from mixmoe_megatron.model.mapping import LORA_LAYERS
from mixmoe_megatron.model.upcycling import Array

ADAPTER_WEIGHTS = "adapter_model.safetensors"
#: names of a checkpoint's tensors that are LoRA's
IS_LORA = re.compile(r"\.lora\.")
NOT_LORA = re.compile(r"^(?!.*\.lora\.)")
_PROJECTION = re.compile(r"model\.layers\.(\d+)\.(.+_proj)\.weight")
_IN_MEGATRON = {hf: megatron for megatron, hf, _ in LORA_LAYERS}
_TARGETS = [hf.rpartition(".")[2] for hf in _IN_MEGATRON]
#: fields of adapter_config.json that change what is computed -> the values that are taken
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"), "use_rslora": (None, False), "use_dora": (None, False), "fan_in_fan_out": (None, False),
    "rank_pattern": (None, {}), "alpha_pattern": (None, {}), "layers_to_transform": (None,), "modules_to_save": (None,),
    "layer_replication": (None,), "target_parameters": (None, []), "trainable_token_indices": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class _Merged:
    """Reads a weight of the dense model with LoRA added to it, in float32, and rounds it once."""

    dense: LazyTensor
    source: TensorSource
    prefix: str
    scale: float

    def __call__(self, region: Region) -> Bits:
        weight = to_float32(self.dense.read(region), self.dense.dtype)
        low = self._matrix("b", 0, region[0]) @ self._matrix("a", 1, region[1])
        return from_float32(weight + np.float32(self.scale) * low, self.dense.dtype)

    def _matrix(self, kind: str, axis: int, part: slice) -> Array:
        name = f"{self.prefix}_{kind}"
        region = list(whole(self.source.shape(name)))
        region[axis] = part
        return to_float32(self.source.read_region(name, tuple(region)), self.source.dtype(name))


def merged(plan: list[LazyTensor], source: TensorSource, options: LoRAOptions) -> Iterator[LazyTensor]:
    """Yield the tensors of the dense model, W + (alpha / rank) B A in the place of each W that has LoRA.

    Args:
        plan: of the dense model, by Hugging Face names.
        source: the checkpoint.
        options: LoRA's.
    """
    for tensor in plan:
        found = _PROJECTION.fullmatch(tensor.name)
        if found is None:
            yield tensor
        else:
            prefix = f"decoder.layers.{found[1]}.{_IN_MEGATRON[found[2]]}"
            yield LazyTensor(tensor.name, tensor.shape, tensor.dtype, _Merged(tensor, source, prefix, options.scale))


def adapter_config(options: LoRAOptions, base_model: str | None) -> dict[str, Any]:
    """Return adapter_config.json.

    Args:
        options: LoRA's.
        base_model: name of the dense base model, if it has one.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": options.lora_rank,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": _TARGETS,
        "bias": "none",
        "inference_mode": True,
    }


def read_adapter_options(directory: str | Path) -> LoRAOptions:
    """Return rank and alpha of a PEFT adapter.

    Raises:
        MixMoEError: it is not LoRA on all linear layers but the output layer, or computes something else.
    """
    try:
        config = json.loads(own_file(directory, ADAPTER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MixMoEError(f"{directory} has no {ADAPTER_FILE} that can be read ({error}).") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise MixMoEError(f"{ADAPTER_FILE} in {directory} is not one of LoRA.")
    for name, allowed in _PLAIN.items():
        if config.get(name) not in allowed:
            raise MixMoEError(f"{ADAPTER_FILE}: {name} = {config[name]!r} is not supported.")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or set(targets) != set(_TARGETS):
        raise MixMoEError(f"{ADAPTER_FILE}: target_modules must be {', '.join(_TARGETS)}, not {targets!r}.")
    return LoRAOptions(config.get("r"), config.get("lora_alpha"))  # type: ignore[arg-type]  # it checks them


class AdaptedSource:
    """The tensors of a dense model and those of a PEFT adapter as one source.

    Args:
        base: of the dense model.
        directory: of the adapter.

    Raises:
        MixMoEError: the adapter's weights are missing or damaged.
    """

    def __init__(self, base: TensorSource, directory: str | Path) -> None:
        self._base, self._adapter = base, SafetensorsReader(directory, ADAPTER_WEIGHTS)

    def names(self) -> Collection[str]:
        """Return the names of all tensors."""
        return [*self._base.names(), *self._adapter.names()]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._of(name).shape(name)

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype."""
        return self._of(name).dtype(name)

    def read_region(self, name: str, region: Region) -> Bits:
        """Return the bits of a region. Raises what the sources raise."""
        return self._of(name).read_region(name, region)

    def _of(self, name: str) -> TensorSource:
        return self._adapter if name in self._adapter.names() else self._base
