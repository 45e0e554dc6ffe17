"""The mapping tables between Hugging Face and Megatron: one row for each kind of tensor.

A row names its tensors on both sides, gives each a shape, and names the layout that carries values across. Plans are
made from the tables alone, before any weight is read: an unmapped, unused or misshapen key is an error that names it.
Layouts take torch tensors or numpy arrays; all but those that compute move values only, or make zeros.

Megatron names are the keys of a torch_dist checkpoint, one per layer. `{i}` is the layer number from 0.

Shape legend: H hidden_size, F ffn_hidden_size, Q attention heads x head size, K query groups x head size, QKV = Q + 2K,
V vocabulary, P padded vocabulary, n experts per group, E experts of all groups (n or 2n), f moe_ffn_hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mixmoe_megatron.methods.mixmoe import GROUPS
from mixmoe_megatron.model import upcycling
from mixmoe_megatron.model.upcycling import Array, concatenate, library

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Everything that shapes and conditions in the tables depend on.

    Attributes:
        tied: the output layer is the word embedding.
        qkv_bias: the query, key and value projections have a bias (Qwen2).
        moe_layers: 0-based numbers of the Mix-MoE layers; empty for a dense model.
        num_groups: 1 in stage 1 (LM), 2 in stage 2 (LM and MT).
        router_bias: the routers have a bias.
        spectral: the Megatron routers keep a second weight W_f (not for transform `none`).
        expert_init: `slice` or `copy`, for upcycling only.
        init_std: of router weights, for upcycling only.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    padded_vocab_size: int
    tied: bool
    qkv_bias: bool
    moe_layers: tuple[int, ...] = ()
    num_groups: int = 0
    num_experts_per_group: int = 0
    moe_ffn_hidden_size: int = 0
    router_bias: bool = True
    spectral: bool = True
    expert_init: str = "slice"
    init_std: float = 0.02

    def shape(self, symbols: str) -> tuple[int, ...]:
        """Evaluate a shape such as `n 2f H` (see the legend of this module)."""
        q = self.num_attention_heads * self.kv_channels
        k = self.num_query_groups * self.kv_channels
        n, inner = self.num_experts_per_group, self.moe_ffn_hidden_size
        values = {
            "H": self.hidden_size, "F": self.ffn_hidden_size, "2F": 2 * self.ffn_hidden_size,
            "Q": q, "K": k, "QKV": q + 2 * k, "V": self.vocab_size, "P": self.padded_vocab_size,
            "n": n, "E": n * self.num_groups, "f": inner, "2f": 2 * inner,
        }  # fmt: skip
        return tuple(values[symbol] for symbol in symbols.split())

    def holds(self, condition: str) -> bool:
        """Tell whether a row or tensor with this condition exists in the model."""
        return {
            "": True, "untied": not self.tied, "qkv_bias": self.qkv_bias, "router_bias": self.router_bias,
            "spectral": self.spectral, "mt": self.num_groups == 2,
            "mt_spectral": self.spectral and self.num_groups == 2,
        }[condition]  # fmt: skip


@dataclass(frozen=True)
class Context:
    """What two layouts need beyond tensors and sizes.

    Attributes:
        fold: (W_h [n, H], W_f [n, H] or None) -> the plain router weight [n, H] float32; for export.
        generator: CPU generator for router weights; for upcycling.
    """

    fold: Callable[[Tensor, Tensor | None], Tensor] | None = None
    generator: Callable[[str], torch.Generator] | None = None


@dataclass(frozen=True)
class T:
    """A tensor of a row: its name (with `{i}` in layers), its symbolic shape, and when it exists."""

    name: str
    shape: str
    when: str = ""


Carry = Callable[[list[Array], Sizes, Context, str], list[Array]]


@dataclass(frozen=True)
class Layout:
    """How values of a row cross: both directions take and give tensors in the order of the row's existing tensors.

    Attributes:
        computes: the side, `megatron` or `hf`, whose values are computed with torch, in float32; else they are moved.
    """

    to_megatron: Carry | None
    to_hf: Carry | None
    computes: str = ""


@dataclass(frozen=True)
class Row:
    """One kind of tensor: Megatron side, Hugging Face side, layout, and where it occurs.

    Attributes:
        scope: `model` (once), `layer` (every layer), `dense` or `moe` (layers of that kind).
        when: a condition of `Sizes.holds`.
        cast: whether `--dtype` applies; routers keep their precision.
    """

    megatron: tuple[T, ...]
    hf: tuple[T, ...]
    layout: Layout
    scope: str = "layer"
    when: str = ""
    cast: bool = True


def _same(arrays: list[Array], sizes: Sizes, context: Context, where: str) -> list[Array]:
    return arrays


def _pad_vocab(arrays: list[Array], sizes: Sizes, context: Context, where: str) -> list[Array]:
    """[V, H] -> [P, H]: zero rows at the end."""
    missing = sizes.padded_vocab_size - sizes.vocab_size
    return [concatenate((rows, *[library(rows).zeros_like(rows[:1])] * missing)) for rows in arrays]


def _trim_vocab(arrays: list[Array], sizes: Sizes, context: Context, where: str) -> list[Array]:
    """[P, H] -> [V, H]."""
    return [arrays[0][: sizes.vocab_size]]


def _merge_qkv(arrays: list[Array], sizes: Sizes, context: Context, where: str) -> list[Array]:
    """Interleave by query group: the group's query heads, then its key head, then its value head."""
    groups, head = sizes.num_query_groups, sizes.kv_channels
    tail = arrays[0].shape[1:]
    parts = [t.reshape(groups, -1, head, *tail) for t in arrays]
    return [concatenate(parts, 1).reshape(-1, *tail)]


