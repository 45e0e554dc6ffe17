"""The mapping tables between Hugging Face and Megatron: one row for each kind of tensor.

A row names its tensors on both sides, gives each a shape, and names the crossing that carries values over. Plans are
made from the tables alone, before any weight is read: an unmapped, unused or misshapen key is an error that names it.
A crossing moves values, or makes zeros, and may be run on numbers in place of the values; the few tensors whose values
are computed are marked so, and `model.router_rows` computes them.

Megatron names are the keys of a torch_dist checkpoint, one per layer. `{i}` is the layer number from 0.

Shape legend: H hidden_size, F ffn_hidden_size, Q attention heads x head size, K query groups x head size, QKV = Q + 2K,
V vocabulary, P padded vocabulary, r LoRA's rank, n experts per group, m LM experts beside the base expert (n or n - 1),
E experts of all groups (n or 2n), f moe_ffn_hidden_size, s inner size of the shared expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mixmoe_megatron.methods.mixmoe import GROUPS
from mixmoe_megatron.model import upcycling
from mixmoe_megatron.model.router_rows import new_lora_matrix, new_router_weight
from mixmoe_megatron.model.upcycling import Array

Scope = Literal["model", "layer", "dense", "moe"]
Side = Literal["megatron", "hf"]


@dataclass(frozen=True)
class Sizes:
    """Everything that shapes and conditions in the tables depend on.

    Attributes:
        tied: the output layer is the word embedding.
        qkv_bias: the query, key and value projections have a bias (Qwen2).
        moe_layers: 0-based numbers of the Mix-MoE layers; empty for a dense model.
        num_groups: 1 in stage 1 (LM), 2 in stage 2 (LM and MT).
        base_expert: the first LM expert is a part of its own.
        shared_experts: how many experts wide the shared expert is; 0: there is none.
        router_bias: the routers have a bias.
        new_layers: 0-based numbers of layers that the base has not; they are dense.
        lora_rank: r of the low-rank matrices beside the linear layers; 0: there are none.
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
    new_layers: tuple[int, ...] = ()
    lora_rank: int = 0
    num_groups: int = 0
    num_experts_per_group: int = 0
    moe_ffn_hidden_size: int = 0
    base_expert: bool = False
    shared_experts: int = 0
    router_bias: bool = True
    spectral: bool = True
    expert_init: str = "slice"
    init_std: float = 0.02

    def shape(self, symbols: str) -> tuple[int, ...]:
        """Evaluate a shape such as `n 2f H` (see the legend of this module)."""
        q = self.num_attention_heads * self.kv_channels
        k = self.num_query_groups * self.kv_channels
        n, inner, shared = self.num_experts_per_group, self.moe_ffn_hidden_size, self.shared_ffn_hidden_size
        values = {
            "H": self.hidden_size, "F": self.ffn_hidden_size, "2F": 2 * self.ffn_hidden_size,
            "Q": q, "K": k, "QKV": q + 2 * k, "V": self.vocab_size, "P": self.padded_vocab_size,
            "1": 1, "r": self.lora_rank, "n": n,
            "m": n - self.base_expert, "E": n * self.num_groups, "f": inner, "2f": 2 * inner,
            "s": shared, "2s": 2 * shared,
        }  # fmt: skip
        return tuple(values[symbol] for symbol in symbols.split())

    @property
    def shared_ffn_hidden_size(self) -> int:
        """Inner size of the shared expert; 0: there is none."""
        return self.shared_experts * self.moe_ffn_hidden_size

    def blocks(self) -> dict[str, int]:
        """Return the parts that a layer's experts are stored in, in logical order, and how many experts each holds."""
        groups = {f"{group}_experts": self.num_experts_per_group for group in GROUPS[: self.num_groups]}
        return {"base_expert": 1, "lm_experts": self.num_experts_per_group - 1} if self.base_expert else groups

    @property
    def is_stacked(self) -> bool:
        """Whether a checkpoint keeps like tensors of all layers in one, as Megatron does where all layers are alike."""
        return not (self.moe_layers or self.new_layers or self.lora_rank)

    def layers(self, scope: Scope) -> list[int]:
        """Return the 0-based numbers of the layers in a scope: of all, of the dense or of the Mix-MoE ones."""
        moe = set(self.moe_layers)
        return [i for i in range(self.num_layers) if scope == "layer" or (i in moe) == (scope == "moe")]


