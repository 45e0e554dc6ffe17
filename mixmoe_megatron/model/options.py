"""The Mix-MoE options: every one with its default, the two presets, and what follows from them. Needs no Megatron.

Words: n = num_experts_per_group, k = topk_per_group, L = num_layers, F = ffn_hidden_size. A stage is 0 (dense, no
experts), 1 (LM experts) or 2 (LM and MT experts); the number of active groups equals the stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from typing import Any

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.registry import phase_of_stage
from mixmoe_megatron.model.upcycling import EXPERT_INITS, expert_ffn_hidden_size

#: Coefficient of the aux loss in the paper (lambda of eq. 8-9). Megatron's own flag is --moe-aux-loss-coeff.
PAPER_AUX_LOSS_COEFF = 0.01

_PLACEMENTS = ("last", "uniform-first", "bottom", "top", "dense_bottom", "inner", "measured")
_PAPER = {
    "preset": "paper",
    "spectral_norm": "backward",
    "group_combine": "sum",
    "expert_scale": 1.0,
    "router_init_std": None,
}


def _option(default: Any, meaning: str, choices: tuple[str, ...] = (), shown: str = "") -> Any:
    """Make a field that knows what `--help` and the checks need.

    Args:
        default: the option's value in the preset `recommended`.
        meaning: what the option does, for `--help`.
        choices: the only values that the option takes; empty: any value of its type.
        shown: what stands for the value in `--help` where neither the choices nor the type say it.
    """
    return dataclasses.field(default=default, metadata={"meaning": meaning, "choices": choices, "shown": shown})


@dataclass
class MixMoEOptions:
    """What the paper leaves open, and what it fixes. The defaults are the preset `recommended`.

    Source: Mix-MoE (arXiv:2605.24681) section III. Deviates: D1 to D10 (model/README.md).

    Args: each is explained where it stands below, and in `hf_to_mixmoe.py --help`.

    Raises:
        MixMoEError: a value is outside its range; the message names the option.
    """

    preset: str = _option("recommended", "name of the preset that these options started from", ("recommended", "paper"))
    num_experts_per_group: int = _option(4, "n, the experts of the LM group, and as many in the MT group")
    topk_per_group: int = _option(1, "k, the experts that each group chooses for a token")
    spectral_transform: str = _option(
        "fft", "linear map of the router's second input (Table V)", ("fft", "dct", "random", "none")
    )
    spectral_norm: str = _option(
        "ortho", "ortho keeps the length of h; backward is the unnormalised transform", ("ortho", "backward")
    )
    spectral_scale: float = _option(1.0, "factor of the spectral features")
    spectral_seed: int = _option(0, "seed of the transform random")
    group_combine: str = _option("mean", "how the outputs of the two groups combine", ("mean", "sum"))
    router_prob_scaling: bool = _option(True, "scale an expert's output by s times its probability p")
    renormalize_topk: bool = _option(False, "divide the probabilities of a group's chosen experts by their sum")
    expert_scale: float | None = _option(None, "s; left out it is n, so that s * p = 1 at uniform p")
    router_init_std: float | None = _option(
        0.02,
        "standard deviation of the first logits, for an RMS-normalised input: small, so that p starts near 1 / n; null "
        "draws the weights with the base's initializer_range",
    )
    expert_init: str = _option(
        "slice",
        "slice cuts the dense FFN into n experts of width F / n; important does so after sorting its neurons by what "
        "they do on the text of --measure, and fits each expert's down projection to the whole FFN there; copy gives "
        "each expert all of it",
        EXPERT_INITS,
    )
    mt_router_init: str = _option(
        "copy", "how the MT router starts: as a copy of the LM router, or random", ("copy", "random")
    )
    router_bias: bool = _option(True, "give the routers a bias, zero at the start")
    lb_reduction: str = _option("mean", "average or add the aux losses of the MoE layers", ("mean", "sum"))
    base_expert: bool = _option(
        False,
        "keep the first LM expert, a copy of the FFN, as a part of its own, which no phase of experts trains (MoE-LPR)",
    )
    shared_experts: int = _option(
        0,
        "cut the FFN into so many slices more, the first ones, which work on every token as one expert that no router "
        "chooses (LLaMA-MoE v2's residual)",
    )
    moe_layer_placement: str = _option(
        "last",
        "which layers are MoE layers; last: the last of each moe_every; inner: of these not the model's first and its "
        "last; measured: where the text of --measure says that an FFN is missed least; or 0-based indices such as 3,7",
        shown=",".join([*_PLACEMENTS, "INDICES"]),
    )
    moe_every: int = _option(4, "one layer of so many is an MoE layer (their number, for all placements but indices)")

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> MixMoEOptions:
        """Return the options of a preset ("recommended" or "paper"), some overridden.

        Raises:
            MixMoEError: the preset or an option is unknown, or a value is outside its range.
        """
        if name not in (presets := _FIELDS["preset"].metadata["choices"]):
            raise MixMoEError(f"preset must be one of {', '.join(presets)}, got {name!r}.")
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

    @property
    def spectral(self) -> tuple[str, str, float, int]:
        """The transform, its norm, the factor and the seed: what the functions of `spectral.py` take."""
        return self.spectral_transform, self.spectral_norm, self.spectral_scale, self.spectral_seed

    def validate(self) -> None:
        """Raise MixMoEError at the first option whose value is outside its range."""
        for name in ("num_experts_per_group", "topk_per_group", "moe_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MixMoEError(f"{name} must be a positive integer, got {value!r}.")
        for name, field in _FIELDS.items():
            value, choices = getattr(self, name), field.metadata["choices"]
            if choices and value not in choices:
                raise MixMoEError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
            if not isinstance(value, _KINDS[name]) or (isinstance(value, bool) and bool not in _KINDS[name]):
                raise MixMoEError(f"{name} must be {_KIND_NAMES[_KINDS[name][0]][1]}, got {value!r}.")
        if self.topk_per_group > self.num_experts_per_group:
            raise MixMoEError(
                f"topk_per_group={self.topk_per_group} exceeds num_experts_per_group={self.num_experts_per_group}."
            )
        if self.shared_experts < 0:
            raise MixMoEError(f"shared_experts must not be negative, got {self.shared_experts!r}.")
        if self.shared_experts and self.expert_init != "slice":
            raise MixMoEError("shared_experts needs expert_init=slice: a shared expert is a slice beside the others.")
        if self.base_expert and (self.expert_init != "copy" or self.num_experts_per_group < 2):
            raise MixMoEError("base_expert needs expert_init=copy and num_experts_per_group of 2 or more.")
        if self.expert_scale is not None and not 0 < self.expert_scale < float("inf"):
            raise MixMoEError(f"expert_scale must be positive and finite (or left out), got {self.expert_scale!r}.")
        if self.router_init_std is not None and not 0 <= self.router_init_std < float("inf"):
            raise MixMoEError(f"router_init_std must be finite and not negative, got {self.router_init_std!r}.")
        if not 0 <= self.spectral_scale < float("inf"):
            raise MixMoEError(f"spectral_scale must be finite and not negative, got {self.spectral_scale!r}.")
        if self.moe_layer_placement not in _PLACEMENTS:
            _parse_layer_list(self.moe_layer_placement)


_FIELDS = {field.name: field for field in dataclasses.fields(MixMoEOptions)}
OPTION_NAMES: tuple[str, ...] = tuple(_FIELDS)
#: option -> types that a value may have; a whole number may stand for a float
_KINDS: dict[str, tuple[type, ...]] = {
    name: (*(typing.get_args(kind) or (kind,)), *((int,) if kind in (float, float | None) else ()))
    for name, kind in typing.get_type_hints(MixMoEOptions).items()
}
#: type -> what stands for a value in `--help`, and in a sentence
_KIND_NAMES = {int: ("N", "an integer"), float: ("X", "a number"), bool: ("true,false", "true or false"),
               str: ("TEXT", "text")}  # fmt: skip


def add_option_arguments(parser: argparse._ActionsContainer, names: tuple[str, ...] = OPTION_NAMES[1:]) -> None:
    """Add one flag for each option: values and default come from its field. Flags that are not given leave nothing.

    Args:
        parser: an argparse parser, or a group of one.
        names: the options to add. The preset is not among them, because the other options override it.
    """
    for name in names:
        field = _FIELDS[name]
        shown = field.metadata["shown"] or ",".join(field.metadata["choices"]) or _KIND_NAMES[_KINDS[name][0]][0]
        default = "left out" if field.default is None else str(field.default).lower()
        paper = f"; preset paper: {_PAPER[name]}" if name in _PAPER else ""
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=str if _KINDS[name] == (str,) else _json_or_text,
            default=argparse.SUPPRESS,
            metavar=f"{{{shown}}}" if "," in shown else shown,
            help=f"{field.metadata['meaning']} (default: {default}{paper})",
        )


def _json_or_text(text: str) -> Any:
    """Read a value; what is no JSON is refused by `MixMoEOptions.validate`, which says what it must be."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


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
    each, "bottom" the first m layers, "top" the last m, "dense_bottom" the first 2 m (layers 1-8 of 16), "inner" what
    "last" takes but for the first and the last layer of the model. "measured" is a request to a conversion, which puts
    m indices in its place.

    Source: Mix-MoE (arXiv:2605.24681) section III-A ("every 4") and Table VI. Deviates: D8 (model/README.md).

    Raises:
        MixMoEError: there is no MoE layer, a listed index is not a layer of the model, or nothing was measured.
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
        raise MixMoEError(
            f"moe_every={every} gives no MoE layer in a model of {num_layers} layers: at most {num_layers} goes."
        )
    if placement == "measured":
        raise MixMoEError(
            "moe_layer_placement=measured needs text to measure on: give hf_to_mixmoe.py --measure FILE or name layers."
        )
    if placement in ("last", "inner"):
        ends = (0, num_layers - 1) if placement == "inner" else ()
        layers = [layer for layer in range(every - 1, num_layers, every) if layer not in ends]
        if not layers:
            raise MixMoEError(f"moe_layer_placement=inner gives no MoE layer in a model of {num_layers} layers.")
        return layers
    if placement == "uniform-first":
        return [every * i for i in range(count)]
    if placement == "top":
        return list(range(num_layers - count, num_layers))
    return list(range(min(num_layers, count if placement == "bottom" else 2 * count)))


