"""A plan as text and as JSON, and the command lines that run a layout."""

from __future__ import annotations

import math
from typing import Any

from mixmoe_megatron.model.sizes import ModelDescription
from mixmoe_megatron.planning.cluster_plan import RESERVE, Candidate, usable_memory
from mixmoe_megatron.planning.costs import LATENCY, Cluster
from mixmoe_megatron.planning.layouts import Batch
from mixmoe_megatron.planning.parameters import count_parameters

_GIB, _GB = 1024**3, 1e9
_TRAFFIC = ("TP", "CP", "EP", "ETP", "PP", "DP")


def plan_text(model: ModelDescription, batch: Batch, cluster: Cluster, plan: list[Candidate], show: int) -> str:
    """Return the plan as text: assumptions, a table of layouts, the command lines of the best.

    Args:
        model: the model.
        batch: the batch.
        cluster: the GPUs.
        plan: from `plan_layouts`.
        show: layouts in the table.
    """
    lines = [_parameters(model), *_assumptions(batch, cluster), "", *_table(batch, plan[:show])]
    if len(plan) > show:
        lines.append(f"and {len(plan) - show} more that fit (--show)")
    first = command_lines(model, batch, cluster, plan[0])
    lines += ["", "To run the first (put in your own paths; with several nodes, on each of them):"]
    return "\n".join([*lines, f"  {first['torchrun']}", "Under Slurm:", f"  {first['slurm']}"])


def _parameters(model: ModelDescription) -> str:
    total, active, trained = (count / 1e6 for count in count_parameters(model))
    return (
        f"{total:,.1f} million parameters; {active:,.1f} of them work on a token, {trained:,.1f} are trained in "
        f"{model.phase.name}."
    )


def _assumptions(batch: Batch, cluster: Cluster) -> list[str]:
    fast, slow = (cluster.bandwidth(span) / _GB for span in (1, cluster.gpus_per_node + 1))
    return [
        f"{cluster.gpus} x {cluster.gpu.name}, {usable_memory(cluster) / _GIB:.0f} GiB of each usable "
        f"({RESERVE / _GIB:.0f} GiB for CUDA, NCCL and workspaces); memory is that of the fullest rank.",
        "Weights, gradients and optimizer are exact; activations are an estimate (planning/activations.py has the "
        "formula).",
        f"Time is an expectation: matrix products at {cluster.flops / 1e12:.0f} TFLOP/s a GPU (utilisation "
        f"{cluster.utilization:.2f}), {fast:.0f} GB/s within a node of {cluster.gpus_per_node}, {slow:.0f} GB/s a GPU "
        f"between nodes, {LATENCY * 1e6:.0f} us a collective, nothing overlapped; recompute {batch.recompute}.",
    ]


def _table(batch: Batch, plan: list[Candidate]) -> list[str]:
    kinds = [kind for kind in _TRAFFIC if any(candidate.costs.traffic[kind] for candidate in plan)]
    width = max(6, *(len(str(candidate.layout)) for candidate in plan))
    traffic_title = "GB sent a step by a rank".center(8 * len(kinds))
    lines = [
        f"{'':<{width}} {'micro-':>8} |{'GiB on the fullest rank':^45}|{traffic_title}|{'seconds a step':^26}|",
        f"{'layout':<{width}} {'batches':>8} |{'weights':>8}{'grads':>8}{'optimizer':>10}{'activ.':>8}{'total':>8}   |"
        + "".join(f"{kind:>7} " for kind in kinds)
        + f"|{'compute':>8}{'traffic':>8}{'all':>8}  |{'tokens/s':>10}",
    ]
    tokens = batch.global_batch_size * batch.seq_length
    for candidate in plan:
        memory, costs = candidate.memory, candidate.costs
        lines.append(
            f"{candidate.layout!s:<{width}} {candidate.micro_batches:>8} |{memory.weights / _GIB:>8.2f}"
            f"{memory.gradients / _GIB:>8.2f}{memory.optimizer / _GIB:>10.2f}{memory.activations / _GIB:>8.2f}"
            f"{memory.total / _GIB:>8.2f}   |"
            + "".join(f"{costs.traffic[kind] / _GB:>7.2f} " for kind in kinds)
            + f"|{costs.compute:>8.3f}{costs.communication:>8.3f}{costs.seconds:>8.3f}  |"
            + f"{tokens / costs.seconds:>10,.0f}"
        )
    return lines


def _training_command(model: ModelDescription, batch: Batch, candidate: Candidate) -> str:
    """Return the training command and its flags, paths and schedule left to the user in capitals."""
    words = [f"tools/pretrain_mixmoe.py --phase {model.phase.name} --init-from PARENT --data-path DATA"]
    words += ["--load RUN --save RUN", *candidate.layout.flags(), "--use-distributed-optimizer"]
    words += [f"--seq-length {batch.seq_length} --micro-batch-size {batch.micro_batch_size}"]
    words += [f"--global-batch-size {batch.global_batch_size}"]
    if batch.dtype == "bf16":
        words.append("--bf16" if batch.grads_in_fp32 else "--bf16 --grad-reduce-in-bf16")
    if batch.overlap:
        words.append("--overlap-grad-reduce --overlap-param-gather")
    if batch.recompute == "full":
        words.append("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    return " ".join(words)


def command_lines(model: ModelDescription, batch: Batch, cluster: Cluster, candidate: Candidate) -> dict[str, str]:
    """Return the lines that train with a layout.

    Args:
        model: the model.
        batch: the batch.
        cluster: the GPUs.
        candidate: has the layout.

    Returns:
        ``torchrun``: with several nodes it runs on each of them. ``slurm``: sbatch, one torchrun on each node.
    """
    local = min(cluster.gpus, cluster.gpus_per_node)
    nodes = math.ceil(cluster.gpus / local)
    training = _training_command(model, batch, candidate)
    meeting = f"--nnodes={nodes} --nproc-per-node={local} --rdzv-backend=c10d --rdzv-endpoint="
    first = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)'
    alone = f"--standalone --nproc-per-node={local}"
    return {
        "torchrun": f"torchrun {f'{meeting}FIRST_NODE:29500' if nodes > 1 else alone} {training}",
        "slurm": f"sbatch --nodes={nodes} --ntasks-per-node=1 --gpus-per-node={local} --exclusive "
        f"--wrap='srun torchrun {meeting}{first}:29500 {training}'",
    }


def plan_to_dict(model: ModelDescription, batch: Batch, cluster: Cluster, plan: list[Candidate]) -> dict[str, Any]:
    """Return the plan as JSON-able values: bytes, seconds, bytes a second, operations a second."""
    return {
        "phase": model.phase.name,
        "parameters": count_parameters(model)._asdict(),
        "gpu": cluster.gpu.name,
        "gpus": cluster.gpus,
        "usable_memory_bytes": usable_memory(cluster),
        "assumed": {
            "utilization": cluster.utilization,
            "flops_per_gpu": cluster.flops,
            "seconds_per_collective": LATENCY,
            "bandwidth_in_node": cluster.bandwidth(1),
            "bandwidth_between_nodes": cluster.bandwidth(cluster.gpus_per_node + 1),
        },
        "exact": ["weights", "gradients", "optimizer"],
        "layouts": [candidate.to_dict() | command_lines(model, batch, cluster, candidate) for candidate in plan],
    }
