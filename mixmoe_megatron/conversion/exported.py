"""What an exported Mix-MoE model carries beside its weights: its config.json, written and read, and its code.

Written without transformers, whose import would take most of an export's time. A test holds that `MixMoEConfig` reads
what it would have written itself.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from mixmoe_megatron.checkpoint.metadata import Metadata
from mixmoe_megatron.conversion.hf_config import hf_config_from_megatron_args, megatron_args_from_hf, model_family
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model.mapping import Sizes
from mixmoe_megatron.model.options import OPTION_NAMES, MixMoEOptions, resolve_moe_layers

_CODE = Path(__file__).resolve().parents[1] / "hf"
_AUTO_MAP = {
    "AutoConfig": "configuration_mixmoe.MixMoEConfig",
    "AutoModel": "modeling_mixmoe.MixMoEModel",
    "AutoModelForCausalLM": "modeling_mixmoe.MixMoEForCausalLM",
}
# Options that are fields of config.json by the same name.
_OPTION_FIELDS = (
    "num_experts_per_group", "topk_per_group", "group_combine", "router_prob_scaling", "renormalize_topk",
    "router_bias",
)  # fmt: skip
# Fields of the base's config.json that describe the base, or that `rope_parameters` replaces.
_NOT_INHERITED = ("_name_or_path", "rope_theta", "rope_scaling")


def mixmoe_config(base_config: dict[str, Any], options: MixMoEOptions, sizes: Sizes) -> dict[str, Any]:
    """Return the config.json of a Mix-MoE model, but for its dtype.

    Args:
        base_config: config.json of the dense base.
        options: of the model.
        sizes: of the model; the number of groups is its stage.

    Raises:
        MixMoEError: as `megatron_args_from_hf`, or the model has a shared expert.
    """
    if options.shared_experts:
        raise MixMoEError("the format mixmoe has no place for a shared expert: export with --format qwen2_moe.")
    dense = hf_config_from_megatron_args(megatron_args_from_hf(base_config))
    family = model_family(base_config)
    scaling = dense["rope_scaling"] or {"rope_type": "default"}
    config = {
        **base_config,
        **dense,
        "model_type": "mixmoe",
        "base_model_type": "llama" if family == "mistral" else family,  # whose sliding window does not act
        "rope_parameters": {**scaling, "rope_theta": dense["rope_theta"]},
        "moe_layers": list(sizes.moe_layers),
        "stage": sizes.num_groups,
        **{name: getattr(options, name) for name in _OPTION_FIELDS},
        "num_experts": options.num_experts_per_group * sizes.num_groups,
        "num_experts_per_tok": options.topk_per_group * sizes.num_groups,
        "moe_intermediate_size": sizes.moe_ffn_hidden_size,
        "expert_scale": options.resolved_expert_scale,
        "mixmoe": options.to_dict(),
        "architectures": ["MixMoEForCausalLM"],
        "auto_map": _AUTO_MAP,
    }
    if not config.get("use_sliding_window"):
        config["sliding_window"] = None
    return {name: config[name] for name in sorted(config.keys() - set(_NOT_INHERITED))}


def options_from_hf(config: dict[str, Any], shipped: Metadata | None = None) -> MixMoEOptions:
    """Return the Mix-MoE options of an exported model's config.json; its model fields win over its record of options.

    Args:
        config: of the exported model.
        shipped: metadata beside it, for the options if config.json records none.

    Raises:
        MixMoEError: the fields are missing or out of range, or contradict each other.
    """
    recorded = config.get("mixmoe") or (shipped and shipped.options) or {}
    if not isinstance(recorded, dict):
        raise MixMoEError(f"config.json: mixmoe must be an object, not {recorded!r}.")
    values = {name: value for name, value in recorded.items() if name in OPTION_NAMES}
    try:
        config = {"renormalize_topk": False, **config}  # older exports have no such field
        values |= {name: config[name] for name in _OPTION_FIELDS}
        layers, scale, width = config["moe_layers"], config["expert_scale"], config["moe_intermediate_size"]
    except KeyError as error:
        raise MixMoEError(f"config.json of this Mix-MoE model lacks {error.args[0]}.") from None
    for name, one in (("num_experts", "num_experts_per_group"), ("num_experts_per_tok", "topk_per_group")):
        if config.get(name) not in (None, config[one] * config["stage"]):
            raise MixMoEError(f"config.json: {name} must be {one} times stage, not {config[name]!r}; or leave it out.")
    if not isinstance(layers, list):
        raise MixMoEError(f"config.json: moe_layers must be a list of layer indices, not {layers!r}.")
    if not (values.get("expert_scale") is None and scale == values["num_experts_per_group"]):
        values["expert_scale"] = scale
    if values["num_experts_per_group"] > 1:
        if width == config["intermediate_size"]:
            values["expert_init"] = "copy"
        elif values.get("expert_init", "copy") == "copy":
            values["expert_init"] = "slice"
    values.setdefault("router_init_std", None)  # so were the routers of exports that do not tell
    options = MixMoEOptions.from_dict(values)
    widths = {config["intermediate_size"] // n for n in (1, options.num_experts_per_group)}
    if width not in widths:
        raise MixMoEError(
            f"config.json: moe_intermediate_size must be {' or '.join(map(str, sorted(widths)))}, not {width!r}."
        )
    num_layers = config["num_hidden_layers"]
    has_placement = "moe_layer_placement" in values or num_layers >= options.moe_every
    if not has_placement or resolve_moe_layers(options, num_layers) != layers:
        options = MixMoEOptions.from_dict({**values, "moe_layer_placement": ",".join(map(str, layers))})
    return options


def code_files() -> list[Path]:
    """Return the paths of the Python files that an exported model must contain."""
    return [_CODE / "configuration_mixmoe.py", _CODE / "modeling_mixmoe.py"]


def copy_code(directory: str | os.PathLike[str]) -> None:
    """Copy the model's code into a directory, each file atomically. `save_pretrained` of the model does it by itself.

    Args:
        directory: an existing directory.

    Raises:
        FileNotFoundError: the directory does not exist.
    """
    for source in code_files():
        target = Path(directory) / source.name
        temporary = target.with_suffix(".py.tmp")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
