"""A stand-in for Transformer Engine 2.9: what Megatron looks up in it for a Llama, in plain torch, on one process.

Its modules take the arguments and have the parameters and gradients of the original; nothing here is fast. Permutations
keep the original's condition: the gradient of the probs is computed only beside that of the tokens.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch.nn import functional

VERSION = "2.9.0"


class _Module(torch.nn.Module):
    """What Megatron reads of every module of Transformer Engine."""

    fp8 = fp8_calibration = False

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Without fp8 there is nothing in it."""

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Without fp8 there is none."""


class _FusedWgrad(torch.autograd.Function):
    """x W^T; with `fused` the weight's gradient is added to its main_grad, as fuse_wgrad_accumulation does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, fused: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.fused = fused
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grads[0] @ weight if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grads[0].flatten(0, -2).T @ x.flatten(0, -2)
            if ctx.fused:
                weight.main_grad.add_(grad_weight)
                weight.grad_added_to_main_grad = True
                grad_weight = torch.full_like(weight, float("nan"))  # a dummy: whoever reads it will notice
        return grad_x, grad_weight, None


class Linear(_Module):
    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, init_method: Any, params_dtype: torch.dtype,
        device: Any, fuse_wgrad_accumulation: bool, parallel_mode: str | None, tp_size: int, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert tp_size == 1 and not kwargs["return_bias"]
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.parallel_mode, self.fused = parallel_mode, fuse_wgrad_accumulation
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        init_method(self.weight)
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(out_features, dtype=params_dtype, device=device))

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        y = _FusedWgrad.apply(x, self.weight, self.fused)
        return y + self.bias if self.use_bias else y


class RMSNorm(_Module):
    def __init__(
        self, normalized_shape: int, eps: float, params_dtype: torch.dtype, device: Any, **kwargs: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, *, eps: float, normalization: str, **kwargs: Any) -> None:
        assert normalization == "RMSNorm"
        super().__init__(in_features, out_features, **kwargs)
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones_like(self.weight[0]))

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return super().forward(functional.rms_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps))


class GroupedLinear(_Module):
    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, *, bias: bool, init_method: Any,
        params_dtype: torch.dtype, device: Any, fuse_wgrad_accumulation: bool, tp_size: int, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert tp_size == 1 and not bias
        self.num_gemms, self.use_bias, self.fused = num_gemms, bias, fuse_wgrad_accumulation
        for index in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
            init_method(weight)
            self.register_parameter(f"weight{index}", torch.nn.Parameter(weight))

    def forward(self, x: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> torch.Tensor:
        rows = x.split([int(size) for size in m_splits])
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        return torch.cat([_FusedWgrad.apply(r, w, self.fused) for r, w in zip(rows, weights, strict=True)])


class DotProductAttention(_Module):
    def __init__(self, num_attention_heads: int, kv_channels: int, *, softmax_scale: float | None, **kwargs: Any):
        super().__init__()
        self.scale = softmax_scale

    def get_extra_state(self) -> Any:
        raise NotImplementedError("the attention of Megatron has no state in checkpoints")

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, *, attn_mask_type: str,
        qkv_format: str = "sbhd", cu_seqlens_q: torch.Tensor | None = None, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        assert attn_mask_type == {"sbhd": "causal", "thd": "padding_causal"}[qkv_format]
        if qkv_format == "sbhd":
            return self.attend(query, key, value).flatten(2)
        assert cu_seqlens_q is not None
        lengths = cu_seqlens_q.diff().tolist()
        documents = zip(*(x.unsqueeze(1).split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self.attend(*document) for document in documents]).squeeze(1).flatten(1)

    def attend(self, *tensors: torch.Tensor) -> torch.Tensor:
        """[S, B, A, D], [S, B, K, D], [S, B, K, D] -> [S, B, A, D]."""
        heads_first = [x.permute(1, 2, 0, 3) for x in tensors]
        out = functional.scaled_dot_product_attention(*heads_first, is_causal=True, scale=self.scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3)


def apply_rotary_pos_emb(
    t: torch.Tensor, freqs: torch.Tensor, tensor_format: str, cu_seqlens: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor:
    if tensor_format == "thd":
        assert cu_seqlens is not None
        documents = t.unsqueeze(1).split(cu_seqlens.diff().tolist())
        return torch.cat([apply_rotary_pos_emb(document, freqs, "sbhd") for document in documents]).squeeze(1)
    freqs = freqs[: len(t)]
    first, second = t.chunk(2, dim=-1)
    return (t * freqs.cos() + torch.cat([-second, first], dim=-1) * freqs.sin()).to(t.dtype)


class _Permute(torch.autograd.Function):
    """Rows of the tokens and the probs by a [2, out] map (token, expert), with the original's condition."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, probs: torch.Tensor, rows: torch.Tensor) -> Any:
        ctx.save_for_backward(rows)
        ctx.shapes = tokens.shape, probs.shape
        return tokens[rows[0]], probs[rows[0], rows[1]]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        token_grad = probs_grad = None
        if ctx.needs_input_grad[0]:
            token_grad = grads[0].new_zeros(ctx.shapes[0]).index_add_(0, rows[0], grads[0])
            probs_grad = grads[1].new_zeros(ctx.shapes[1]).index_put_((rows[0], rows[1]), grads[1])
        return token_grad, probs_grad if ctx.needs_input_grad[1] else None, None


def moe_permute_with_probs(
    inp: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int = -1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = routing_map.T.nonzero().T.flip(0)
    return *_Permute.apply(inp, probs, rows), rows


class _SortChunks(torch.autograd.Function):
    """Rows of the tokens and the probs by an index, with the original's condition."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, probs: torch.Tensor, rows: torch.Tensor) -> Any:
        ctx.save_for_backward(rows)
        return tokens[rows], probs[rows]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        token_grad = probs_grad = None
        if ctx.needs_input_grad[0]:
            back = rows.argsort()
            token_grad, probs_grad = grads[0][back], grads[1][back]
        return token_grad, probs_grad if ctx.needs_input_grad[1] else None, None


def _chunk_rows(split_sizes: torch.Tensor, sorted_index: torch.Tensor) -> torch.Tensor:
    chunks = torch.arange(int(split_sizes.sum())).split(split_sizes.tolist())
    return torch.cat([chunks[index] for index in sorted_index.tolist()])


def moe_sort_chunks_by_index(inp: torch.Tensor, split_sizes: torch.Tensor, sorted_index: torch.Tensor) -> torch.Tensor:
    return inp[_chunk_rows(split_sizes, sorted_index)]


def moe_sort_chunks_by_index_with_probs(
    inp: torch.Tensor, probs: torch.Tensor, split_sizes: torch.Tensor, sorted_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _SortChunks.apply(inp, probs, _chunk_rows(split_sizes, sorted_index))


def moe_unpermute(inp: torch.Tensor, row_id_map: torch.Tensor, merging_probs: None, restore_shape: Any) -> torch.Tensor:
    return inp.new_zeros(restore_shape).index_add(0, row_id_map[0], inp)


class FusedAdam(torch.optim.Optimizer):
    """AdamW that keeps the step in its parameter groups."""

    def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float, **kwargs: Any) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            first, second = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(parameter))
                state["exp_avg"].lerp_(parameter.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                scale = (state["exp_avg_sq"] / (1 - second**step)).sqrt_().add_(group["eps"])
                parameter.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - first**step))