Condition = Callable[[Sizes], bool]


def always(sizes: Sizes) -> bool:
    """Whether a tensor exists that every model has."""
    return True


def is_untied(sizes: Sizes) -> bool:
    """Whether the output layer has a weight of its own."""
    return not sizes.tied


def has_qkv_bias(sizes: Sizes) -> bool:
    """Whether the query, key and value projections have a bias."""
    return sizes.qkv_bias


def has_router_bias(sizes: Sizes) -> bool:
    """Whether the routers have a bias."""
    return sizes.router_bias


def is_spectral(sizes: Sizes) -> bool:
    """Whether a group's router has a spectral weight."""
    return sizes.spectral


def has_base_expert(sizes: Sizes) -> bool:
    """Whether the first LM expert is a part of its own."""
    return sizes.base_expert


def has_shared_expert(sizes: Sizes) -> bool:
    """Whether an expert works on every token beside those that the router chooses."""
    return sizes.shared_experts > 0


def has_mt(sizes: Sizes) -> bool:
    """Whether there is an MT group."""
    return sizes.num_groups == 2


def has_spectral_mt(sizes: Sizes) -> bool:
    """Whether there is an MT group whose router has a spectral weight."""
    return has_mt(sizes) and is_spectral(sizes)


@dataclass(frozen=True)
class Key:
    """A tensor of a row: its name (with `{i}` in layers), its symbolic shape, and when it exists."""

    name: str
    shape: str
    when: Condition = always


#: Arrays of one side -> arrays of the other, each in the order of the row's tensors that exist.
Move = Callable[[list[Array], Sizes], list[Array]]


#: What a new tensor begins with: its Megatron name, its shape, the model's sizes, a seed -> float32 values.
Draw = Callable[[str, tuple[int, ...], Sizes, int], Array]


@dataclass(frozen=True)
class Crossing:
    """How values of a row move, each way; None where they do not move but are computed, or there is no such way.

    Attributes:
        new: how a start makes the row's Megatron tensors, where nothing moves there.
    """

    to_megatron: Move | None
    to_hf: Move | None
    new: Draw | None = None


@dataclass(frozen=True)
class Row:
    """One kind of tensor: Megatron side, Hugging Face side, crossing, and where it occurs.

    Attributes:
        scope: `model` (once), `layer` (every layer), `dense` or `moe` (layers of that kind).
        when: whether the model has such a row.
        is_router: its tensors are never cast by `--dtype`, and are float32 in Hugging Face.
    """

    megatron: tuple[Key, ...]
    hf: tuple[Key, ...]
    crossing: Crossing
    scope: Scope = "layer"
    when: Condition = always
    is_router: bool = False

    def keys(self, side: Side, sizes: Sizes) -> list[Key]:
        """Return the row's tensors of a side that exist in a model of these sizes."""
        return [key for key in getattr(self, side) if key.when(sizes)]


def _same(arrays: list[Array], sizes: Sizes) -> list[Array]:
    return arrays


def _pad_vocab(arrays: list[Array], sizes: Sizes) -> list[Array]:
    """[V, H] -> [P, H]: zero rows at the end."""
    (rows,) = arrays
    zeros = np.zeros((sizes.padded_vocab_size - sizes.vocab_size, *rows.shape[1:]), rows.dtype)
    return [np.concatenate((rows, zeros))]


