"""The configuration of the Hugging Face Mix-MoE model: derived fields, RoPE in both styles, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mixmoe_megatron.hf import MixMoEConfig, MixMoEModel
from tests.helpers.tiny_hf import tiny_dense, tiny_dense_config, tiny_mixmoe_config


def test_config_derives_and_round_trips(tmp_path: Path) -> None:
    config = MixMoEConfig(mixmoe={"preset": "paper"})
    assert config.moe_layers == [3, 7, 11, 15]
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (8, 2, 2048)
    assert config.expert_scale == 4.0
    config.save_pretrained(tmp_path)
    assert MixMoEConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 9])
def test_a_model_of_few_layers_has_an_moe_layer(layers: int) -> None:
    """As users' model tests build it: two layers."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 99}
    config = MixMoEConfig(num_hidden_layers=layers, **sizes)
    assert config.moe_layers == {1: [0], 2: [1], 3: [2], 4: [3], 5: [3], 9: [3, 7]}[layers]
    assert MixMoEModel(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.shape == (1, 3, 32)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rope_is_the_same_in_every_style(family: str) -> None:
    """rope_theta, rope_scaling (4.57) and rope_parameters (5.x) give the base model's frequencies, also when edited."""
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 64
    dense = tiny_dense(family, rope_theta=7000.0, rope_scaling=dict(llama3))
    old_style = {"rope_theta": 7000.0, "rope_scaling": llama3, "rope_parameters": None}
    new_style = {"rope_parameters": {"rope_theta": 7000.0, **llama3}}
    for style in (old_style, new_style):
        config = tiny_mixmoe_config(family, **style)
        written = json.loads(config.to_json_string())
        assert written["rope_parameters"] == new_style["rope_parameters"]
        assert not {"rope_theta", "rope_scaling"} & written.keys(), "one record"
        assert (config.rope_theta, config.rope_scaling) == (7000.0, llama3)
        assert torch.equal(MixMoEModel(config).rotary_emb.inv_freq, dense.model.rotary_emb.inv_freq)
    config.rope_scaling = None
    config.rope_theta = 9000.0
    assert config.rope_parameters == {"rope_theta": 9000.0, "rope_type": "default"}
    assert config.rope_scaling is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_model_type": "gpt2"}, "base_model_type"),
        ({"stage": 3}, "stage must be 1 or 2"),
        ({"topk_per_group": 5}, "topk_per_group"),
        ({"num_experts": 7}, "num_experts must be 8"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok must be 2"),
        ({"moe_layers": [1, 1]}, "distinct"),
        ({"moe_layers": [16]}, "distinct indices in 0..15"),
        ({"moe_layers": []}, "moe_layers is empty"),
        ({"group_combine": "max"}, "group_combine"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ],
    ids=str,
)
def test_config_refuses(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixMoEConfig(**fields)


def test_config_of_another_base_is_refused() -> None:
    with pytest.raises(ValueError, match="base_model_type"):
        MixMoEConfig.from_base_config({**tiny_dense_config("llama").to_dict(), "model_type": "gpt_neox"})


@pytest.mark.parametrize(
    ("fields", "theta", "factor"),
    [({"rope_theta": 7.0}, 7.0, 4.0), ({"rope_scaling": None}, 5.0, None), ({}, 5.0, 4.0)],
)
def test_older_names_override_a_base_of_transformers_5(fields: dict, theta: float, factor: float | None) -> None:
    base = tiny_dense_config("llama").to_dict()
    base = {name: value for name, value in base.items() if name not in ("rope_theta", "rope_scaling")}
    base["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5.0}
    found = MixMoEConfig.from_base_config(base, **fields)
    assert found.rope_theta == theta and (found.rope_scaling or {}).get("factor") == factor