def multi_tensor_applier(operation: Any, overflow: Any, lists: list[Any], *arguments: Any) -> Any:
    return operation(*lists, *arguments)


def multi_tensor_l2norm(tensors: list[torch.Tensor], per_parameter: bool) -> tuple[torch.Tensor, None]:
    return torch.stack([tensor.float().norm() for tensor in tensors]).norm().reshape(1), None


def multi_tensor_scale(source: list[torch.Tensor], target: list[torch.Tensor], factor: Any) -> None:
    for read, written in zip(source, target, strict=True):
        written.copy_(read * factor)


def _nothing(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("the stand-in has the name only")


_EMPTY = type("Empty", (), {})
_MODULES: dict[str, dict[str, Any]] = {
    "": {"__version__": VERSION},
    ".common": {},
    ".common.recipe": {"DelayedScaling": _EMPTY, "Format": _EMPTY},
    ".pytorch": {
        "Linear": Linear, "LayerNormLinear": LayerNormLinear, "GroupedLinear": GroupedLinear, "RMSNorm": RMSNorm,
        "LayerNorm": _EMPTY, "DotProductAttention": DotProductAttention, "Fp8Padding": _EMPTY, "Fp8Unpadding": _EMPTY,
    },
    ".pytorch.ops": {"Sequential": _EMPTY, "FusibleOperation": _EMPTY},
    ".pytorch.fp8": {"FP8GlobalStateManager": _EMPTY, "fp8_autocast": _nothing, "fp8_model_init": _nothing},
    ".pytorch.float8_tensor": {"Float8Tensor": _EMPTY},
    ".pytorch.tensor": {"QuantizedTensor": _EMPTY},
    ".pytorch.distributed": {
        "CudaRNGStatesTracker": _EMPTY, "activation_recompute_forward": _nothing, "checkpoint": _nothing,
        "get_all_rng_states": dict,
    },
    ".pytorch.attention": {},
    ".pytorch.attention.rope": {"apply_rotary_pos_emb": apply_rotary_pos_emb},
    ".pytorch.module": {},
    ".pytorch.module.base": {"get_dummy_wgrad": lambda shape, dtype, zero=False: torch.zeros(shape, dtype=dtype)},
    ".pytorch.permutation": {
        "moe_permute_with_probs": moe_permute_with_probs, "moe_unpermute": moe_unpermute, "moe_permute": _nothing,
        "moe_sort_chunks_by_index": moe_sort_chunks_by_index,
        "moe_sort_chunks_by_index_with_probs": moe_sort_chunks_by_index_with_probs,
    },
    ".pytorch.router": {
        "fused_compute_score_for_moe_aux_loss": _nothing, "fused_moe_aux_loss": _nothing,
        "fused_topk_with_score_function": _nothing,
    },
    ".pytorch.optimizers": {
        "FusedAdam": FusedAdam, "FusedSGD": _EMPTY, "multi_tensor_applier": multi_tensor_applier,
        "multi_tensor_l2norm": multi_tensor_l2norm, "multi_tensor_scale": multi_tensor_scale,
        "multi_tensor_scale_tensor": multi_tensor_scale,
    },
}  # fmt: skip


def install() -> None:
    """Put it where `import transformer_engine` finds it; before Megatron is imported."""
    for path, contents in _MODULES.items():
        name = f"transformer_engine{path}"
        module = sys.modules[name] = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        module.__path__ = []
        vars(module).update(contents)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
