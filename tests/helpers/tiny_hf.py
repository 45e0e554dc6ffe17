"""Tiny random Hugging Face models and tokenizers, made offline, for all tests.

Every parameter is random (norms and biases too), so that a converter that swaps or drops one is caught.
"""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaTokenizerFast,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from mixmoe_megatron.hf import MixMoEConfig, MixMoEForCausalLM

VOCAB_SIZE = 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# Llama 3's RoPE scaling, its wavelength limits inside the tiny model's context so that it really acts.
LLAMA3_ROPE: dict[str, Any] = {
    "rope_theta": 5000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
SENTENCES = (
    "Translate this from German to English:\nGerman: Das Haus ist alt.\nEnglish: The house is old.",
    "The river runs through the town and the children play in the garden.",
    "Der Fluss fließt durch die Stadt, und die Kinder spielen im Garten.",
    "Řeka teče městem a děti si hrají na zahradě.",
    "Река течёт через город, и дети играют в саду.",
    "Nehir kasabanın içinden akar ve çocuklar bahçede oynar.",
    "河流穿过城镇，孩子们在花园里玩耍。",
    "Joki virtaa kaupungin läpi, ja lapset leikkivät puutarhassa.",
    "Jõgi voolab läbi linna ja lapsed mängivad aias.",
)


def tiny_llama_config(**fields: Any) -> LlamaConfig:
    """Return the configuration of a 4-layer Llama with Llama 3's RoPE scaling; `fields` override."""
    rope = copy.deepcopy(LLAMA3_ROPE)  # transformers 5.x writes into the dict it is given
    return LlamaConfig(**{**SIZES, **rope, "rms_norm_eps": 1e-5, **fields})


def tiny_qwen2_config(**fields: Any) -> Qwen2Config:
    """Return the configuration of a 4-layer Qwen2 (QKV bias, no RoPE scaling); `fields` override."""
    return Qwen2Config(**{**SIZES, "rope_theta": 20000.0, "rms_norm_eps": 1e-6, **fields})


def tiny_mistral_config(**fields: Any) -> MistralConfig:
    """Return the configuration of a 4-layer Mistral whose sliding window never acts; `fields` override."""
    return MistralConfig(**{**SIZES, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": 256, **fields})


def tiny_dense_config(family: str, **fields: Any) -> PretrainedConfig:
    """Return the tiny configuration of "llama", "qwen2" or "mistral"; `fields` override."""
    makers = {"llama": tiny_llama_config, "qwen2": tiny_qwen2_config, "mistral": tiny_mistral_config}
    return makers[family](**fields)


def tiny_mixmoe_config(family: str = "llama", stage: int = 2, **fields: Any) -> MixMoEConfig:
    """Return the Mix-MoE configuration on the tiny base: MoE layers 1 and 3, 4 experts a group; `fields` override."""
    base = tiny_dense_config(family)
    return MixMoEConfig.from_base_config(base, **{"moe_layers": [1, 3], "stage": stage, **fields})


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Fill every parameter with seeded noise large enough that logits differ clearly: norms around 1, the rest 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith("norm.weight")
            parameter.copy_(1.0 + 0.1 * noise if is_norm else 0.2 * noise)


def tiny_dense(family: str = "llama", tied: bool = False, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Return a random dense model in evaluation mode."""
    model = AutoModelForCausalLM.from_config(tiny_dense_config(family, tie_word_embeddings=tied, **fields))
    randomize(model, seed)
    return model.eval()


def tiny_mixmoe(family: str = "llama", stage: int = 2, seed: int = 0, **fields: Any) -> MixMoEForCausalLM:
    """Return a random Mix-MoE model in evaluation mode."""
    model = MixMoEForCausalLM(tiny_mixmoe_config(family, stage, **fields))
    randomize(model, seed)
    return model.eval()


def save_tiny_dense(
    directory: Path,
    family: str = "llama",
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: str | None = "sentencepiece",
    **fields: Any,
) -> PreTrainedModel:
    """Save a random dense model as a Hugging Face directory and return it.

    Args:
        directory: where to save; made if absent.
        family: "llama", "qwen2" or "mistral".
        tied: tie the output layer to the embedding.
        seed: of the random parameters.
        dtype: of the parameters on disk.
        tokenizer: "sentencepiece", "bpe" or None, see `tiny_tokenizer`.
        fields: configuration fields to override.
    """
    model = tiny_dense(family, tied, seed, **fields).to(dtype)
    model.save_pretrained(directory)
    if tokenizer is not None:
        tiny_tokenizer(directory, tokenizer)
    return model


def tiny_tokenizer(directory: Path, kind: str = "sentencepiece") -> PreTrainedTokenizerFast:
    """Train a tokenizer on `SENTENCES`, save it and return it. Ids: pad 0, BOS 1, EOS 2; at most VOCAB_SIZE tokens.

    Args:
        directory: where to save; made if absent.
        kind: "sentencepiece" (Llama 2's: BPE with byte fallback, adds BOS, `tokenizer.model` saved too) or "bpe"
            (byte-level, adds BOS, as Llama 3).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = {"sentencepiece": _sentencepiece_tokenizer, "bpe": _byte_level_tokenizer}[kind](directory)
    tokenizer.save_pretrained(directory)
    return tokenizer


def _sentencepiece_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=trained,
        model_type="bpe",
        vocab_size=450,
        character_coverage=0.99,
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(trained.getvalue())
    return LlamaTokenizerFast.from_pretrained(directory, pad_token="<pad>", add_bos_token=True, legacy=False)


def _byte_level_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
