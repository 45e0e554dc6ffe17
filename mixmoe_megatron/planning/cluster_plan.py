"""The plan: every layout with its memory, traffic and time, those that fit first, the fastest of them first."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model.sizes import ModelDescription
from mixmoe_megatron.planning.activations import activation_bytes
from mixmoe_megatron.planning.costs import GPUS, Cluster, Costs, step_costs
from mixmoe_megatron.planning.layouts import Batch, ParallelLayout, layouts
from mixmoe_megatron.planning.memory import Memory, stage_memory

#: Bytes of a GPU that are not the model's: CUDA, NCCL, kernels' workspaces, fragmentation.
RESERVE = 3 * 1024**3


@dataclass(frozen=True)
class Candidate:
    """A layout and what it costs.

    Attributes:
        layout: the parallel sizes.
        micro_batches: of a step.
        memory: of the rank that needs most.
        costs: of a step.
    """

    layout: ParallelLayout
    micro_batches: int
    memory: Memory
    costs: Costs

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values: bytes and seconds."""
        memory = {**asdict(self.memory), "total": self.memory.total}
        return {
            "layout": asdict(self.layout),
            "micro_batches": self.micro_batches,
            "memory_bytes": memory,
            "traffic_bytes": self.costs.traffic,
            "seconds": {
                "compute": self.costs.compute, "communication": self.costs.communication, "step": self.costs.seconds,
            },
            "flags": self.layout.flags(),
        }  # fmt: skip


def plan_layouts(model: ModelDescription, batch: Batch, cluster: Cluster) -> list[Candidate]:
    """Return the layouts that fit, the fastest first.

    Args:
        model: the model.
        batch: the batch.
        cluster: the GPUs.

    Raises:
        MixMoEError: no layout divides the model, or none fits; the message says what would help.
    """
    candidates = _candidates(model, batch, cluster)
    if not candidates:
        raise MixMoEError(
            f"no layout of {cluster.gpus} GPUs divides the model and a global batch of {batch.global_batch_size} with "
            f"micro-batches of {batch.micro_batch_size}: {_what_divides(model, batch, cluster)}."
        )
    fitting = [candidate for candidate in candidates if candidate.memory.total <= usable_memory(cluster)]
    if not fitting:
        least = min(candidates, key=lambda candidate: candidate.memory.total)
        raise MixMoEError(
            f"nothing fits: the smallest layout ({least.layout}) needs {least.memory.total / 1024**3:.1f} GiB a GPU, "
            f"{usable_memory(cluster) / 1024**3:.1f} are usable; {_what_fits(model, batch, cluster)}."
        )
    return sorted(fitting, key=lambda candidate: (candidate.costs.seconds, candidate.memory.total))


def usable_memory(cluster: Cluster) -> int:
    """Bytes of a GPU that a model can have."""
    return cluster.gpu.memory - RESERVE


def _candidates(model: ModelDescription, batch: Batch, cluster: Cluster) -> list[Candidate]:
    candidates = []
    for layout in layouts(model, batch, cluster.gpus, cluster.gpus_per_node):
        memory, costs = rank_memory(model, layout, batch), step_costs(model, layout, batch, cluster)
        candidates.append(Candidate(layout, layout.micro_batches(batch), memory, costs))
    return candidates


def rank_memory(model: ModelDescription, layout: ParallelLayout, batch: Batch) -> Memory:
    """Return the memory of the rank that needs most."""
    stages = []
    for pp_rank in range(layout.pp):
        largest = max(stage_memory(model, layout, batch, pp_rank), key=lambda memory: memory.total)
        stages.append(replace(largest, activations=activation_bytes(model, layout, batch, pp_rank)))
    return max(stages, key=lambda memory: memory.total)


def _fits(model: ModelDescription, batch: Batch, cluster: Cluster) -> bool:
    fits = (rank_memory(model, layout, batch) for layout in layouts(model, batch, cluster.gpus, cluster.gpus_per_node))
    return any(memory.total <= usable_memory(cluster) for memory in fits)


def _what_fits(model: ModelDescription, batch: Batch, cluster: Cluster) -> str:
    """One change of the batch or the cluster with which a layout fits, the cheapest first."""
    smallest, flags = replace(batch, recompute="full", micro_batch_size=1), "--recompute full and --micro-batch-size 1"
    changes = [
        ("--recompute full", replace(batch, recompute="full"), cluster),
        ("--micro-batch-size 1", replace(batch, micro_batch_size=1), cluster),
        (f"both {flags}", smallest, cluster),
    ]
    for gpus in (2 * cluster.gpus, 4 * cluster.gpus, 8 * cluster.gpus):
        more = replace(cluster, gpus=gpus)
        changes += [(f"{gpus} GPUs", batch, more), (f"{gpus} GPUs with {flags}", smallest, more)]
    larger = {name: gpu for name, gpu in GPUS.items() if gpu.memory > cluster.gpu.memory}
    changes += [(f"--gpu-type {name}", batch, replace(cluster, gpu=gpu)) for name, gpu in larger.items()]
    for what, changed_batch, changed_cluster in changes:
        if _fits(model, changed_batch, changed_cluster):
            return f"{what} would do"
    return "more GPUs, shorter sequences or a smaller model would help"


def _what_divides(model: ModelDescription, batch: Batch, cluster: Cluster) -> str:
    """Numbers near the given ones that a layout divides."""
    for micro in range(batch.micro_batch_size, 0, -1):
        changed = replace(batch, micro_batch_size=micro)
        if batch.global_batch_size % micro == 0 and any(layouts(model, changed, cluster.gpus, cluster.gpus_per_node)):
            return f"--micro-batch-size {micro} would do"
    for gpus in range(cluster.gpus - 1, 0, -1):
        if any(layouts(model, batch, gpus, cluster.gpus_per_node)):
            return f"{gpus} GPUs would do"
    return "change the global batch size"