def _split_qkv(arrays: list[Array], sizes: Sizes, context: Context, where: str) -> list[Array]:
    """Undo `_merge_qkv`."""
    (merged,) = arrays
    per_group = sizes.num_attention_heads // sizes.num_query_groups
    tail = merged.shape[1:]
    grouped = merged.reshape(sizes.num_query_groups, per_group + 2, sizes.kv_channels, *tail)
    cuts = (slice(0, per_group), slice(per_group, per_group + 1), slice(per_group + 1, None))
    return [grouped[:, cut].reshape(-1, *tail) for cut in cuts]


def _merge_gate_up(arrays: list[Array], sizes: Sizes, context: Context, where: str) -> list[Array]:
    return [upcycling.pack_gate_up(*arrays)]


def _split_gate_up(arrays: list[Array], sizes: Sizes, context: Context, where: str) -> list[Array]:
    return _equal_parts(arrays[0], 2)


def _split_groups(arrays: list[Array], sizes: Sizes, context: Context, where: str) -> list[Array]:
    """[E, ...] -> one [n, ...] for each group, LM first."""
    return _equal_parts(arrays[0], sizes.num_groups)


def _merge_groups(arrays: list[Array], sizes: Sizes, context: Context, where: str) -> list[Array]:
    return [concatenate(arrays)]


def _equal_parts(array: Array, count: int) -> list[Array]:
    size = array.shape[0] // count
    return [array[part * size : (part + 1) * size] for part in range(count)]


def _unfold_router(arrays: list[Array], sizes: Sizes, context: Context, where: str) -> list[Array]:
    """A plain router [E, H] becomes W_h = its rows and W_f = 0 in each group."""
    weights = _split_groups(arrays, sizes, context, where)
    if not sizes.spectral:
        return weights
    return [t for weight in weights for t in (weight, library(weight).zeros_like(weight))]


def _fold_router(tensors: list[Tensor], sizes: Sizes, context: Context, where: str) -> list[Tensor]:
    """W_h and W_f of each group become the rows of one plain float32 router [E, H] (eq. 3-5, folded)."""
    assert context.fold is not None
    step = 2 if sizes.spectral else 1
    folded = [
        context.fold(tensors[j], tensors[j + 1] if sizes.spectral else None) for j in range(0, len(tensors), step)
    ]
    return [concatenate(folded).float()]


def _merge_router_bias(tensors: list[Tensor], sizes: Sizes, context: Context, where: str) -> list[Tensor]:
    """The groups' biases become one, float32 as the weight: training in bfloat16 leaves it in bfloat16."""
    return [concatenate(tensors).float()]


