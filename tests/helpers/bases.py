"""config.json of the real bases of the cluster examples (their public sizes), and their parameter counts."""

from __future__ import annotations

from typing import Any

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}


def _llama3_rope(factor: float) -> dict[str, Any]:
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **fixed}


#: example -> config.json of its base
BASES: dict[str, dict[str, Any]] = {
    "llama3.2_1b": {
        **_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True, "rope_scaling": _llama3_rope(32.0),
    },
    "llama3.1_8b": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
        "tie_word_embeddings": False, "rope_scaling": _llama3_rope(8.0),
    },
    "qwen2.5_14b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064,
        "max_position_embeddings": 131072, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
}  # fmt: skip

#: example -> parameters of its base, as its model card counts them
PARAMETERS = {"llama3.2_1b": 1_235_814_400, "llama3.1_8b": 8_030_261_248, "qwen2.5_14b": 14_770_033_664}
GPUS = {"llama3.2_1b": 8, "llama3.1_8b": 64, "qwen2.5_14b": 128}
