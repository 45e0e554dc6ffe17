"""The configuration of the model family: the fields of an export's config.json under their names there, and presets.

Nothing here needs fairseq2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.hf import MixMoEConfig

FAMILY = "mixmoe"
#: Fields of config.json that `MixMoEConfig` writes by itself, some of them derived from others.
_WRITTEN_ANEW = (
    "architectures",
    "auto_map",
    "model_type",
    "num_experts",
    "num_experts_per_tok",
    "transformers_version",
)
#: Fields of `MixMoEModelConfig` that config.json has not.
_OUR_OWN = ("other_fields", "side_files")
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(kw_only=True)
class MixMoEModelConfig:
    """What a Mix-MoE model is; the defaults are those of the architecture `tiny`.

    All fields but the last two stand in config.json under the same name, see `hf.MixMoEConfig` for their meaning.

    Attributes:
        other_fields: of config.json: what else stands there, which an export to Hugging Face keeps.
        side_files: directory of an exported model whose tokenizer, generation settings and licence such an export takes
            along; None: it has none.
    """

    base_model_type: str = "llama"
    stage: int = 2
    moe_layers: list[int] | None = None
    num_experts_per_group: int = 4
    topk_per_group: int = 1
    moe_intermediate_size: int | None = None
    group_combine: str = "mean"
    router_prob_scaling: bool = True
    renormalize_topk: bool = False
    expert_scale: float | None = None
    router_bias: bool = True
    vocab_size: int = 512
    hidden_size: int = 32
    intermediate_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = 2
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, object] = field(default_factory=dict)
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mixmoe: dict[str, object] = field(default_factory=dict)
    dtype: str | None = None
    other_fields: dict[str, object] = field(default_factory=dict)
    side_files: str | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], side_files: str | None = None) -> MixMoEModelConfig:
        """Return the configuration of an exported model.

        Args:
            config: content of its config.json.
            side_files: see the class.

        Raises:
            MixMoEError: a field is outside its range, or asks for what fairseq2's attention does not do.
        """
        hf = _checked(dict(config))
        known = {f.name for f in fields(cls)} - set(_OUR_OWN)
        values = {name: getattr(hf, name) for name in known - {"dtype"}}
        others = config.keys() - known - set(_WRITTEN_ANEW) - {"torch_dtype", "rope_theta", "rope_scaling"}
        return cls(
            **values,
            dtype=config.get("dtype") or config.get("torch_dtype"),
            other_fields={name: config[name] for name in sorted(others)},
            side_files=side_files,
        )

    def to_hf(self) -> MixMoEConfig:
        """Return the configuration of the Hugging Face model.

        Raises:
            MixMoEError: see `from_hf`.
        """
        values = asdict(self)
        own = {name: values.pop(name) for name in _OUR_OWN}
        return _checked({**own["other_fields"], **values})


def _checked(values: dict[str, Any]) -> MixMoEConfig:
    """Return the Hugging Face configuration of these fields.

    Raises:
        MixMoEError: see `MixMoEModelConfig.from_hf`.
    """
    values = {name: value for name, value in values.items() if name not in _WRITTEN_ANEW}
    try:
        hf = MixMoEConfig(**values)
    except ValueError as error:
        raise MixMoEError(f"This is no Mix-MoE model that fairseq2 can run: {error}") from error
    if getattr(hf, "sliding_window", None) is not None:
        raise MixMoEError("A model with a sliding window does not run in fairseq2: this family has none.")
    if hf.attention_dropout:
        raise MixMoEError(f"attention_dropout must be 0 in fairseq2, not {hf.attention_dropout}.")
    return hf


def architectures() -> dict[str, MixMoEModelConfig]:
    """Return the presets by name; their experts are those of the recommended options."""
    llama: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    qwen: dict[str, Any] = {
        "base_model_type": "qwen2",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }
    return {
        "tiny": MixMoEModelConfig(),
        "llama3_2_1b": MixMoEModelConfig(
            **llama, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            tie_word_embeddings=True, rope_parameters={**_LLAMA3_ROPE, "factor": 32.0},
        ),
        "llama3_1_8b": MixMoEModelConfig(
            **llama, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            rope_parameters={**_LLAMA3_ROPE, "factor": 8.0},
        ),
        "qwen2_5_0_5b": MixMoEModelConfig(
            **qwen, vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
            num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        ),
        "qwen2_5_14b": MixMoEModelConfig(
            **{**qwen, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}, vocab_size=152064, hidden_size=5120,
            intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8,
        ),
    }  # fmt: skip
