"""What a dense model becomes at the start of a method, from its config.json alone: no weights are read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mixmoe_megatron.conversion.deeper import with_new_blocks
from mixmoe_megatron.conversion.hf_config import megatron_args_from_hf
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.base import Phase
from mixmoe_megatron.methods.lora import LoRAOptions
from mixmoe_megatron.methods.registry import method_of
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.model.sizes import ModelDescription


def describe_start(
    config: dict[str, Any],
    phase: Phase,
    *,
    options: MixMoEOptions | None = None,
    new_blocks: int | None = None,
    lora: LoRAOptions | None = None,
) -> ModelDescription:
    """Return the model of a phase, as its method makes it of a dense one.

    Args:
        config: config.json of the dense model.
        phase: of any method.
        options: of a phase with experts; None: the method's.
        new_blocks: how many blocks a phase with new layers adds; None: as the method has it.
        lora: of a phase with adapters; None: the defaults.

    Raises:
        MixMoEError: the model is not supported, or something is given that the phase has no use for.
    """
    if new_blocks is not None and not phase.has_new_layers:
        raise MixMoEError("--new-blocks goes with a method that adds layers to the base, such as llama_pro.")
    if lora is not None and not phase.has_adapters:
        raise MixMoEError("--adapter, --lora-rank and --lora-alpha go with --method lora.")
    if phase.groups and options is None:
        options = MixMoEOptions.from_preset("recommended", **method_of(phase).options)
    layers: tuple[int, ...] = ()
    if phase.has_new_layers:
        config, layers = with_new_blocks(config, new_blocks)
    model = ModelDescription(config, megatron_args_from_hf(config), options if phase.groups else None, phase)
    return replace(model, new_layers=layers, lora=(lora or LoRAOptions()) if phase.has_adapters else None)
