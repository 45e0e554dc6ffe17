"""config.json <-> Megatron arguments: every value that matters crosses, what cannot cross is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixmoe_megatron.conversion.hf_config import (
    hf_config_from_megatron_args,
    megatron_args_from_hf,
    read_hf_config,
    vocab_multiple,
)
from mixmoe_megatron.errors import MixMoEError

LLAMA32_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0,
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "vocab_size": 128256,
}  # fmt: skip
QWEN25_14B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 5120,
    "intermediate_size": 13824, "max_position_embeddings": 131072, "max_window_layers": 48, "num_attention_heads": 40,
    "num_hidden_layers": 48, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 152064,
    "layer_types": ["full_attention"] * 48,
}  # fmt: skip


def test_llama32() -> None:
    args = megatron_args_from_hf(LLAMA32_1B)
    assert args["rope_scaling_factor"] == 32.0 and args["use_rope_scaling"] and args["rotary_base"] == 500000
    assert not args["untie_embeddings_and_output_weights"] and not args["add_qkv_bias"] and not args["add_bias_linear"]
    assert (args["num_query_groups"], args["kv_channels"], args["ffn_hidden_size"]) == (8, 64, 8192)


def test_qwen25() -> None:
    args = megatron_args_from_hf(QWEN25_14B)
    assert args["add_qkv_bias"] and args["untie_embeddings_and_output_weights"] and not args["use_rope_scaling"]
    assert args["kv_channels"] == 128 and args["group_query_attention"]


@pytest.mark.parametrize("config", [LLAMA32_1B, QWEN25_14B], ids=["llama", "qwen2"])
def test_there_and_back(config: dict[str, Any]) -> None:
    args = megatron_args_from_hf(config)
    back = hf_config_from_megatron_args(args)
    assert megatron_args_from_hf(back) == args
    assert {name: back[name] for name in back if name in config} == {
        name: config[name] for name in config if name in back
    }


def test_rope_of_transformers_5() -> None:
    new = {k: v for k, v in LLAMA32_1B.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_theta": 500000.0, **LLAMA32_1B["rope_scaling"]}
    assert megatron_args_from_hf(new) == megatron_args_from_hf(LLAMA32_1B)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "MixtralForCausalLM is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is not supported"),
        ({"model_type": "qwen2"}, "architectures LlamaForCausalLM and model_type qwen2 disagree"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding_window 4096 hides earlier tokens"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 4096}, "sliding_window 4096 hides earlier tokens"),
        ({"layer_types": ["chunked_attention"]}, "layer_types with chunked_attention"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "sliding_window 4096 hides"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not known here"),
        ({"embedding_multiplier": 12}, "embedding_multiplier"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
        ({"head_dim": -2}, "head_dim must be a positive integer"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number"),
        ({"rope_theta": 0}, "rope_theta must be a positive number"),
        ({"initializer_range": -0.02}, "initializer_range must be a number from 0 on"),
        ({"initializer_range": float("nan")}, "initializer_range must be a number from 0 on"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "two values of rope_theta"),
        ({"rope_parameters": {"factor": 7.0}}, "disagree about factor"),
        ({"rope_scaling": {"rope_type": "llama3", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {**LLAMA32_1B["rope_scaling"], "attention_factor": 2.0}}, "RoPE setting attention_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "'linear'"),
        ({"rope_scaling": {**LLAMA32_1B["rope_scaling"], "high_freq_factor": 2.0}}, "high_freq_factor is 2.0"),
        ({"num_attention_heads": 30, "head_dim": None}, "not divisible by num_attention_heads"),
        ({"num_key_value_heads": 5}, "not divisible by num_key_value_heads"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MixMoEError, match=message):
        megatron_args_from_hf({**LLAMA32_1B, **changes})


def test_two_words_for_one_activation() -> None:
    assert megatron_args_from_hf({**LLAMA32_1B, "hidden_act": "swish"}) == megatron_args_from_hf(LLAMA32_1B)


def test_absent_fields_take_the_familys_own_defaults() -> None:
    """As transformers does: key-value heads as many as heads in Llama, 8 in Mistral; a window of 4096 in Mistral."""
    plain = {k: v for k, v in LLAMA32_1B.items() if k not in ("num_key_value_heads", "head_dim")}
    assert megatron_args_from_hf(plain)["num_query_groups"] == 32
    mistral = {**plain, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    assert megatron_args_from_hf({**mistral, "sliding_window": None})["num_query_groups"] == 8
    assert megatron_args_from_hf({**mistral, "max_position_embeddings": 4096})["kv_channels"] == 64


def test_what_transformers_itself_writes_is_known() -> None:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    for kind in (LlamaConfig, MistralConfig, Qwen2Config):
        fields = kind(sliding_window=None) if kind is MistralConfig else kind()
        everything = {**fields.to_dict(), "architectures": [kind.__name__.replace("Config", "ForCausalLM")]}
        assert megatron_args_from_hf(everything)["hidden_size"] == fields.hidden_size


def test_vocabularies_of_real_models_need_no_padding_up_to_tp8() -> None:
    for size in (128256, 152064, 151936, 49152):
        assert size % (8 * vocab_multiple(size)) == 0
    assert [vocab_multiple(size) for size in (50257, 50258, 8000)] == [1, 2, 16]


def test_reading(tmp_path: Path) -> None:
    with pytest.raises(MixMoEError, match=r"no config\.json"):
        read_hf_config(tmp_path)
    for text, message in (("{", "not valid JSON"), ("[]", "not a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(MixMoEError, match=message):
            read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA32_1B))
    assert read_hf_config(tmp_path) == LLAMA32_1B