def _trim_vocab(arrays: list[Array], sizes: Sizes) -> list[Array]:
    """[P, H] -> [V, H]."""
    return [arrays[0][: sizes.vocab_size]]


def _merge_qkv(arrays: list[Array], sizes: Sizes) -> list[Array]:
    """Interleave by query group: the group's query heads, then its key head, then its value head."""
    groups, head = sizes.num_query_groups, sizes.kv_channels
    tail = arrays[0].shape[1:]
    parts = [array.reshape(groups, -1, head, *tail) for array in arrays]
    return [np.concatenate(parts, 1).reshape(-1, *tail)]


def _split_qkv(arrays: list[Array], sizes: Sizes) -> list[Array]:
    """Undo `_merge_qkv`."""
    (merged,) = arrays
    per_group = sizes.num_attention_heads // sizes.num_query_groups
    tail = merged.shape[1:]
    grouped = merged.reshape(sizes.num_query_groups, per_group + 2, sizes.kv_channels, *tail)
    return [part.reshape(-1, *tail) for part in np.split(grouped, [per_group, per_group + 1], axis=1)]


def _merge_gate_up(arrays: list[Array], sizes: Sizes) -> list[Array]:
    return [upcycling.pack_gate_up(*arrays)]


def _split_gate_up(arrays: list[Array], sizes: Sizes) -> list[Array]:
    return np.split(arrays[0], 2)


def _split_groups(arrays: list[Array], sizes: Sizes) -> list[Array]:
    """[E, ...] -> one [n, ...] for each group, LM first."""
    return np.split(arrays[0], sizes.num_groups)


def _merge_groups(arrays: list[Array], sizes: Sizes) -> list[Array]:
    return [np.concatenate(arrays)]


def split_blocks(arrays: list[Array], sizes: Sizes) -> list[Array]:
    """Cut the experts of all groups, one array [E, ...], into the parts that Megatron keeps them in.

    Args:
        arrays: the one array.
        sizes: of the model.
    """
    return np.split(arrays[0], list(itertools.accumulate(sizes.blocks().values()))[:-1])


def _unfold_router(arrays: list[Array], sizes: Sizes) -> list[Array]:
    """A plain router [E, H] becomes W_h = its rows and W_f = 0 in each group."""
    weights = _split_groups(arrays, sizes)
    return [array for weight in weights for array in (weight, np.zeros_like(weight))[: 1 + sizes.spectral]]


def _upcycle_gate_up(arrays: list[Array], sizes: Sizes) -> list[Array]:
    """The first neurons become the shared expert, if there is one, the others the experts."""
    n, init, shared = sizes.num_experts_per_group, sizes.expert_init, sizes.shared_ffn_hidden_size
    gate, up = arrays
    experts = split_blocks([upcycling.experts_from_dense_gate_up(gate[shared:], up[shared:], n, init)], sizes)
    return [*experts, *([upcycling.pack_gate_up(gate[:shared], up[:shared])] if shared else [])]


def _upcycle_down(arrays: list[Array], sizes: Sizes) -> list[Array]:
    n, init, shared = sizes.num_experts_per_group, sizes.expert_init, sizes.shared_ffn_hidden_size
    (down,) = arrays
    experts = split_blocks([upcycling.experts_from_dense_down(down[:, shared:], n, init)], sizes)
    return [*experts, *([down[:, :shared]] if shared else [])]


def _new_bias(arrays: list[Array], sizes: Sizes) -> list[Array]:
    return [np.zeros(sizes.num_experts_per_group, np.int64)]


def _new_router(name: str, shape: tuple[int, ...], sizes: Sizes, seed: int) -> Array:
    return new_router_weight(name, shape, sizes.init_std, seed)


def _new_lora(name: str, shape: tuple[int, ...], sizes: Sizes, seed: int) -> Array:
    return np.zeros(shape, np.float32) if name.endswith("_b") else new_lora_matrix(name, shape, seed)


