"""Translate a Hugging Face config.json into Megatron arguments and back, for the supported dense families.

Families: `llama` (Llama 2 and 3.x, SmolLM2 ...; llama3 RoPE scaling), `mistral` (a Llama, as long as its sliding window
does not act) and `qwen2` (Qwen2, Qwen2.5; QKV bias). Whatever in a config would change the model's output and cannot be
expressed in Megatron is refused in one sentence, not dropped; so is a field that is not known.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mixmoe_megatron.checkpoint.hf_files import own_file
from mixmoe_megatron.checkpoint.megatron_checkpoint import MOST_LAYERS
from mixmoe_megatron.checkpoint.metadata import METADATA_FILE, Metadata
from mixmoe_megatron.errors import MixMoEError

CONFIG_FILE, ADAPTER_FILE = "config.json", "adapter_config.json"
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}
FAMILY_ARCHITECTURE = {family: name for name, family in ARCHITECTURES.items()}
_DEFAULT_ROPE_THETA = 10000.0
_MAX_VOCAB_MULTIPLE = 16
# What megatron.core's RotaryEmbedding._apply_scaling fixes; only the factor is an argument there.
_LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_ROPE_FIELDS = {"type", "rope_type", "rope_theta", "factor", "partial_rotary_factor", *_LLAMA3_FIXED}
# What transformers assumes when the field is absent, where the families differ.
_DEFAULT_KEY_VALUE_HEADS = {"qwen2": 32, "mistral": 8}
_DEFAULT_SLIDING_WINDOW = {"mistral": 4096}
# Megatron's argument -> the field of config.json that says the same, a positive integer.
_SIZES = {
    "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads", "num_query_groups": "num_key_value_heads", "kv_channels": "head_dim",
    "max_position_embeddings": "max_position_embeddings", "vocab_size": "vocab_size",
}  # fmt: skip
# What is not a size must be of one of these types, or null.
_TYPES: dict[str, tuple[type, ...]] = {
    "architectures": (list,), "model_type": (str,), "base_model_type": (str,), "hidden_act": (str,),
    "layer_types": (list,), "sliding_window": (int,), "initializer_range": (int, float), "rope_theta": (int, float),
    "tie_word_embeddings": (bool,),
}  # fmt: skip
# Fields that this module reads or refuses by their value.
_READ = {
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act",
    "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "initializer_range", "attention_bias",
    "attention_dropout", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "quantization_config", "partial_rotary_factor", "transformers_weights",
}  # fmt: skip
# Fields of an exported Mix-MoE model that say how it differs from its dense base.
_MIXMOE = {
    "auto_map", "base_model_type", "expert_scale", "group_combine", "mixmoe", "moe_intermediate_size", "moe_layers",
    "num_experts", "num_experts_per_group", "num_experts_per_tok", "renormalize_topk", "router_bias",
    "router_prob_scaling", "stage", "topk_per_group",
}  # fmt: skip
# Fields that say how to generate, store or label, not what the model computes.
_HARMLESS = {
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "is_llama_config", "label2id", "length_penalty", "max_length", "min_length", "mixmoe_aux_loss_coef",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_router_logits", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
}  # fmt: skip


def read_hf_config(hf_dir: str | Path) -> dict[str, Any]:
    """Read config.json of a Hugging Face directory.

    Raises:
        MixMoEError: the directory or the file is missing, the file is not a JSON object, or an adapter lies there,
            which transformers would add to the weights.
    """
    path = Path(hf_dir) / CONFIG_FILE
    if (Path(hf_dir) / ADAPTER_FILE).is_file():
        raise MixMoEError(
            f"{hf_dir} holds a PEFT adapter ({ADAPTER_FILE}), not all of a model: merge it into its base with peft "
            "(merge_and_unload, save_pretrained) and convert what that saves; if it is merged already, remove "
            f"{ADAPTER_FILE}."
        )
    if path.is_symlink():
        own_file(hf_dir, CONFIG_FILE)
    if not path.is_file():
        cached = sorted(Path(hf_dir).glob("snapshots/*/" + CONFIG_FILE))
        hint = f"; {cached[-1].parent} is one" if cached else ""
        raise MixMoEError(f"{hf_dir} has no {CONFIG_FILE}: it is not a Hugging Face model directory{hint}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MixMoEError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(config, dict):
        raise MixMoEError(f"{path} is not a JSON object.")
    return config


def model_family(config: dict[str, Any]) -> str:
    """Return `llama`, `mistral` or `qwen2`, or the base family of an exported Mix-MoE config.

    Raises:
        MixMoEError: the architecture is not supported.
    """
    if config.get("model_type") == "mixmoe":
        family = config.get("base_model_type")
    else:
        names = config.get("architectures") or []
        family = ARCHITECTURES.get(str(names[0])) if len(names) == 1 else None
        model_type = config.get("model_type") or family
        if family is None and not names and model_type in FAMILY_ARCHITECTURE:
            family = model_type
        if family is not None and model_type != family:  # transformers goes by model_type
            raise MixMoEError(f"config.json: architectures {names[0]} and model_type {model_type} disagree.")
    if family not in FAMILY_ARCHITECTURE:
        given = ", ".join(map(str, config.get("architectures") or [])) or config.get("model_type")
        raise MixMoEError(f"architecture {given} is not supported; supported: {', '.join(ARCHITECTURES)}.")
    return family


def _require(config: dict[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise MixMoEError(f"config.json lacks {name}.")
    return config[name]


def _positive_int(config: dict[str, Any], name: str) -> int:
    value = _require(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise MixMoEError(f"config.json: {name} must be a positive integer, not {value!r}.")
    return value


def _sizes(config: dict[str, Any], family: str) -> dict[str, int]:
    """Return the sizes by Megatron's names; what is absent follows from others as in transformers.

    Raises:
        MixMoEError: one is missing or impossible.
    """
    heads, hidden_size = (_positive_int(config, name) for name in ("num_attention_heads", "hidden_size"))
    filled = {name: value for name, value in config.items() if value is not None}
    if "head_dim" not in filled:
        if hidden_size % heads:
            raise MixMoEError(
                f"config.json: hidden_size {hidden_size} is not divisible by num_attention_heads {heads}."
            )
        filled["head_dim"] = hidden_size // heads
    filled["num_key_value_heads"] = config.get("num_key_value_heads", _DEFAULT_KEY_VALUE_HEADS.get(family)) or heads
    sizes = {ours: _positive_int(filled, theirs) for ours, theirs in _SIZES.items()}
    if sizes["num_layers"] > MOST_LAYERS:
        raise MixMoEError(f"config.json: num_hidden_layers must be {MOST_LAYERS} at most, not {sizes['num_layers']}.")
    if sizes["kv_channels"] % 2:
        raise MixMoEError(f"config.json: head_dim {sizes['kv_channels']} is odd; rotary positions need pairs.")
    if heads % (groups := sizes["num_query_groups"]):
        raise MixMoEError(f"config.json: num_attention_heads {heads} is not divisible by num_key_value_heads {groups}.")
    return sizes


def _refuse_unsupported(config: dict[str, Any], family: str) -> None:
    """Raise on fields whose value Megatron's model cannot express."""
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise MixMoEError(f"config.json: hidden_act {activation!r} is not supported, only 'silu'.")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name) and not (family == "qwen2" and name == "attention_bias"):
            raise MixMoEError(f"config.json: {name} = true is not supported.")
    _refuse_sliding_window(config, family)
    if config.get("quantization_config"):
        raise MixMoEError("config.json: quantization_config is not supported; dequantize the model first.")
    if (config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise MixMoEError(f"config.json: partial_rotary_factor {config['partial_rotary_factor']} is not supported.")
    if config.get("attention_dropout"):
        raise MixMoEError(f"config.json: attention_dropout {config['attention_dropout']} is not supported, only 0.")
    if config.get("transformers_weights"):
        raise MixMoEError(
            f"config.json: transformers_weights = {config['transformers_weights']!r} is not supported; give that file "
            "the usual name (model.safetensors, or model.safetensors.index.json) and remove the field."
        )
    known = _READ | _HARMLESS | (_MIXMOE if config.get("model_type") == "mixmoe" else set())
    for name, value in config.items():
        if name not in known and not name.startswith("_") and value not in (None, False, 0, "", [], {}):
            raise MixMoEError(
                f"config.json: {name} = {json.dumps(value)[:60]} is not known here and may change what the model "
                "computes; if it does not, remove the field."
            )


def _refuse_sliding_window(config: dict[str, Any], family: str) -> None:
    """Raise if tokens cannot see all earlier ones within the model's own context length."""
    layer_types = config.get("layer_types") or []
    if unknown := [kind for kind in layer_types if kind not in ("full_attention", "sliding_attention")]:
        raise MixMoEError(f"config.json: layer_types with {unknown[0]} is not supported.")
    acts = family == "mistral" or config.get("use_sliding_window") or "sliding_attention" in layer_types
    window = config.get("sliding_window", _DEFAULT_SLIDING_WINDOW.get(family))
    longest = _positive_int(config, "max_position_embeddings")
    if acts and window is not None and window < longest:
        raise MixMoEError(
            f"config.json: sliding_window {window} hides earlier tokens within the {longest} positions of "
            "max_position_embeddings, which is not supported; for sequences up to the window, set "
            f"max_position_embeddings to {window}."
        )


def rope_settings(config: dict[str, Any]) -> tuple[float, float | None]:
    """Return RoPE's theta and the llama3 scaling factor (None for plain RoPE).

    Reads `rope_theta` and `rope_scaling` of transformers 4 and `rope_parameters` of transformers 5.

    Raises:
        MixMoEError: a scaling type other than llama3, or llama3 constants that Megatron fixes to other values.
    """
    scaling: dict[str, Any] = {}
    for style in ("rope_parameters", "rope_scaling"):
        given = config.get(style) or {}
        if not isinstance(given, dict):
            raise MixMoEError(f"config.json: {style} must be an object, not {given!r}.")
        if clash := [name for name in given.keys() & scaling.keys() if given[name] != scaling[name]]:
            raise MixMoEError(f"config.json: rope_parameters and rope_scaling disagree about {clash[0]}.")
        scaling.update(given)
    given_thetas: list[Any] = [config.get("rope_theta"), scaling.get("rope_theta")]
    thetas = {float(value) for value in given_thetas if _is_positive(value, "rope_theta")}
    if len(thetas) > 1:
        raise MixMoEError(f"config.json gives two values of rope_theta: {sorted(thetas)}.")
    theta = thetas.pop() if thetas else _DEFAULT_ROPE_THETA
    if (scaling.get("partial_rotary_factor") or 1.0) != 1.0:
        raise MixMoEError(f"config.json: partial_rotary_factor {scaling['partial_rotary_factor']} is not supported.")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise MixMoEError(f"config.json: RoPE scaling type {kind!r} is not supported, only 'llama3'.")
    if unknown := sorted(scaling.keys() - _ROPE_FIELDS):
        raise MixMoEError(f"config.json: the RoPE setting {unknown[0]} is not supported.")
    if kind == "default":
        return theta, None
    for name, fixed in _LLAMA3_FIXED.items():
        if scaling.get(name) != fixed:
            raise MixMoEError(
                f"config.json: rope_scaling.{name} is {scaling.get(name)}, Megatron supports only {fixed}."
            )
    _is_positive(_require(scaling, "factor"), "rope_scaling.factor")
    return theta, float(scaling["factor"])


def _deviation(config: dict[str, Any]) -> float:
    """Return initializer_range, which Megatron and the routers of an upcycled model are initialised with."""
    value = 0.02 if config.get("initializer_range") is None else float(config["initializer_range"])
    if not 0 <= value < 1e30:
        raise MixMoEError(f"config.json: initializer_range must be a number from 0 on, not {value!r}.")
    return value


def _is_positive(value: Any, name: str) -> bool:
    """Whether a number is given at all.

    Raises:
        MixMoEError: it is not a positive number.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30):
        raise MixMoEError(f"config.json: {name} must be a positive number (below 1e30), not {value!r}.")
    return value is not None


def vocab_multiple(vocab_size: int) -> int:
    """Return make_vocab_size_divisible_by: the largest power of two up to 16 that divides the vocabulary.

    Megatron multiplies it by the tensor-parallel size. So nothing is padded without tensor parallelism, and real
    models' vocabularies (128256, 152064, 151936, 49152) are not padded up to tensor-parallel size 8 either.
    """
    multiple = 1
    while multiple < _MAX_VOCAB_MULTIPLE and vocab_size % (2 * multiple) == 0:
        multiple *= 2
    return multiple


def megatron_args_from_hf(config: dict[str, Any]) -> dict[str, Any]:
    """Translate a config.json into Megatron argument values (argparse destinations) of the dense architecture.

    Args:
        config: of a supported dense model, or of an exported Mix-MoE model (then its dense architecture).

    Raises:
        MixMoEError: unsupported architecture or field, or a missing or impossible size.
    """
    for name, types in _TYPES.items():
        if config.get(name) is not None and not isinstance(config[name], types):
            raise MixMoEError(f"config.json: {name} is of the wrong type: {config[name]!r:.60}.")
    family = model_family(config)
    _refuse_unsupported(config, family)
    sizes = _sizes(config, family)
    theta, factor = rope_settings(config)
    epsilon = config["rms_norm_eps"] if _is_positive(config.get("rms_norm_eps"), "rms_norm_eps") else 1e-6
    return {
        **sizes,
        "group_query_attention": sizes["num_query_groups"] != sizes["num_attention_heads"],
        "position_embedding_type": "rope",
        "rotary_base": int(theta) if theta.is_integer() and theta < 1 << 53 else theta,
        "rotary_percent": 1.0,
        "use_rope_scaling": factor is not None,
        "rope_scaling_factor": factor if factor is not None else 8.0,
        "normalization": "RMSNorm",
        "norm_epsilon": float(epsilon),
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": family == "qwen2",
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": _deviation(config),
        "make_vocab_size_divisible_by": vocab_multiple(sizes["vocab_size"]),
    }


def check_architecture(metadata: Metadata) -> None:
    """Check that the Megatron arguments that a checkpoint records are those of the base model that it records.

    Raises:
        MixMoEError: they are not, or are missing.
    """
    for name, value in megatron_args_from_hf(metadata.hf_config).items():
        given = metadata.megatron_args.get(name)
        multiple = name == "make_vocab_size_divisible_by"  # may be chosen
        if (given != value and not multiple) or type(given) is not type(value):
            raise MixMoEError(f"{METADATA_FILE}: megatron_args.{name} is {given!r}, but hf_config gives {value!r}.")


def dense_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of the dense base of an exported Mix-MoE model, from what the export's own says now.

    Raises:
        MixMoEError: as `megatron_args_from_hf`.
    """
    replaced = {"architectures", "model_type", "rope_parameters"}
    kept = {name: value for name, value in config.items() if name not in _MIXMOE | replaced}
    return {**kept, **hf_config_from_megatron_args(megatron_args_from_hf(config))}


def hf_config_from_megatron_args(megatron_args: dict[str, Any]) -> dict[str, Any]:
    """Translate Megatron argument values back into the config.json fields that define the architecture.

    The inverse of `megatron_args_from_hf`: Megatron arguments -> config -> Megatron arguments is the identity.

    Args:
        megatron_args: as returned by `megatron_args_from_hf`.
    """
    args = megatron_args
    family = "qwen2" if args["add_qkv_bias"] else "llama"
    scaling = None
    if args["use_rope_scaling"]:
        scaling = {"rope_type": "llama3", "factor": args["rope_scaling_factor"], **_LLAMA3_FIXED}
    return {
        **{theirs: args[ours] for ours, theirs in _SIZES.items()},
        "architectures": [FAMILY_ARCHITECTURE[family]],
        "model_type": family,
        "rope_theta": float(args["rotary_base"]),
        "rope_scaling": scaling,
        "rms_norm_eps": args["norm_epsilon"],
        "hidden_act": "silu",
        "tie_word_embeddings": not args["untie_embeddings_and_output_weights"],
        "initializer_range": args["init_method_std"],
    }
