"""Speed of one Mix-MoE layer, forward and backward, against what the machine can do: one process, CPU or GPU.

What is compared takes turns (`turns.py`): dense GEMMs, memory reads and writes, router, experts, whole layer. The
floors of a layer are the times that it cannot beat:

- FLOP floor: the experts' products at the rate of the dense GEMMs, [T k, H] x [H, 2 f] and [T k, f] x [f, H] forward
  and backward, T tokens, k experts for each, f an expert's width, as if one expert got all rows;
- bytes floor: the weights of experts that got rows are read once forward and once backward, the trained experts'
  gradients are written once, at the measured speeds of reading and writing.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from mixmoe_megatron.model.config import MixMoETransformerConfig
from mixmoe_megatron.model.moe_layer import MixMoELayer
from mixmoe_megatron.model.options import PAPER_AUX_LOSS_COEFF, MixMoEOptions
from mixmoe_megatron.planning.turns import fastest_turns

_WARMUP = 2
_STREAM_BYTES = 2**28  # of memory whose reading and writing are timed: more than caches hold


@dataclass(frozen=True)
class LayerCase:
    """A layer, and what runs through it.

    Attributes:
        stage: 1, or 2 with the LM group frozen.
        backend: of the experts: "sequential", "torch" or "te".
        hidden_size: H.
        expert_size: f, width of an expert.
        experts: n, experts of a group.
        topk: k, experts chosen per token and group.
        tokens: T.
        dtype: of weights and activations.
        fused: Megatron's compiled SwiGLU, its default on a GPU; False: ordinary operations.
    """

    stage: int
    backend: str
    hidden_size: int
    expert_size: int
    experts: int
    topk: int
    tokens: int
    dtype: torch.dtype
    fused: bool = False

    @property
    def flops(self) -> int:
        """Operations of the experts: of each group forward and for the gradient of the inputs, of one for weights."""
        return (2 * self.stage + 1) * 6 * self.tokens * self.topk * self.hidden_size * self.expert_size

    def bytes(self, active: int) -> tuple[int, int]:
        """Return the bytes of weights read, and of gradients written, if so many of all groups' experts get rows."""
        expert = 3 * self.hidden_size * self.expert_size * self.dtype.itemsize
        return 2 * active * expert, self.experts * expert


def start_megatron() -> None:
    """Make this process Megatron's only one: process groups of one, and random states."""
    with tempfile.TemporaryDirectory() as directory, _stdout_to_stderr():  # gloo tells of each group
        store = torch.distributed.FileStore(os.path.join(directory, "store"), 1)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what this process prints, from C++ too, to stderr."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def build_layer(case: LayerCase) -> MixMoELayer:
    """Return the layer with random weights, on the GPU if there is one; in stage 2 its LM group is frozen.

    Raises:
        MixMoEError: the backend is missing or does not go with the sizes.
    """
    options = MixMoEOptions(num_experts_per_group=case.experts, topk_per_group=case.topk, moe_every=2)
    config = MixMoETransformerConfig.build(
        options,
        case.stage,
        num_layers=2,
        hidden_size=case.hidden_size,
        ffn_hidden_size=case.expert_size * case.experts,
        num_attention_heads=1,
        params_dtype=case.dtype,
        bf16=case.dtype == torch.bfloat16,
        gated_linear_unit=True,
        add_bias_linear=False,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=case.fused,
        moe_token_dispatcher_type="alltoall",
        moe_aux_loss_coeff=PAPER_AUX_LOSS_COEFF,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        experts_backend=case.backend,
        transformer_impl="transformer_engine" if case.backend == "te" else "local",
    )
    layer = MixMoELayer(config, pg_collection=ProcessGroupCollection.use_mpu_process_groups()).cuda()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if case.stage == 2:
        layer.experts.lm_experts.requires_grad_(False)
        layer.router.lm.requires_grad_(False)
    return layer


