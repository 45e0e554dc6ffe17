"""Freezes what a phase does not train (see `methods`), reports it, and fingerprints weights for bit-identity checks."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import get_attr_wrapped_model

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.base import PARTS, part_of
from mixmoe_megatron.methods.registry import phase_of_stage
from mixmoe_megatron.model.frozen_prefix import set_frozen_prefix

Models = torch.nn.Module | list[torch.nn.Module]


def is_trained(name: str, stage: int) -> bool:
    """Whether a parameter trains in the phase of a stage, by its name in a GPTModel.

    Raises:
        MixMoEError: the stage is not 0, 1 or 2.
    """
    return phase_of_stage(stage).is_trained(name)


def freeze_for_stage(models: Models, stage: int) -> Models:
    """Set requires_grad by the stage, and run the frozen layers below the first MoE layer without a graph.

    Call it before the DDP wrapper (as a pre-wrap hook): frozen parameters then get no gradient buffer and no optimizer
    state. See `frozen_prefix` for what happens below the first MoE layer.

    Args:
        models: a GPTModel built from this package's specs, or this rank's list of model chunks.
        stage: 0, 1 or 2.

    Returns:
        `models`.

    Raises:
        MixMoEError: the stage is unknown, or the model has no part that it trains.
    """
    chunks = models if isinstance(models, list) else [models]
    trains = 0
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(is_trained(name, stage))
            trains += parameter.requires_grad
        decoder = get_attr_wrapped_model(chunk, "decoder")
        set_frozen_prefix(decoder, _first_moe_layer(decoder) if stage else None)
    has_moe_layer = any(isinstance(module, MoELayer) for chunk in chunks for module in chunk.modules())
    if not trains and (has_moe_layer or _pipeline_size() == 1):
        raise MixMoEError(
            f"the model has nothing that stage {stage} trains ({' and '.join(phase_of_stage(stage).trains)}): "
            "was it built for another stage?"
        )
    return models


def _first_moe_layer(decoder: torch.nn.Module) -> int:
    """Return the 0-based global index of the model's first MoE layer, which may lie on another pipeline stage."""
    frequency: int | list[int] = decoder.config.moe_layer_freq  # type: ignore[union-attr,assignment]
    return frequency.index(1) if isinstance(frequency, list) else 0


def _pipeline_size() -> int:
    return parallel_state.get_pipeline_model_parallel_world_size() if parallel_state.is_initialized() else 1


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
    parts: list[PartReport] = field(default_factory=list)

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

    Collective over the pipeline group when Megatron's model parallelism is initialised: every rank calls it.

    Args:
        models: a model or this rank's list of model chunks, wrapped or not.
        stage: 0, 1 or 2; recorded.
    """
    counts: defaultdict[tuple[str, bool], list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, parameter in _named_parameters(models):
        count = counts[part_of(name), parameter.requires_grad]
        count[0] += 1
        count[1] += parameter.numel()
        count[2] += parameter.numel() * _number_of_shards(parameter)
    keys = [(part, trained) for part in PARTS for trained in (True, False)]
    totals = _sum_over_pipeline([counts[key][2] if key in counts else 0 for key in keys])
    report = ParameterReport(stage)
    for key, total in zip(keys, totals, strict=True):
        tensors, local, _ = counts.get(key, (0, 0, 0))
        if total or tensors:
            report.parts.append(PartReport(*key, tensors, local, total))
    return report


def _named_parameters(models: Models) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield each parameter once, under its name in the GPTModel. A tied copy of the embedding is left out."""
    for chunk in models if isinstance(models, list) else [models]:
        for name, parameter in chunk.named_parameters():
            is_copy = getattr(parameter, "shared", False) and not get_attr_wrapped_model(chunk, "pre_process")
            if not is_copy:
                yield re.sub(r"^(module\.)+", "", name), parameter


def _number_of_shards(parameter: torch.nn.Parameter) -> int:
    """Return how many ranks hold a different part of this parameter (tensor and expert parallelism)."""
    if not parallel_state.is_initialized():
        return 1
    if _is_expert(parameter):
        return (
            parallel_state.get_expert_model_parallel_world_size()
            * parallel_state.get_expert_tensor_parallel_world_size()
        )
    split = getattr(parameter, "tensor_model_parallel", False)
    return parallel_state.get_tensor_model_parallel_world_size() if split else 1


def _is_expert(parameter: torch.nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)


def _sum_over_pipeline(values: Iterable[int]) -> list[int]:
    values = list(values)
    if _pipeline_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.long, device=torch.cuda.current_device())
    torch.distributed.all_reduce(tensor, group=parallel_state.get_pipeline_model_parallel_group())
    return tensor.tolist()


def fingerprint(models: Models) -> dict[str, str]:
    """Return a SHA-256 of each parameter's and buffer's name, dtype, shape and bits on this rank.

    Two equal fingerprints mean bit-identical tensors: the check that frozen parameters did not move.

    Args:
        models: a model or this rank's list of model chunks, wrapped or not; chunk c's names start with "c/".
    """
    result = {}
    for index, chunk in enumerate(models if isinstance(models, list) else [models]):
        prefix = f"{index}/" if isinstance(models, list) else ""
        for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
            name = re.sub(r"^(module\.)+", "", name)
            digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            result[prefix + name] = digest.hexdigest()
    return result