def _upcycle_gate_up(arrays: list[Array], sizes: Sizes, context: Context, where: str) -> list[Array]:
    return [upcycling.experts_from_dense_gate_up(arrays[0], arrays[1], sizes.num_experts_per_group, sizes.expert_init)]


def _upcycle_down(arrays: list[Array], sizes: Sizes, context: Context, where: str) -> list[Array]:
    return [upcycling.experts_from_dense_down(arrays[0], sizes.num_experts_per_group, sizes.expert_init)]


def _new_router(tensors: list[Tensor], sizes: Sizes, context: Context, where: str) -> list[Tensor]:
    """Draw W_h, then W_f, from a generator of this layer's own."""
    assert context.generator is not None
    generator = context.generator(where)
    shape = (sizes.num_experts_per_group, sizes.hidden_size)
    return [upcycling.init_router_weight(*shape, sizes.init_std, generator) for _ in range(1 + sizes.spectral)]


def _new_bias(arrays: list[Array], sizes: Sizes, context: Context, where: str) -> list[Array]:
    return [np.zeros(sizes.num_experts_per_group)]


SAME = Layout(_same, _same)
VOCAB = Layout(_pad_vocab, _trim_vocab)
QKV = Layout(_merge_qkv, _split_qkv)
GATE_UP = Layout(_merge_gate_up, _split_gate_up)
EXPERT_GROUPS = Layout(_split_groups, _merge_groups)
ROUTER = Layout(_unfold_router, _fold_router, computes="hf")
ROUTER_BIAS = Layout(_split_groups, _merge_router_bias, computes="hf")
UPCYCLED_GATE_UP = Layout(_upcycle_gate_up, None)
UPCYCLED_DOWN = Layout(_upcycle_down, None)
NEW_ROUTER = Layout(_new_router, None, computes="megatron")
NEW_ROUTER_BIAS = Layout(_new_bias, None)

_M = "decoder.layers.{i}."
_E = _M + "mlp.experts."
_LM, _MT = _E + "lm_experts.experts.", _E + "mt_experts.experts."
_R = _M + "mlp.router."
_H = "model.layers.{i}."
_A = _H + "self_attn."

_SHARED_ROWS = (
    Row((T("embedding.word_embeddings.weight", "P H"),), (T("model.embed_tokens.weight", "V H"),), VOCAB, "model"),
    Row((T(_M + "self_attention.linear_qkv.layer_norm_weight", "H"),), (T(_H + "input_layernorm.weight", "H"),), SAME),
    Row((T(_M + "self_attention.linear_qkv.weight", "QKV H"),),
        (T(_A + "q_proj.weight", "Q H"), T(_A + "k_proj.weight", "K H"), T(_A + "v_proj.weight", "K H")), QKV),
    Row((T(_M + "self_attention.linear_qkv.bias", "QKV"),),
        (T(_A + "q_proj.bias", "Q"), T(_A + "k_proj.bias", "K"), T(_A + "v_proj.bias", "K")), QKV, when="qkv_bias"),
    Row((T(_M + "self_attention.linear_proj.weight", "H Q"),), (T(_A + "o_proj.weight", "H Q"),), SAME),
    Row((T(_M + "mlp.linear_fc1.layer_norm_weight", "H"),),
        (T(_H + "post_attention_layernorm.weight", "H"),), SAME, "dense"),
    Row((T(_M + "pre_mlp_layernorm.weight", "H"),), (T(_H + "post_attention_layernorm.weight", "H"),), SAME, "moe"),
    Row((T(_M + "mlp.linear_fc1.weight", "2F H"),),
        (T(_H + "mlp.gate_proj.weight", "F H"), T(_H + "mlp.up_proj.weight", "F H")), GATE_UP, "dense"),
    Row((T(_M + "mlp.linear_fc2.weight", "H F"),), (T(_H + "mlp.down_proj.weight", "H F"),), SAME, "dense"),
    Row((T("decoder.final_layernorm.weight", "H"),), (T("model.norm.weight", "H"),), SAME, "model"),
    Row((T("output_layer.weight", "P H"),), (T("lm_head.weight", "V H"),), VOCAB, "model", when="untied"),
)  # fmt: skip

