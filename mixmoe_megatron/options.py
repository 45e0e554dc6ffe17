"""The Mix-MoE options: every one with its default, the two presets, and what follows from them. Needs no Megatron.

Words: n = num_experts_per_group, k = topk_per_group, L = num_layers, F = ffn_hidden_size. A stage is 0 (dense, no
experts), 1 (LM experts) or 2 (LM and MT experts); the number of active groups equals the stage.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mixmoe_megatron.errors import MixMoEError

_CHOICES: dict[str, tuple[str, ...]] = {
    "preset": ("recommended", "paper"),
    "spectral_transform": ("fft", "dct", "random", "none"),
    "spectral_norm": ("ortho", "backward"),
    "group_combine": ("mean", "sum"),
    "expert_init": ("slice", "copy"),
    "mt_router_init": ("copy", "random"),
    "lb_reduction": ("mean", "sum"),
}
_PLACEMENTS = ("last", "uniform-first", "bottom", "top", "dense_bottom")
_PAPER = {"preset": "paper", "spectral_norm": "backward", "group_combine": "sum", "expert_scale": 1.0}


@dataclass
class MixMoEOptions:
    """What the paper leaves open, and what it fixes. The defaults are the preset `recommended`.

    Source: Mix-MoE (arXiv:2605.24681) section III. Deviates: README, table of decisions.

    Args:
        preset: name of the preset these options started from (a record; it changes nothing by itself).
        num_experts_per_group: experts in the LM group, and as many in the MT group.
        topk_per_group: experts chosen per token in each group.
        spectral_transform: linear map of the router's second input: "fft", "dct", "random" or "none" (Table V).
        spectral_norm: "ortho" keeps the length of h; "backward" is the unnormalised transform.
        spectral_scale: factor of the spectral features.
        spectral_seed: seed of the transform "random".
        group_combine: how the outputs of the two groups combine: "mean" or "sum".
        router_prob_scaling: scale an expert's output by s * p; False: leave it as it is.
        expert_scale: s. None: num_experts_per_group, so that s * p = 1 at uniform p.
        expert_init: "slice" cuts the dense FFN into n experts of width F / n; "copy" gives each the full width.
        mt_router_init: the MT router starts as a "copy" of the LM router, or "random".
        router_bias: give the routers a bias (zero at the start).
        lb_reduction: the aux losses of the MoE layers are averaged ("mean") or added ("sum").
        moe_layer_placement: "last", "uniform-first", "bottom", "top", "dense_bottom" or 0-based indices as "3,7".
        moe_every: one layer of so many is an MoE layer (sets their number, for every placement but a list).

    Raises:
        MixMoEError: a value is outside its range; the message names the option.
    """

    preset: str = "recommended"
    num_experts_per_group: int = 4
    topk_per_group: int = 1
    spectral_transform: str = "fft"
    spectral_norm: str = "ortho"
    spectral_scale: float = 1.0
    spectral_seed: int = 0
    group_combine: str = "mean"
    router_prob_scaling: bool = True
    expert_scale: float | None = None
    expert_init: str = "slice"
    mt_router_init: str = "copy"
    router_bias: bool = True
    lb_reduction: str = "mean"
    moe_layer_placement: str = "last"
    moe_every: int = 4

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> MixMoEOptions:
        """Return the options of a preset ("recommended" or "paper"), some overridden.

        Raises:
            MixMoEError: the preset or an option is unknown, or a value is outside its range.
        """
        if name not in _CHOICES["preset"]:
            raise MixMoEError(f"preset must be one of {', '.join(_CHOICES['preset'])}, got {name!r}.")
        return cls.from_dict({**(_PAPER if name == "paper" else {}), **overrides})

    @staticmethod
    def from_dict(values: dict[str, Any]) -> MixMoEOptions:
        """Return the options from `to_dict`'s dictionary; absent ones take their defaults.

        Raises:
            MixMoEError: an option is unknown, or a value is outside its range.
        """
        if unknown := sorted(set(values) - set(OPTION_NAMES)):
            raise MixMoEError(f"unknown Mix-MoE option {unknown[0]!r}; the options are {', '.join(OPTION_NAMES)}.")
        return MixMoEOptions(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name; JSON-able for the options alone."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def resolved_expert_scale(self) -> float:
        """The factor s of s * p * E(h)."""
        return float(self.num_experts_per_group if self.expert_scale is None else self.expert_scale)

    def validate(self) -> None:
        """Raise MixMoEError at the first option whose value is outside its range."""
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise MixMoEError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name in ("num_experts_per_group", "topk_per_group", "moe_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MixMoEError(f"{name} must be a positive integer, got {value!r}.")
        if self.topk_per_group > self.num_experts_per_group:
            raise MixMoEError(
                f"topk_per_group={self.topk_per_group} exceeds num_experts_per_group={self.num_experts_per_group}."
            )
        if self.expert_scale is not None and not self.expert_scale > 0:
            raise MixMoEError(f"expert_scale must be positive (or left out), got {self.expert_scale!r}.")
        if not 0 <= self.spectral_scale < float("inf"):
            raise MixMoEError(f"spectral_scale must be finite and not negative, got {self.spectral_scale!r}.")
        if self.moe_layer_placement not in _PLACEMENTS:
            _parse_layer_list(self.moe_layer_placement)


OPTION_NAMES: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(MixMoEOptions))


def _parse_layer_list(text: str) -> list[int]:
    try:
        layers = [int(part) for part in text.split(",")]
    except (ValueError, AttributeError):
        raise MixMoEError(
            f"moe_layer_placement must be one of {', '.join(_PLACEMENTS)} or 0-based layer indices like 3,7,11, "
            f"got {text!r}."
        ) from None
    if len(set(layers)) != len(layers) or min(layers) < 0:
        raise MixMoEError(f"moe_layer_placement must list distinct layer indices from 0, got {text!r}.")
    return sorted(layers)


def resolve_moe_layers(options: MixMoEOptions, num_layers: int) -> list[int]:
    """Return the 0-based indices of the MoE layers.

    With m = num_layers // moe_every: "last" takes the last layer of each `moe_every`, "uniform-first" the first of
    each, "bottom" the first m layers, "top" the last m, "dense_bottom" the first 2 m (layers 1-8 of 16).

    Source: Mix-MoE (arXiv:2605.24681) section III-A ("every 4") and Table VI.

    Raises:
        MixMoEError: there is no MoE layer, or a listed index is not a layer of the model.
    """
    every, placement = options.moe_every, options.moe_layer_placement
    count = num_layers // every
    if placement not in _PLACEMENTS:
        layers = _parse_layer_list(placement)
        if layers[-1] >= num_layers:
            last = num_layers - 1
            raise MixMoEError(f"moe_layer_placement names layer {layers[-1]}, the model has layers 0..{last}.")
        return layers
    if count == 0:
        raise MixMoEError(f"moe_every={every} gives no MoE layer in a model of {num_layers} layers.")
    if placement == "last":
        return [every * i + every - 1 for i in range(count)]
    if placement == "uniform-first":
        return [every * i for i in range(count)]
    if placement == "top":
        return list(range(num_layers - count, num_layers))
    return list(range(min(num_layers, count if placement == "bottom" else 2 * count)))


def mixmoe_megatron_args(options: MixMoEOptions, stage: int, num_layers: int, ffn_hidden_size: int) -> dict[str, Any]:
    """Return the Megatron arguments that follow from the options, by their names in Megatron's args namespace.

    Args:
        options: the Mix-MoE options.
        stage: 0 (dense: the arguments that switch experts off), 1 or 2.
        num_layers: L.
        ffn_hidden_size: F, the width of the dense FFN.

    Raises:
        MixMoEError: F is not divisible by n, there is no MoE layer, or the stage is unknown.
    """
    check_stage(stage)
    if stage == 0:
        return {"num_experts": None, "moe_layer_freq": 1}
    n = options.num_experts_per_group
    if options.expert_init == "slice" and ffn_hidden_size % n:
        raise MixMoEError(
            f"ffn_hidden_size={ffn_hidden_size} is not divisible by num_experts_per_group={n}: "
            "slicing the FFN into experts needs that (or use expert_init=copy)."
        )
    layers = set(resolve_moe_layers(options, num_layers))
    return {
        "num_experts": n * stage,
        "moe_router_topk": options.topk_per_group * stage,
        "moe_ffn_hidden_size": ffn_hidden_size // n if options.expert_init == "slice" else ffn_hidden_size,
        "moe_layer_freq": [int(i in layers) for i in range(num_layers)],
        "moe_router_pre_softmax": True,
        "moe_router_score_function": "softmax",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_router_dtype": "fp32",
    }


def check_stage(stage: int) -> None:
    """Check a stage's number.

    Raises:
        MixMoEError: it is not 0, 1 or 2.
    """
    if stage not in (0, 1, 2):
        raise MixMoEError(f"mixmoe_stage must be 0 (dense), 1 or 2, got {stage!r}.")
