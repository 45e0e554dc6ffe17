"""Freezes what a phase does not train (see `methods`), and reports what trains."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import get_attr_wrapped_model

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.base import PARTS, Phase, part_of
from mixmoe_megatron.model.frozen_prefix import run_frozen_layers_ahead

Models = torch.nn.Module | list[torch.nn.Module]
_LAYER = re.compile(r"(\bdecoder\.layers\.)(\d+)\.")


def freeze_for_phase(models: Models, phase: Phase) -> Models:
    """Make a model ready to train a phase: freeze the other parameters, and run the frozen layers below ahead.

    The two steps are `freeze_parameters` and `frozen_prefix.run_frozen_layers_ahead`; call this, or both, before the
    DDP wrapper (as a pre-wrap hook): frozen parameters then get no gradient buffer and no optimizer state.

    Args:
        models: a GPTModel built from this package's specs, or this rank's list of model chunks.
        phase: to train.

    Returns:
        `models`.

    Raises:
        MixMoEError: the model has no part that the phase trains, or was not built from this package's layer specs.
    """
    freeze_parameters(models, phase)
    run_frozen_layers_ahead(_chunks(models), phase)
    return models


def freeze_parameters(models: Models, phase: Phase) -> None:
    """Let exactly the parameters that a phase trains require a gradient.

    Source: Mix-MoE (arXiv:2605.24681) Table I.

    Args:
        models: a GPTModel, or this rank's list of model chunks.
        phase: to train.

    Raises:
        MixMoEError: the model has no part that it trains.
    """
    trains, is_moe = 0, False
    for chunk in _chunks(models):
        decoder = get_attr_wrapped_model(chunk, "decoder")
        numbers = {str(place): layer.layer_number - 1 for place, layer in enumerate(decoder.layers)}
        for name, parameter in chunk.named_parameters():
            name = _LAYER.sub(lambda found, numbers=numbers: f"{found[1]}{numbers[found[2]]}.", name)  # type: ignore[misc]
            parameter.requires_grad_(phase.is_trained(name, getattr(decoder.config, "new_layers", ())))
            trains += parameter.requires_grad
        is_moe |= any(isinstance(module, MoELayer) for module in chunk.modules())
    alone = parallel_state.get_pipeline_model_parallel_world_size() == 1
    if not trains and (alone or is_moe):
        raise MixMoEError(
            f"the model has nothing that the phase {phase.name} trains ({' and '.join(phase.trains)}): "
            "was it built for another phase?"
        )


def _chunks(models: Models) -> list[torch.nn.Module]:
    return models if isinstance(models, list) else [models]


@dataclass
class PartReport:
    """Counts of one part of the model.

    Attributes:
        name: the part, as in Table I ("LM experts", "attention", ...).
        trained: whether it trains.
        tensors: parameter tensors on this rank.
        local: parameters (elements) on this rank.
        total: parameters of the whole model, each counted once across tensor, expert and pipeline ranks.
    """

    name: str
    trained: bool
    tensors: int = 0
    local: int = 0
    total: int = 0


@dataclass
class ParameterReport:
    """What trains and what is frozen.

    Attributes:
        phase: name of the phase that trains.
        parts: one entry per part and trained/frozen, in the model's order.
    """

    phase: str
    parts: list[PartReport]

    def count(self, trained: bool) -> int:
        """Return the parameters of the whole model that train (or that are frozen)."""
        return sum(part.total for part in self.parts if part.trained == trained)

    def table(self) -> str:
        """Return the report as text, a line per part and a last line of totals."""
        lines = [f"{'part':<14}{self.phase:<13}{'tensors here':>13}{'here':>16}{'whole model':>16}"]
        for part in self.parts:
            state = "trained" if part.trained else "frozen"
            lines.append(f"{part.name:<14}{state:<13}{part.tensors:>13}{part.local:>16,}{part.total:>16,}")
        trained, frozen = self.count(True), self.count(False)
        share = 100.0 * trained / max(1, trained + frozen)
        lines.append(f"trained {trained:,} of {trained + frozen:,} parameters ({share:.1f} %)")
        return "\n".join(lines)


def parameter_report(models: Models, phase: Phase) -> ParameterReport:
    """Count trained and frozen parameters by part, on this rank and in the whole model.

    Collective over Megatron's pipeline group: every rank calls it, after Megatron's model parallelism is initialised.

    Args:
        models: a model or this rank's list of model chunks, wrapped or not.
        phase: that trains; its name stands in the report.

    Returns:
        The counts of each part that has parameters anywhere in the model, trained and frozen ones apart.
    """
    parts = {(name, trained): PartReport(name, trained) for name in PARTS for trained in (True, False)}
    for name, parameter in _named_parameters(models):
        part = parts[part_of(name), parameter.requires_grad]
        part.tensors += 1
        part.local += parameter.numel()
        part.total += parameter.numel() * _number_of_shards(parameter)
    totals = torch.tensor([part.total for part in parts.values()], device=torch.cuda.current_device())
    torch.distributed.all_reduce(totals, group=parallel_state.get_pipeline_model_parallel_group())
    for part, total in zip(parts.values(), totals.tolist(), strict=True):
        part.total = total
    return ParameterReport(phase.name, [part for part in parts.values() if part.total])


def _named_parameters(models: Models) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield each parameter once, under its name in the GPTModel. A tied copy of the embedding is left out."""
    for chunk in _chunks(models):
        for name, parameter in chunk.named_parameters():
            is_copy = getattr(parameter, "shared", False) and not get_attr_wrapped_model(chunk, "pre_process")
            if not is_copy:
                yield re.sub(r"^(module\.)+", "", name), parameter


def _number_of_shards(parameter: torch.nn.Parameter) -> int:
    """Return how many ranks hold a different part of this parameter (tensor and expert parallelism)."""
    if getattr(parameter, "allreduce", True):
        split = getattr(parameter, "tensor_model_parallel", False)
        return parallel_state.get_tensor_model_parallel_world_size() if split else 1
    expert_parallel_size = parallel_state.get_expert_model_parallel_world_size()
    return expert_parallel_size * parallel_state.get_expert_tensor_parallel_world_size()
