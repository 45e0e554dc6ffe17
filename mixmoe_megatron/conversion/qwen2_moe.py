"""A model of one expert group as transformers' own `Qwen2MoeForCausalLM`, which servers take without our code.

Its experts stand apart there, its router has no bias, and what scales an expert's output is folded into the down
projection. Its attention may lack the bias (`qkv_bias`). There is always a shared expert, whose output a gate scales by
sigmoid(w h): with w = 0 that is 1/2, and a down projection of twice the values makes it 1, exactly. Where the model has
no shared expert, that of Qwen2Moe has no neurons.

Source: transformers 4.57, models/qwen2_moe.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from mixmoe_megatron.checkpoint.bits import Bits, from_float32, to_float32
from mixmoe_megatron.checkpoint.stored import Region, whole
from mixmoe_megatron.checkpoint.tensors import TensorSource
from mixmoe_megatron.conversion.hf_config import hf_config_from_megatron_args, megatron_args_from_hf
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model.mapping import (
    GATE_UP,
    ROUTER,
    SAME,
    SHARED_ROWS,
    Crossing,
    Key,
    Row,
    Sizes,
    has_base_expert,
    has_shared_expert,
    is_spectral,
    split_blocks,
)
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.model.upcycling import Array

MODEL_TYPE = "qwen2_moe"
_MLP, _MEGATRON = "model.layers.{i}.mlp.", "decoder.layers.{i}.mlp."
_ROUTER, _EXPERTS = _MEGATRON + "router.lm.", _MEGATRON + "experts.lm_experts.experts."
_BASE, _SHARED = _MEGATRON + "experts.base_expert.experts.", _MEGATRON + "shared_experts."
_SHARED_GATE = "shared_expert_gate.weight"
#: what the factor of an expert's output is folded into, on either side
_SCALED = re.compile(r"\.mlp\.experts\.(\d+\.down_proj|(base_expert|lm_experts)\.experts\.linear_fc2)\.weight$")
_SCALED_SHARED = re.compile(r"\.mlp\.(shared_expert\.down_proj|shared_experts\.linear_fc2)\.weight$")
_SHARED_FACTOR = 2  # one over sigmoid(0)
#: fields of config.json that are not as in the dense base's
_FIELDS = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "mlp_only_layers",
    "decoder_sparse_step", "shared_expert_intermediate_size", "qkv_bias",
)  # fmt: skip


def _split_gate_up(arrays: list[Array], sizes: Sizes) -> list[Array]:
    """[n, 2f, H], in one part or two, -> gate and up, [f, H] each, of one expert after the other."""
    return [half for experts in arrays for expert in experts for half in np.split(expert, 2)]


def _merge_gate_up(arrays: list[Array], sizes: Sizes) -> list[Array]:
    pairs = zip(arrays[::2], arrays[1::2], strict=True)
    return split_blocks([np.stack([np.concatenate(pair) for pair in pairs])], sizes)


def _split_experts(arrays: list[Array], sizes: Sizes) -> list[Array]:
    return [expert for experts in arrays for expert in experts]


def _merge_experts(arrays: list[Array], sizes: Sizes) -> list[Array]:
    return split_blocks([np.stack(arrays)], sizes)


def _zeros(arrays: list[Array], sizes: Sizes) -> list[Array]:
    """The gate of a shared expert, [1, H], and, of one without neurons, its projections."""
    hidden = sizes.hidden_size
    shapes = ((1, hidden),) if sizes.shared_experts else ((1, hidden), (0, hidden), (0, hidden), (hidden, 0))
    return [np.zeros(shape, np.int64) for shape in shapes]


def _nothing(arrays: list[Array], sizes: Sizes) -> list[Array]:
    return []


def qwen2_moe_rows(sizes: Sizes) -> tuple[Row, ...]:
    """Return the rows of the mapping table, see `model.mapping`; each expert is a tensor of its own.

    Args:
        sizes: of a model of one group.
    """
    experts = [f"{_MLP}experts.{expert}." for expert in range(sizes.num_experts_per_group)]
    gate_up = tuple(Key(f"{expert}{part}_proj.weight", "f H") for expert in experts for part in ("gate", "up"))
    down = tuple(Key(expert + "down_proj.weight", "H f") for expert in experts)
    shared = tuple(_MLP + f"shared_expert.{part}_proj.weight" for part in ("gate", "up", "down"))
    gate, up, down_of_shared = (Key(name, shape) for name, shape in zip(shared, ("s H", "s H", "H s"), strict=True))
    has_shared = has_shared_expert(sizes)
    shared_rows = (
        Row((Key(_SHARED + "linear_fc1.weight", "2s H"),), (gate, up), GATE_UP, "moe"),
        Row((Key(_SHARED + "linear_fc2.weight", "H s"),), (down_of_shared,), SAME, "moe"),
    )  # fmt: skip
    return (
        *SHARED_ROWS,
        Row((Key(_ROUTER + "weight", "n H"), Key(_ROUTER + "spectral_weight", "n H", is_spectral)),
            (Key(_MLP + "gate.weight", "n H"),), ROUTER, "moe", is_router=True),
        Row((Key(_BASE + "linear_fc1.weight", "1 2f H", has_base_expert),
             Key(_EXPERTS + "linear_fc1.weight", "m 2f H")),
            gate_up, Crossing(_merge_gate_up, _split_gate_up), "moe"),
        Row((Key(_BASE + "linear_fc2.weight", "1 H f", has_base_expert),
             Key(_EXPERTS + "linear_fc2.weight", "m H f")),
            down, Crossing(_merge_experts, _split_experts), "moe"),
        Row((), (Key(_MLP + _SHARED_GATE, "1 H"), *(() if has_shared else (gate, up, down_of_shared))),
            Crossing(_nothing, _zeros), "moe"),
        *(shared_rows if has_shared else ()),
    )  # fmt: skip


def qwen2_moe_config(base_config: dict[str, Any], options: MixMoEOptions, sizes: Sizes) -> dict[str, Any]:
    """Return the config.json of such a model, but for its dtype.

    Args:
        base_config: config.json of the dense base.
        options: of the model.
        sizes: of the model.

    Raises:
        MixMoEError: Qwen2Moe cannot express the model; one sentence says what, and how to export it otherwise.
    """
    args = megatron_args_from_hf(base_config)
    for stands_in_the_way, what in (
        (sizes.num_groups != 1, "two expert groups"),
        (options.router_bias, "a router bias"),
        (not options.router_prob_scaling, "experts that their probabilities do not scale"),
        (
            args["kv_channels"] * args["num_attention_heads"] != args["hidden_size"],
            "heads of another size than H / heads",
        ),
    ):
        if stands_in_the_way and options.shared_experts:
            raise MixMoEError(f"Qwen2Moe, which alone has a place for a shared expert, has none for {what}.")
        if stands_in_the_way:
            raise MixMoEError(f"Qwen2Moe has no place for {what}: export with --format mixmoe.")
    others = ("_name_or_path", "head_dim", "attention_bias", "mlp_bias", "pretraining_tp",
              "layer_types", "rope_parameters")  # fmt: skip
    kept = {name: value for name, value in base_config.items() if name not in others}
    dense = hf_config_from_megatron_args(args)
    del dense["head_dim"]
    return {
        **kept,
        **dense,
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": MODEL_TYPE,
        "num_experts": options.num_experts_per_group,
        "num_experts_per_tok": options.topk_per_group,
        "moe_intermediate_size": sizes.moe_ffn_hidden_size,
        "norm_topk_prob": options.renormalize_topk,
        "mlp_only_layers": sizes.layers("dense"),
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": sizes.shared_ffn_hidden_size,
        "qkv_bias": sizes.qkv_bias,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def check_qwen2_moe_config(
    config: dict[str, Any], base_config: dict[str, Any], options: MixMoEOptions, sizes: Sizes
) -> None:
    """Check that an export's config.json still says what its metadata do.

    Args:
        config: of the export.
        base_config: config.json of the dense base, from the metadata.
        options: of the model, from the metadata.
        sizes: of the model, from the metadata.

    Raises:
        MixMoEError: a field that the model depends on differs.
    """
    expected = qwen2_moe_config(base_config, options, sizes)
    fields = (*_FIELDS, *hf_config_from_megatron_args(megatron_args_from_hf(base_config)))
    for name in fields:
        if name in expected and name in config and config[name] != expected[name] and name != "rope_scaling":
            raise MixMoEError(
                f"config.json: {name} is {config[name]!r}, but the metadata beside it give {expected[name]!r}."
            )


class ScaledSource:
    """A Megatron source whose down projections carry what scales an expert's output; exact for powers of two.

    Args:
        source: of the Megatron side.
        options: of the model.
    """

    def __init__(self, source: TensorSource, options: MixMoEOptions) -> None:
        self._source = source
        self._factors = {_SCALED: options.resolved_expert_scale, _SCALED_SHARED: _SHARED_FACTOR}
        self.names, self.shape, self.dtype = source.names, source.shape, source.dtype

    def read_region(self, name: str, region: Region) -> Bits:
        """Return the bits of a region. Raises what the source raises."""
        bits = self._source.read_region(name, region)
        factor = next((factor for pattern, factor in self._factors.items() if pattern.search(name)), 1)
        if factor == 1:
            return bits
        dtype = self.dtype(name)
        return from_float32(to_float32(bits, dtype) * np.float32(factor), dtype)


class UnscaledSource(ScaledSource):
    """A Qwen2Moe source whose down projections carry it no longer.

    Args:
        source: of the Hugging Face side.
        options: of the model.
    """

    def __init__(self, source: TensorSource, options: MixMoEOptions) -> None:
        super().__init__(source, options)
        self._factors = {pattern: 1 / factor for pattern, factor in self._factors.items()}

    def read_region(self, name: str, region: Region) -> Bits:
        """Return the bits of a region.

        Raises:
            MixMoEError: the region is of a shared expert whose gate is not zero.
        """
        if _SCALED_SHARED.search(name):
            gate = name.replace("shared_expert.down_proj.weight", _SHARED_GATE)
            if to_float32(self._source.read_region(gate, whole(self.shape(gate))), self.dtype(gate)).any():
                raise MixMoEError(f"{gate} is not zero: here a shared expert has the weight 1, and no gate.")
        return super().read_region(name, region)