def router_weight_std(options: MixMoEOptions, hidden_size: int, initializer_range: float) -> float:
    """Return the standard deviation of a new router's weights W_h and W_f, such that the logits have router_init_std.

    For h of length sqrt(H), as RMSNorm leaves it, a row of W_h gives a logit of deviation std * sqrt(H), and a row of
    W_f one of std * |f|. With f = M h, |f|^2 is H times the mean square of M's singular values: 1/2 for the real part
    of an orthonormal FFT, 1 for the other orthonormal transforms. Deviates: D14 (model/README.md).

    Args:
        options: the Mix-MoE options.
        hidden_size: H.
        initializer_range: the base's, which is taken without router_init_std (as the paper does).
    """
    if options.router_init_std is None:
        return initializer_range
    energy = {"none": 0.0, "fft": 0.5, "dct": 1.0, "random": 1.0}[options.spectral_transform]
    if options.spectral_norm == "backward":
        energy *= hidden_size * (2 if options.spectral_transform == "dct" else 1)
    return options.router_init_std / math.sqrt(hidden_size * (1 + energy * options.spectral_scale**2))


def mixmoe_megatron_args(options: MixMoEOptions, stage: int, num_layers: int, ffn_hidden_size: int) -> dict[str, Any]:
    """Return the Megatron arguments that follow from the options, by their names in Megatron's args namespace.

    Args:
        options: the Mix-MoE options.
        stage: 0 (dense: the arguments that switch experts off), 1 or 2.
        num_layers: L, the layers of the whole model.
        ffn_hidden_size: F, the width of the dense FFN.

    Returns:
        Argument -> value, for stages 1 and 2 among them the number and the width of the experts and the MoE layers.

    Raises:
        MixMoEError: F is not divisible by n (and the shared experts), there is no MoE layer, the stage is unknown, or
            it has MT experts beside a base expert or a shared one.
    """
    phase_of_stage(stage)  # refuses an unknown one
    if stage == 0:
        return {"num_experts": None, "moe_layer_freq": 1}
    for name in ("base_expert", "shared_experts"):
        if stage == 2 and getattr(options, name):
            raise MixMoEError(f"{name} goes with one group of experts: there are no MT experts beside it.")
    n, shared = options.num_experts_per_group, options.shared_experts
    width = expert_ffn_hidden_size(ffn_hidden_size, n, options.expert_init, shared)
    layers = set(resolve_moe_layers(options, num_layers))
    return {
        "num_experts": n * stage,
        "moe_router_topk": options.topk_per_group * stage,
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": shared * width or None,
        "moe_layer_freq": [int(i in layers) for i in range(num_layers)],
        "moe_router_pre_softmax": True,
        "moe_router_score_function": "softmax",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_router_dtype": "fp32",
    }
