"""Traffic and time of a training step: matrix products at an assumed utilisation, collectives at assumed bandwidths.

Nothing overlaps here: a run that hides the reduction of its gradients is faster by up to that part. What a rank sends
is counted: (N - 1) / N of a tensor in an all-gather, reduce-scatter or all-to-all of N ranks. Logits are counted for
every token, as in `activations.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mixmoe_megatron.model.flops import peak_flops, step_flops
from mixmoe_megatron.model.sizes import ModelDescription
from mixmoe_megatron.planning.layouts import Batch, ParallelLayout, lowest_layer
from mixmoe_megatron.planning.parameters import rank_parameters

_GIB = 1024**3
_BANDWIDTH_SHARE = 0.8  # of the nominal one, which large messages reach
LATENCY = 20e-6  # seconds of a collective, whatever its size


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: as `flops.peak_flops` knows it.
        memory: bytes.
        nvlink: nominal bytes a second that a GPU sends within a node.
        network: nominal bytes a second that a GPU sends to other nodes.
    """

    name: str
    memory: int
    nvlink: float
    network: float


GPUS = {
    "A100-40G": Gpu("A100", 40 * _GIB, 300e9, 25e9),
    "A100-80G": Gpu("A100", 80 * _GIB, 300e9, 25e9),
    "H100": Gpu("H100", 80 * _GIB, 450e9, 50e9),
}


@dataclass(frozen=True)
class Cluster:
    """The machine.

    Attributes:
        gpu: the kind of GPU.
        gpus: their number.
        gpus_per_node: of them joined by NVLink.
        utilization: share of the peak that matrix products reach.
    """

    gpu: Gpu
    gpus: int
    gpus_per_node: int = 8
    utilization: float = 0.4

    @property
    def flops(self) -> float:
        """Operations a second of a GPU at the assumed utilisation."""
        peak = peak_flops(self.gpu.name)
        assert peak is not None
        return peak * self.utilization

    def bandwidth(self, span: int, ring_members_per_node: int = 1) -> float:
        """Bytes a second that a rank of a group sends.

        Args:
            span: ranks from the first to the last of the group, inclusive.
            ring_members_per_node: a ring over several nodes uses the network of all its members of a node.
        """
        between = min(self.gpu.nvlink, self.gpu.network * ring_members_per_node)
        return (self.gpu.nvlink if span <= self.gpus_per_node else between) * _BANDWIDTH_SHARE


@dataclass(frozen=True)
class Costs:
    """Of one step, on the rank of the slowest pipeline stage.

    Attributes:
        traffic: bytes sent by kind: TP, CP, EP, ETP, PP, DP.
        compute: seconds of matrix products, pipeline bubble included.
        communication: seconds.
    """

    traffic: dict[str, float]
    compute: float
    communication: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.compute + self.communication


def step_costs(model: ModelDescription, layout: ParallelLayout, batch: Batch, cluster: Cluster) -> Costs:
    """Return traffic and time of a step.

    With PP stages and m micro-batches a step lasts as long as one micro-batch through all stages and m - 1 through the
    slowest one.

    Args:
        model: the model.
        layout: the parallel sizes.
        batch: the batch.
        cluster: the GPUs.
    """
    stages = [_stage(model, layout, batch, cluster, pp_rank) for pp_rank in range(layout.pp)]
    slowest = max(stages, key=lambda stage: stage.seconds)
    more = layout.micro_batches(batch) - 1
    reduced, seconds = max(_data_parallel(model, layout, batch, cluster, rank) for rank in range(layout.pp))
    return Costs(
        traffic={kind: sent * (more + 1) for kind, sent in slowest.traffic.items()} | {"DP": reduced},
        compute=sum(stage.compute for stage in stages) + more * slowest.compute,
        communication=sum(stage.communication for stage in stages) + more * slowest.communication + seconds,
    )