def _random(case: LayerCase, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda" if torch.cuda.is_available() else "cpu", dtype=case.dtype)


def _dense_products(case: LayerCase) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return the factors of dense GEMMs of the experts' sizes, and memory for each result that is there."""
    products = []
    for width_in, width_out in ((case.hidden_size, 2 * case.expert_size), (case.expert_size, case.hidden_size)):
        x, y = (_random(case, case.tokens * case.topk, width) for width in (width_in, width_out))
        weight = _random(case, width_out, width_in)
        grad_x, grad_weight, result = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(y)
        products += [(x, weight.T, result), (y, weight, grad_x), (y.T, x, grad_weight)]
    return products


def _passes(
    case: LayerCase, layer: MixMoELayer, hidden: torch.Tensor, counts: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """Return forward and backward of the router, the experts alone and the whole layer."""
    rows = _random(case, case.stage * case.tokens * case.topk, case.hidden_size).requires_grad_()
    probs = torch.rand(len(rows), device=rows.device).requires_grad_()
    grad_rows, grad_hidden = torch.randn_like(rows), torch.randn_like(hidden)

    def run(forward: Callable[[], torch.Tensor], grad: torch.Tensor | None) -> None:
        for tensor in (*layer.parameters(), hidden, rows, probs):
            tensor.grad = None
        output = forward()
        output.backward(torch.ones_like(output) if grad is None else grad)

    return {
        "router": lambda: run(lambda: layer.router(hidden)[0], None),
        "experts": lambda: run(lambda: layer.experts(rows, counts, probs)[0], grad_rows),
        "layer": lambda: run(lambda: layer(hidden)[0], grad_hidden),
    }


def measure_layer(case: LayerCase, turns: int) -> dict[str, float | None]:
    """Measure one case. Call `enable_cpu_mode` and `start_megatron` first.

    Args:
        case: the layer.
        turns: measured turns of each subject.

    Returns:
        `gemm_seconds`, `router_seconds`, `experts_seconds`, `layer_seconds` of forward and backward; `tflops` and
        `peak_tflops`: rates of the layer (its experts' products only) and of the dense GEMMs; `layer_share` and
        `experts_share` of that peak; `router_share` of the layer's time; `flop_floor_seconds`, `bytes_floor_seconds`,
        and `floor_ratio`, the layer's time over the larger of them; `host_syncs` of the layer (None on a CPU).

    Raises:
        MixMoEError: the backend is missing or does not go with the sizes.
    """
    layer, products = build_layer(case), _dense_products(case)
    hidden = _random(case, case.tokens, 1, case.hidden_size).requires_grad_()
    counts = layer.router(hidden)[1].sum(dim=0).cpu()
    stream = torch.zeros(_STREAM_BYTES // 4, device=hidden.device)
    passes = _passes(case, layer, hidden, counts)
    calls: dict[str, Callable[[], object]] = {
        "gemm": lambda: [torch.mm(left, right, out=result) for left, right, result in products],
        "read": lambda: stream.sum(),
        "write": lambda: stream.zero_(),
        **passes,
    }
    seconds = fastest_turns(calls, turns, _WARMUP)
    peak = sum(2 * left.numel() * right.shape[1] for left, right, _ in products) / seconds["gemm"]
    read, written = case.bytes(int((counts > 0).sum()))
    flop_floor = case.flops / peak
    bytes_floor = (read * seconds["read"] + written * seconds["write"]) / _STREAM_BYTES
    return {
        **{f"{name}_seconds": seconds[name] for name in ("gemm", "router", "experts", "layer")},
        "tflops": case.flops / seconds["layer"] / 1e12,
        "peak_tflops": peak / 1e12,
        "layer_share": flop_floor / seconds["layer"],
        "experts_share": flop_floor / seconds["experts"],
        "router_share": seconds["router"] / seconds["layer"],
        "flop_floor_seconds": flop_floor,
        "bytes_floor_seconds": bytes_floor,
        "floor_ratio": seconds["layer"] / max(flop_floor, bytes_floor),
        "host_syncs": host_syncs(passes["layer"]).total() if torch.cuda.is_available() else None,
    }


def host_syncs(call: Callable[[], Any]) -> Counter[str]:
    """Count how often the host waits for the GPU in a call, by the place in the code ("file:line")."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    return Counter(f"{warning.filename}:{warning.lineno}" for warning in waits)