SAME = Crossing(_same, _same)
VOCAB = Crossing(_pad_vocab, _trim_vocab)
QKV = Crossing(_merge_qkv, _split_qkv)
GATE_UP = Crossing(_merge_gate_up, _split_gate_up)
ROUTER_BIASES = Crossing(_split_groups, _merge_groups)
EXPERTS = Crossing(split_blocks, _merge_groups)
ROUTER = Crossing(_unfold_router, None)
UPCYCLED_GATE_UP = Crossing(_upcycle_gate_up, None)
UPCYCLED_DOWN = Crossing(_upcycle_down, None)
NEW_ROUTER = Crossing(None, None, _new_router)
NEW_LORA = Crossing(None, None, _new_lora)
NEW_ROUTER_BIAS = Crossing(_new_bias, None)

_M = "decoder.layers.{i}."
_E = _M + "mlp.experts."
_BASE, _LM, _MT = _E + "base_expert.experts.", _E + "lm_experts.experts.", _E + "mt_experts.experts."
_S = _M + "mlp.shared_experts."
_R = _M + "mlp.router."
_H = "model.layers.{i}."
_A = _H + "self_attn."

SHARED_ROWS = (
    Row((Key("embedding.word_embeddings.weight", "P H"),), (Key("model.embed_tokens.weight", "V H"),), VOCAB, "model"),
    Row((Key(_M + "self_attention.linear_qkv.layer_norm_weight", "H"),),
        (Key(_H + "input_layernorm.weight", "H"),), SAME),
    Row((Key(_M + "self_attention.linear_qkv.weight", "QKV H"),),
        (Key(_A + "q_proj.weight", "Q H"), Key(_A + "k_proj.weight", "K H"), Key(_A + "v_proj.weight", "K H")), QKV),
    Row((Key(_M + "self_attention.linear_qkv.bias", "QKV"),),
        (Key(_A + "q_proj.bias", "Q"), Key(_A + "k_proj.bias", "K"), Key(_A + "v_proj.bias", "K")), QKV,
        when=has_qkv_bias),
    Row((Key(_M + "self_attention.linear_proj.weight", "H Q"),), (Key(_A + "o_proj.weight", "H Q"),), SAME),
    Row((Key(_M + "mlp.linear_fc1.layer_norm_weight", "H"),),
        (Key(_H + "post_attention_layernorm.weight", "H"),), SAME, "dense"),
    Row((Key(_M + "pre_mlp_layernorm.weight", "H"),), (Key(_H + "post_attention_layernorm.weight", "H"),), SAME, "moe"),
    Row((Key(_M + "mlp.linear_fc1.weight", "2F H"),),
        (Key(_H + "mlp.gate_proj.weight", "F H"), Key(_H + "mlp.up_proj.weight", "F H")), GATE_UP, "dense"),
    Row((Key(_M + "mlp.linear_fc2.weight", "H F"),), (Key(_H + "mlp.down_proj.weight", "H F"),), SAME, "dense"),
    Row((Key("decoder.final_layernorm.weight", "H"),), (Key("model.norm.weight", "H"),), SAME, "model"),
    Row((Key("output_layer.weight", "P H"),), (Key("lm_head.weight", "V H"),), VOCAB, "model", when=is_untied),
)  # fmt: skip