_MIXMOE_ROWS = (
    Row((T(_R + "lm.weight", "n H"), T(_R + "lm.spectral_weight", "n H", "spectral"),
         T(_R + "mt.weight", "n H", "mt"), T(_R + "mt.spectral_weight", "n H", "mt_spectral")),
        (T(_H + "mlp.router.weight", "E H"),), ROUTER, "moe", cast=False),
    Row((T(_R + "lm.bias", "n"), T(_R + "mt.bias", "n", "mt")),
        (T(_H + "mlp.router.bias", "E"),), ROUTER_BIAS, "moe", when="router_bias", cast=False),
    Row((T(_LM + "linear_fc1.weight", "n 2f H"), T(_MT + "linear_fc1.weight", "n 2f H", "mt")),
        (T(_H + "mlp.experts.gate_up_proj", "E 2f H"),), EXPERT_GROUPS, "moe"),
    Row((T(_LM + "linear_fc2.weight", "n H f"), T(_MT + "linear_fc2.weight", "n H f", "mt")),
        (T(_H + "mlp.experts.down_proj", "E H f"),), EXPERT_GROUPS, "moe"),
)  # fmt: skip

_UPCYCLING_ROWS = (
    Row((T(_R + "lm.weight", "n H"), T(_R + "lm.spectral_weight", "n H", "spectral")),
        (), NEW_ROUTER, "moe", cast=False),
    Row((T(_R + "lm.bias", "n"),), (), NEW_ROUTER_BIAS, "moe", when="router_bias", cast=False),
    Row((T(_LM + "linear_fc1.weight", "n 2f H"),),
        (T(_H + "mlp.gate_proj.weight", "F H"), T(_H + "mlp.up_proj.weight", "F H")), UPCYCLED_GATE_UP, "moe"),
    Row((T(_LM + "linear_fc2.weight", "n H f"),),
        (T(_H + "mlp.down_proj.weight", "H F"),), UPCYCLED_DOWN, "moe"),
)  # fmt: skip

# A model whose Hugging Face side is dense or Mix-MoE, and a dense one that becomes an upcycled Megatron one.
TABLES = {"same": _SHARED_ROWS + _MIXMOE_ROWS, "upcycle": _SHARED_ROWS + _UPCYCLING_ROWS}

# Modules whose `_extra_state` (empty without fp8) Megatron asks for on loading: (module, scope). Both Megatron's own
# linear layers and Transformer Engine's are covered; a model ignores the entries of modules it lacks.
EXTRA_STATE_MODULES = (
    (_M + "self_attention.linear_qkv", "layer"),
    (_M + "self_attention.linear_proj", "layer"),
    (_M + "self_attention.core_attention", "layer"),
    (_M + "mlp.linear_fc1", "dense"),
    (_M + "mlp.linear_fc2", "dense"),
    (_M + "pre_mlp_layernorm", "moe"),
    (_E + "{g}_experts.experts.linear_fc1", "expert"),
    (_E + "{g}_experts.experts.linear_fc2", "expert"),
    ("decoder.final_layernorm", "model"),
)


def extra_state_keys(sizes: Sizes) -> list[str]:
    """Return the keys under which a torch_dist checkpoint of this model stores its empty `_extra_state` objects.

    A key ends in the object's place among its like: `shard_2_4` is layer 2 of 4 stacked ones, or expert 2 of 4.
    """
    keys = []
    moe = set(sizes.moe_layers)
    for module, scope in EXTRA_STATE_MODULES:
        if scope == "model":
            keys.append(f"{module}._extra_state/shard_0_1")
        elif scope == "expert":
            groups, n = GROUPS[: sizes.num_groups], sizes.num_experts_per_group
            places = ((layer, group, expert) for layer in sizes.moe_layers for group in groups for expert in range(n))
            keys += [
                f"{module.replace('{g}', g)}._extra_state/shard_{e}_{n}".replace("{i}", str(i)) for i, g, e in places
            ]
        else:
            layers = [i for i in range(sizes.num_layers) if scope == "layer" or (i in moe) == (scope == "moe")]
            for i in layers:
                place = f"shard_{i}_{sizes.num_layers}" if not moe else "shard_0_1"
                name = module.replace("{i}.", "" if not moe else f"{i}.")
                keys.append(f"{name}._extra_state/{place}")
    return keys