def _stage(model: ModelDescription, layout: ParallelLayout, batch: Batch, cluster: Cluster, pp_rank: int) -> Costs:
    """Costs of one micro-batch, forward and backward, on a pipeline stage; without data parallelism."""
    sizes, k = model.sizes_under(layout.tp), model.topk_per_group
    layers = layout.layers(sizes.num_layers, pp_rank)
    lowest = lowest_layer(model)
    tokens = batch.micro_batch_size * batch.seq_length
    flops = step_flops(sizes, model.phase, k, tokens, batch.seq_length, layers).total
    if batch.recompute == "full":
        again = range(max(lowest, layers.start), max(lowest, layers.stop))
        flops += step_flops(
            replace(sizes, padded_vocab_size=0), model.phase, k, tokens, batch.seq_length, again
        ).forward
    traffic = _traffic(model, layout, batch, layers)
    spans = {
        "TP": layout.tp, "CP": layout.tp * layout.cp, "EP": layout.etp * layout.ep, "ETP": layout.etp,
        "PP": layout.world_size // layout.pp + 1,
    }  # fmt: skip
    return Costs(
        traffic={kind: sent for kind, (_, sent) in traffic.items()},
        compute=flops / (layout.tp * layout.cp) / cluster.flops,
        communication=sum(
            calls * LATENCY + sent / cluster.bandwidth(spans[kind]) for kind, (calls, sent) in traffic.items() if sent
        ),
    )


def _traffic(
    model: ModelDescription, layout: ParallelLayout, batch: Batch, layers: range
) -> dict[str, tuple[int, float]]:
    """Collectives of one micro-batch and the bytes that a rank sends in them, by kind.

    A tensor-parallel sublayer gathers its input and scatters its output, backward the same and, where a weight trains,
    gathers the input again; a shared expert is one too. A Mix-MoE layer dispatches the rows of all its groups in one
    all-to-all and combines them in another. Below the first trained layer there is no backward pass.
    """
    sizes, size = model.sizes_under(layout.tp), batch.bytes_per_element
    tokens = batch.micro_batch_size * batch.seq_length // layout.cp
    hidden = tokens * sizes.hidden_size * size
    rows = hidden // layout.tp * model.topk_per_group * sizes.num_groups
    key_value = 2 * tokens * sizes.num_query_groups * sizes.kv_channels * size // layout.tp
    lowest = lowest_layer(model)
    is_first, is_last = layers.start == 0, layers.stop == sizes.num_layers
    exchanges, dispatches, rings = is_first + is_last * (2 + model.is_trained("output_layer.weight")), 0, 0
    for layer in layers:
        again = int(batch.recompute == "full" and layer >= lowest)
        backward = int(layer > lowest)
        trained = model.is_trained(f"decoder.layers.{layer}.self_attention.linear_qkv.weight")
        sublayers = 1 if layer in sizes.moe_layers and not sizes.shared_experts else 2
        exchanges += sublayers * (2 + 2 * again + (2 + trained) * backward)
        rings += 1 + again + 2 * backward
        if layer in sizes.moe_layers:
            dispatches += 2 + 2 * again + 1 + backward
    neighbours = 2 - is_first - is_last
    return {
        "TP": (exchanges, exchanges * hidden * (layout.tp - 1) / layout.tp),
        "CP": (rings * (layout.cp - 1), rings * key_value * (layout.cp - 1)),
        "EP": (dispatches, dispatches * rows * (layout.ep - 1) / layout.ep),
        "ETP": (dispatches, dispatches * rows * (layout.etp - 1)),
        "PP": (2 * neighbours, hidden // layout.tp * neighbours),
    }


def _data_parallel(
    model: ModelDescription, layout: ParallelLayout, batch: Batch, cluster: Cluster, pp_rank: int
) -> tuple[float, float]:
    """Bytes and seconds of reducing the gradients and gathering the parameters of a pipeline stage."""
    sent = seconds = 0.0
    in_stage = layout.world_size // layout.pp
    grad_bytes = 4 if batch.grads_in_fp32 else batch.bytes_per_element
    for parameter in rank_parameters(model.sizes_under(layout.tp), layout, pp_rank, layout.ep - 1):
        if model.is_trained(parameter.name):
            stride = layout.etp * layout.ep if parameter.is_expert else layout.tp
            ranks, in_node = in_stage // stride, max(1, cluster.gpus_per_node // stride)
            part = math.prod(parameter.shape) * (grad_bytes + batch.bytes_per_element) * (ranks - 1) / ranks
            sent += part
            seconds += part / cluster.bandwidth(in_stage, in_node)
    return sent, seconds
