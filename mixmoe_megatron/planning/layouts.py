"""Parallel layouts, and which of them a model, a batch and a cluster admit.

Words: TP tensor, PP pipeline, CP context, DP data, EP expert, ETP expert tensor parallel size. Within a pipeline stage
the ranks form two grids: TP x CP x DP for all parameters but the experts, ETP x EP x expert DP for the experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model.mapping import Sizes
from mixmoe_megatron.model.sizes import ModelDescription


def lowest_layer(model: ModelDescription) -> int:
    """The layer whose attention gets no gradient while what follows it does; -1: gradients pass through all."""
    start = model.graph_start
    return -1 if start is None else start.layer - start.has_attention


@dataclass(frozen=True)
class Batch:
    """What a training step reads and how it runs.

    Attributes:
        micro_batch_size: sequences of one forward pass of one data-parallel rank.
        global_batch_size: sequences of a step.
        seq_length: tokens of a sequence.
        recompute: "none" or "full" (of every layer that keeps activations).
        dtype: "bf16" or "fp32".
        grads_in_fp32: gradients accumulate and reduce in float32 (with bf16: unless --grad-reduce-in-bf16).
        overlap: --overlap-grad-reduce --overlap-param-gather: buffers are cut into buckets.
    """

    micro_batch_size: int
    global_batch_size: int
    seq_length: int
    recompute: str = "none"
    dtype: str = "bf16"
    grads_in_fp32: bool = True
    overlap: bool = True

    @property
    def bytes_per_element(self) -> int:
        """Of a parameter or an activation."""
        return 2 if self.dtype == "bf16" else 4


@dataclass(frozen=True)
class ParallelLayout:
    """Parallel sizes. Sequence parallelism goes with tensor parallelism (Megatron demands it for experts)."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same experts."""
        return self.tp * self.cp * self.dp // (self.etp * self.ep)

    def micro_batches(self, batch: Batch) -> int:
        """Micro-batches of a step."""
        return batch.global_batch_size // (batch.micro_batch_size * self.dp)

    def layers(self, num_layers: int, pp_rank: int) -> range:
        """The 0-based layers of a pipeline stage."""
        count = num_layers // self.pp
        return range(pp_rank * count, (pp_rank + 1) * count)

    def __str__(self) -> str:
        parts = {"TP": self.tp, "PP": self.pp, "CP": self.cp, "EP": self.ep, "ETP": self.etp, "DP": self.dp}
        return " ".join(f"{name}{size}" for name, size in parts.items() if size > 1) or "one GPU"

    def flags(self) -> list[str]:
        """Megatron's flags."""
        sizes = {
            "--tensor-model-parallel-size": self.tp, "--pipeline-model-parallel-size": self.pp,
            "--context-parallel-size": self.cp, "--expert-model-parallel-size": self.ep,
            "--expert-tensor-parallel-size": self.etp,
        }  # fmt: skip
        words = [word for flag, size in sizes.items() if size > 1 for word in (flag, str(size))]
        return [*words, *(["--sequence-parallel"] if self.tp > 1 else [])]


def layouts(model: ModelDescription, batch: Batch, gpus: int, gpus_per_node: int) -> Iterator[ParallelLayout]:
    """Yield every layout of so many GPUs that the model's sizes and the batch admit.

    Tensor parallelism stays within a node. Not tried: a virtual pipeline, uneven pipeline stages.

    Raises:
        MixMoEError: the batch does not divide under any layout.
    """
    if not any(_divides(batch, ParallelLayout(dp=dp)) for dp in range(1, gpus + 1) if gpus % dp == 0):
        raise MixMoEError(
            f"a global batch of {batch.global_batch_size} is not divisible by the micro-batch of "
            f"{batch.micro_batch_size}: choose a multiple of it."
        )
    sizes = model.sizes
    tensor = [tp for tp in _divisors(gpus) if tp <= gpus_per_node and _splits_tensors(sizes, tp)]
    pipeline = [pp for pp in _divisors(gpus) if sizes.num_layers % pp == 0]
    context = [cp for cp in _divisors(gpus) if cp == 1 or batch.seq_length % (2 * cp) == 0]
    expert = [ep for ep in _divisors(gpus) if model.phase.groups and sizes.num_experts_per_group % ep == 0] or [1]
    for tp, pp, cp, ep in product(tensor, pipeline, context, expert):
        for etp in sorted({1, tp} if model.phase.groups else {1}):
            if gpus % (tp * pp * cp) or (gpus // pp) % (ep * etp) or sizes.moe_ffn_hidden_size % etp:
                continue
            if batch.seq_length % (tp * cp):
                continue
            layout = ParallelLayout(tp, pp, cp, gpus // (tp * pp * cp), ep, etp)
            if _divides(batch, layout):
                yield layout


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _divides(batch: Batch, layout: ParallelLayout) -> bool:
    return batch.global_batch_size % (batch.micro_batch_size * layout.dp) == 0


def _splits_tensors(sizes: Sizes, tp: int) -> bool:
    split = (sizes.num_attention_heads, sizes.num_query_groups, sizes.ffn_hidden_size, sizes.shared_ffn_hidden_size)
    return not any(size % tp for size in split)
