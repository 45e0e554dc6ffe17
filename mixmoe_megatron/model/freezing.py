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
from mixmoe_megatron.methods.base import PARTS, part_of
from mixmoe_megatron.methods.registry import phase_of_stage
from mixmoe_megatron.model.frozen_prefix import run_frozen_layers_ahead

Models = torch.nn.Module | list[torch.nn.Module]


def is_trained(name: str, stage: int) -> bool:
    """Whether a parameter trains in the phase of a stage, by its name in a GPTModel.

    Raises:
        MixMoEError: the stage is not 0, 1 or 2.
    """
    return phase_of_stage(stage).is_trained(name)


def freeze_for_stage(models: Models, stage: int) -> Models:
    """Make a model ready to train a stage: freeze the other parameters, and run the frozen layers below ahead.

    The two steps are `freeze_parameters` and `frozen_prefix.run_frozen_layers_ahead`; call this, or both, before the
    DDP wrapper (as a pre-wrap hook): frozen parameters then get no gradient buffer and no optimizer state.

    Args:
        models: a GPTModel built from this package's specs, or this rank's list of model chunks.
        stage: 0, 1 or 2.

    Returns:
        `models`.

    Raises:
        MixMoEError: the stage is unknown, the model has no part that it trains, or it was not built from this
            package's layer specs.
    """
    freeze_parameters(models, stage)
    run_frozen_layers_ahead(_chunks(models), stage)
    return models


def freeze_parameters(models: Models, stage: int) -> None:
    """Let exactly the parameters that the stage trains require a gradient.

    Source: Mix-MoE (arXiv:2605.24681) Table I.

    Args:
        models: a GPTModel, or this rank's list of model chunks.
        stage: 0, 1 or 2.

    Raises:
        MixMoEError: the stage is unknown, or the model has no part that it trains.
    """
    modules = [module for chunk in _chunks(models) for module in chunk.modules()]
    trains = 0
    for chunk in _chunks(models):
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(is_trained(name, stage))
            trains += parameter.requires_grad
    alone = parallel_state.get_pipeline_model_parallel_world_size() == 1
    if not trains and (alone or any(isinstance(module, MoELayer) for module in modules)):
        raise MixMoEError(
            f"the model has nothing that stage {stage} trains ({' and '.join(phase_of_stage(stage).trains)}): "
            "was it built for another stage?"
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
        stage: 0, 1 or 2.
        parts: one entry per part and trained/frozen, in the model's order.
    """

    stage: int
    parts: list[PartReport]

    def count(self, trained: bool) -> int:
        """Return the parameters of the whole model that train (or that are frozen)."""
        return sum(part.total for part in self.parts if part.trained == trained)

    def table(self) -> str:
        """Return the report as text, a line per part and a last line of totals."""
        lines = [f"{'part':<14}{'stage ' + str(self.stage):<10}{'tensors here':>13}{'here':>16}{'whole model':>16}"]
        for part in self.parts:
            state = "trained" if part.trained else "frozen"
            lines.append(f"{part.name:<14}{state:<10}{part.tensors:>13}{part.local:>16,}{part.total:>16,}")
        trained, frozen = self.count(True), self.count(False)
        share = 100.0 * trained / max(1, trained + frozen)
        lines.append(f"trained {trained:,} of {trained + frozen:,} parameters ({share:.1f} %)")
        return "\n".join(lines)


def parameter_report(models: Models, stage: int) -> ParameterReport:
    """Count trained and frozen parameters by part, on this rank and in the whole model.

    Collective over Megatron's pipeline group: every rank calls it, after Megatron's model parallelism is initialised.

    Args:
        models: a model or this rank's list of model chunks, wrapped or not.
        stage: 0, 1 or 2; it stands in the report.

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
    return ParameterReport(stage, [part for part in parts.values() if part.total])


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