_MIXMOE_ROWS = (
    Row((Key(_R + "lm.weight", "n H"), Key(_R + "lm.spectral_weight", "n H", is_spectral),
         Key(_R + "mt.weight", "n H", has_mt), Key(_R + "mt.spectral_weight", "n H", has_spectral_mt)),
        (Key(_H + "mlp.router.weight", "E H"),), ROUTER, "moe", is_router=True),
    Row((Key(_R + "lm.bias", "n"), Key(_R + "mt.bias", "n", has_mt)),
        (Key(_H + "mlp.router.bias", "E"),), ROUTER_BIASES, "moe", when=has_router_bias, is_router=True),
    Row((Key(_BASE + "linear_fc1.weight", "1 2f H", has_base_expert), Key(_LM + "linear_fc1.weight", "m 2f H"),
         Key(_MT + "linear_fc1.weight", "n 2f H", has_mt)),
        (Key(_H + "mlp.experts.gate_up_proj", "E 2f H"),), EXPERTS, "moe"),
    Row((Key(_BASE + "linear_fc2.weight", "1 H f", has_base_expert), Key(_LM + "linear_fc2.weight", "m H f"),
         Key(_MT + "linear_fc2.weight", "n H f", has_mt)),
        (Key(_H + "mlp.experts.down_proj", "E H f"),), EXPERTS, "moe"),
)  # fmt: skip

_UPCYCLING_ROWS = (
    Row((Key(_R + "lm.weight", "n H"), Key(_R + "lm.spectral_weight", "n H", is_spectral)),
        (), NEW_ROUTER, "moe", is_router=True),
    Row((Key(_R + "lm.bias", "n"),), (), NEW_ROUTER_BIAS, "moe", when=has_router_bias, is_router=True),
    Row((Key(_BASE + "linear_fc1.weight", "1 2f H", has_base_expert), Key(_LM + "linear_fc1.weight", "m 2f H"),
         Key(_S + "linear_fc1.weight", "2s H", has_shared_expert)),
        (Key(_H + "mlp.gate_proj.weight", "F H"), Key(_H + "mlp.up_proj.weight", "F H")), UPCYCLED_GATE_UP, "moe"),
    Row((Key(_BASE + "linear_fc2.weight", "1 H f", has_base_expert), Key(_LM + "linear_fc2.weight", "m H f"),
         Key(_S + "linear_fc2.weight", "H s", has_shared_expert)),
        (Key(_H + "mlp.down_proj.weight", "H F"),), UPCYCLED_DOWN, "moe"),
)  # fmt: skip

#: module and matrix in Megatron, layer in Hugging Face, shape of its weight
LORA_LAYERS = (
    ("self_attention.linear_qkv.lora.q", "self_attn.q_proj", "Q H"),
    ("self_attention.linear_qkv.lora.k", "self_attn.k_proj", "K H"),
    ("self_attention.linear_qkv.lora.v", "self_attn.v_proj", "K H"),
    ("self_attention.linear_proj.lora.o", "self_attn.o_proj", "H Q"),
    ("mlp.linear_fc1.lora.gate", "mlp.gate_proj", "F H"),
    ("mlp.linear_fc1.lora.up", "mlp.up_proj", "F H"),
    ("mlp.linear_fc2.lora.down", "mlp.down_proj", "H F"),
)


def _lora_rows(crossing: Crossing, in_hf: bool) -> tuple[Row, ...]:
    """A and B of each layer; on the Hugging Face side a PEFT adapter's, or nothing."""
    rows = []
    for megatron, hf, shape in LORA_LAYERS:
        rows_of, columns_of = shape.split()
        for kind, theirs, symbols in (("a", "A", f"r {columns_of}"), ("b", "B", f"{rows_of} r")):
            key = Key(f"base_model.model.{_H}{hf}.lora_{theirs}.weight", symbols)
            rows.append(Row((Key(f"{_M}{megatron}_{kind}", symbols),), (key,) * in_hf, crossing, "dense"))
    return tuple(rows)


LORA_ROWS = _lora_rows(SAME, in_hf=True)
#: What lies on both sides: a dense or Mix-MoE model, a dense one and what is upcycled of it, or a dense one and LoRA.
TABLES = {
    "same": SHARED_ROWS + _MIXMOE_ROWS,
    "upcycle": SHARED_ROWS + _UPCYCLING_ROWS,
    "new lora": SHARED_ROWS + _lora_rows(NEW_LORA, in_hf=False),
    "lora": SHARED_ROWS + LORA_ROWS,
}
