"""The experts' arithmetic: linear layers of many experts, each on its own rows, and the weighted SwiGLU between two.

Shape legend as in experts.py: T rows of a group on this rank sorted by expert, n experts, F width of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from torch.nn import functional

_FEW_ROWS = 512


def looped_linear(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Return y_e = x_e W_e^T with a GEMM per expert: [T, in] -> [T, out]. No host synchronisation.

    Args:
        x: [T, in], the experts' rows one after the other.
        weight: [n, out, in], the dtype of x.
        counts: n numbers of rows, their sum T.
    """
    return _LoopedLinear.apply(x, weight, counts)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Return the same with torch's grouped GEMM, one kernel where `choose_experts_backend` takes it by itself.

    Args:
        x, weight, counts: as in `looped_linear`.
    """
    offsets = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(x.device, non_blocking=True)
    grouped_mm = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    output = grouped_mm(x.contiguous(), weight.transpose(-2, -1), offs=offsets)
    if output.requires_grad:
        output.register_hook(torch.Tensor.contiguous)  # grouped_mm's own backward pass demands it
    return output


class _LoopedLinear(torch.autograd.Function):
    """Each GEMM writes straight into its rows of the output and its expert's part of the weight gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # a frozen layer keeps no input
        ctx.counts = counts
        output = x.new_empty(len(x), weight.shape[1])
        for rows, matrix, result in zip(x.split(counts), weight, output.split(counts), strict=True):
            _multiply(rows, matrix.T, result)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        grad_rows, grad_x, grad_weight = grads[0].split(ctx.counts), None, None
        if need_x:
            grad_x = weight.new_empty(len(grads[0]), weight.shape[2])
            for grad, matrix, result in zip(grad_rows, weight, grad_x.split(ctx.counts), strict=True):
                _multiply(grad, matrix, result)
        if need_weight:
            grad_weight = torch.empty_like(weight)
            for grad, rows, result in zip(grad_rows, x.split(ctx.counts), grad_weight, strict=True):
                torch.mm(grad.T, rows, out=result)  # zero where an expert has no rows
        return grad_x, grad_weight, None


def _multiply(rows: torch.Tensor, matrix: torch.Tensor, result: torch.Tensor) -> None:
    """Put rows [t, in] times matrix [in, out] into result [t, out].

    On several threads of a CPU the float32 product of few rows is cut into pieces too small (128 rows of 1,024: two
    thirds of the speed); that of the transposed matrices has `out` rows to share out.
    """
    few = len(rows) <= _FEW_ROWS and len(rows) < matrix.shape[1]
    if few and rows.device.type == "cpu" and rows.dtype == torch.float32 and torch.get_num_threads() > 1:
        result.copy_(torch.mm(matrix.T, rows.T).T)
    else:
        torch.mm(rows, matrix, out=result)


def weighted_swiglu(gate_up: torch.Tensor, probs: torch.Tensor, fused: bool) -> torch.Tensor:
    """Return p * SiLU(gate) * up: [T, 2 F], [T] float32 -> [T, F] in the dtype of gate_up.

    It keeps its inputs alone for the backward pass, and makes no [T, F] tensor in the dtype of probs.

    Args:
        gate_up: [T, 2 F], gate columns first.
        probs: [T] float32.
        fused: with Megatron's fused kernel, which its jit_fuser compiles.
    """
    if fused:
        return weighted_bias_swiglu_impl(gate_up, None, probs.unsqueeze(-1))
    return _WeightedSwiGLU.apply(gate_up, probs)


class _WeightedSwiGLU(torch.autograd.Function):
    """Megatron's weighted SwiGLU in ordinary operations. In-place multiplication by float32 rounds once, as a cast."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up, probs)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up).mul_(probs.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up, probs = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        silu = functional.silu(gate)
        grad_probs = (silu * up).mul_(grads[0]).sum(dim=-1, dtype=probs.dtype)
        grad_glu = torch.empty_like(up, memory_format=torch.contiguous_format).copy_(grads[0])
        grad_glu.mul_(probs.unsqueeze(-1))
        grad_up = silu.mul_(grad_glu)
        grad_gate = torch.ops.aten.silu_backward(grad_glu.mul_(up), gate)
        return torch.cat([grad_gate, grad_up], dim=-1), grad_probs
