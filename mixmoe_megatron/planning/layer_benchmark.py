"""Speed of one Mix-MoE layer, forward and backward, against what the machine can do: one process, CPU or GPU.

What is compared takes turns (dense GEMMs, memory reads and writes, router, experts, whole layer), so that all meet the
same machine; a time is that of the fastest turn. The floors of a layer are the times that it cannot beat:

- FLOP floor: the experts' products at the rate of the dense GEMMs, [T k, H] x [H, 2 f] and [T k, f] x [f, H] forward
  and backward, T tokens, k experts for each, f an expert's width, as if one expert got all rows;
- bytes floor: the weights of experts that got rows are read once forward and once backward, the trained experts'
  gradients are written once, at the measured speeds of reading and writing.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
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


class _Subjects:
    """What takes turns in one case: name -> a call that does the work once."""

    def __init__(self, case: LayerCase):
        self.case, self.device = case, "cuda" if torch.cuda.is_available() else "cpu"
        self.layer = build_layer(case)
        hidden = self._random(case.tokens, 1, case.hidden_size).requires_grad_()
        _, routing_map = self.layer.router(hidden)
        self.counts = routing_map.sum(dim=0).cpu()
        self.calls: dict[str, Callable[[], object]] = {}
        self._add_gemms()
        self._add_streams()
        self._add_passes(hidden)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.case.dtype)

    def _add_gemms(self) -> None:
        """Dense GEMMs of the experts' sizes; each works in memory that is there."""
        case, products = self.case, []
        for width_in, width_out in ((case.hidden_size, 2 * case.expert_size), (case.expert_size, case.hidden_size)):
            x, y = (self._random(case.tokens * case.topk, width) for width in (width_in, width_out))
            weight = self._random(width_out, width_in)
            grad_x, grad_weight, result = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(y)
            products += [(x, weight.T, result), (y, weight, grad_x), (y.T, x, grad_weight)]
        self.gemm_flops = sum(2 * left.numel() * right.shape[1] for left, right, _ in products)
        self.calls["gemm"] = lambda: [torch.mm(a, b, out=c) for a, b, c in products]

    def _add_streams(self) -> None:
        stream = torch.zeros(_STREAM_BYTES // 4, device=self.device)
        self.calls["read"] = lambda: stream.sum()
        self.calls["write"] = lambda: stream.zero_()

    def _add_passes(self, hidden: torch.Tensor) -> None:
        """Forward and backward of the router, the experts alone and the whole layer."""
        layer, case = self.layer, self.case
        rows = self._random(case.stage * case.tokens * case.topk, case.hidden_size).requires_grad_()
        probs = torch.rand(len(rows), device=self.device).requires_grad_()
        grad_rows, grad_hidden = torch.randn_like(rows), torch.randn_like(hidden)

        def run(forward: Callable[[], torch.Tensor], grad: torch.Tensor | None) -> None:
            for tensor in (*layer.parameters(), hidden, rows, probs):
                tensor.grad = None
            output = forward()
            output.backward(torch.ones_like(output) if grad is None else grad)

        self.calls["router"] = lambda: run(lambda: layer.router(hidden)[0], None)
        self.calls["experts"] = lambda: run(lambda: layer.experts(rows, self.counts, probs)[0], grad_rows)
        self.calls["layer"] = lambda: run(lambda: layer(hidden)[0], grad_hidden)


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
    subjects = _Subjects(case)
    times: dict[str, list[float]] = {name: [] for name in subjects.calls}
    for _ in range(_WARMUP + turns):
        for name, call in subjects.calls.items():
            torch.cuda.synchronize()  # in CPU mode it does nothing
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    seconds = {name: min(values[_WARMUP:]) for name, values in times.items()}
    peak = subjects.gemm_flops / seconds["gemm"]
    read, written = case.bytes(int((subjects.counts > 0).sum()))
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
        "host_syncs": host_syncs(subjects.calls["layer"]).total() if torch.cuda.is_available() else None,
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
