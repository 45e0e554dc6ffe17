"""Turn a GGUF of the Llama or Qwen2 family into a Hugging Face directory, block by block: memory does not grow with it.

Needs llama.cpp's package `gguf`, which `make_base.py` brings. The conversion of transformers holds the model twice, and
its tokenizers differ from llama.cpp's: another end of sequence, a begin of sequence added, digits not split.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mixmoe_megatron.checkpoint.bits import Bits
from mixmoe_megatron.checkpoint.safetensors_io import write_safetensors
from mixmoe_megatron.checkpoint.stored import Region
from mixmoe_megatron.checkpoint.tensors import LazyTensor
from mixmoe_megatron.conversion.byte_progress import progress
from mixmoe_megatron.errors import MixMoEError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
CONTROL, USER_DEFINED = 3, 4  # GGUF's types of tokens
_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
# How llama.cpp cuts text into words, by the GGUF's tokenizer.ggml.pre.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def convert(gguf_file: Path, directory: Path) -> None:
    """Write config, weights (float32) and tokenizer.

    Args:
        gguf_file: of the Llama or Qwen2 family, any quantisation that `gguf` dequantises.
        directory: an existing, empty one.

    Raises:
        MixMoEError: the GGUF is of another family, or holds a tensor or a tokenizer that is not known here.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    family = fields["general.architecture"]
    if family not in ARCHITECTURES:
        raise MixMoEError(f"the GGUF is of architecture {family}, supported are {', '.join(ARCHITECTURES)}.")
    config = make_config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    plan = [_lazy(tensor, config) for tensor in reader.tensors]
    with progress(sum(tensor.num_bytes for tensor in plan), "to Hugging Face") as advance:
        write_safetensors(directory, plan, 5 * 10**9, advance)
    tokenizer = make_tokenizer(fields)
    tokenizer.save_pretrained(directory)
    ends = sorted({tokenizer.eos_token_id, *_ids(fields, ["<|endoftext|>"])})
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    for name, values in (
        ("config.json", {**config, **ids, "eos_token_id": tokenizer.eos_token_id}),
        ("generation_config.json", {**ids, "eos_token_id": ends}),
    ):
        (directory / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def make_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Return the config.json of a GGUF, from its fields; `tied`: the output layer is the embedding."""
    family = fields["general.architecture"]
    hidden_size, heads = fields[f"{family}.embedding_length"], fields[f"{family}.attention.head_count"]
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden_size,
        "intermediate_size": fields[f"{family}.feed_forward_length"],
        "num_hidden_layers": fields[f"{family}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields[f"{family}.attention.head_count_kv"],
        "head_dim": hidden_size // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields[f"{family}.context_length"],
        "rms_norm_eps": float(f"{fields[f'{family}.attention.layer_norm_rms_epsilon']:.6g}"),  # float32 there
        "rope_theta": float(fields[f"{family}.rope.freq_base"]),
        "tie_word_embeddings": tied,
        "dtype": "float32",
        "transformers_version": "4.57.1",  # later 4.57 take the tokenizer for a broken one of Mistral where none stands
    }


def hugging_face_name(name: str) -> str:
    """Return a tensor's name in transformers.

    Raises:
        MixMoEError: it is none of a Llama or Qwen2.
    """
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
    if name not in _MODEL_NAMES:
        raise MixMoEError(f"the GGUF holds {name}, which is no tensor of a Llama or Qwen2.")
    return _MODEL_NAMES[name]


def _lazy(tensor: Any, config: dict[str, Any]) -> LazyTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    name = hugging_face_name(tensor.name)
    projection = name.split(".")[-2]
    rows = np.arange(shape[0])
    if config["model_type"] == "llama" and projection in heads:
        # llama.cpp rotates neighbouring rows of a head, transformers row r and row r + head_dim / 2
        rows = rows.reshape(heads[projection], -1, 2).swapaxes(1, 2).reshape(-1)
    return LazyTensor(name, shape, "float32", partial(_dequantised, tensor, rows))


def _dequantised(tensor: Any, rows: np.ndarray[Any, Any], region: Region) -> Bits:
    """Return the bits of a region in float32; `rows`: of the GGUF's tensor, in the order of transformers."""
    from gguf import dequantize

    values = dequantize(tensor.data[rows[region[0]]], tensor.tensor_type)
    return np.ascontiguousarray(values[(slice(None), *region[1:])], dtype=np.float32).view(np.uint32)


def make_tokenizer(fields: dict[str, Any]) -> Any:
    """Build the tokenizer from the GGUF's vocabulary and merges: byte-level BPE as llama.cpp does it, no BOS added.

    As in llama.cpp, text is not brought into a Unicode normal form.

    Args:
        fields: the GGUF's metadata by name.

    Returns:
        A PreTrainedTokenizerFast.

    Raises:
        MixMoEError: it is another kind of tokenizer, or what was built is not the GGUF's vocabulary.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
    splitters = {
        "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), byte_level()],
        "qwen2": lambda: [pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated"), byte_level(use_regex=False)],
    }
    kind, words = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if kind != "gpt2" or words not in splitters:
        raise MixMoEError(f"the GGUF's tokenizer is {kind} with {words}; known are gpt2 with {', '.join(splitters)}.")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitters[words]())
    tokenizer.decoder = decoders.ByteLevel()
    for number, is_special in ((CONTROL, True), (USER_DEFINED, False)):
        chosen = [token for token, kind in zip(tokens, kinds, strict=True) if kind == number]
        added = [AddedToken(token, special=is_special, normalized=False) for token in chosen]
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(added)
    words_of = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{word}_token_id") for name, word in words_of.items()}
    built = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=fields[f"{fields['general.architecture']}.context_length"],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": tokens[number] for name, number in ids.items() if number is not None},
    )
    check_tokenizer(built, tokens, ids["eos"])
    return built


def check_tokenizer(tokenizer: Any, tokens: list[str], eos_id: int) -> None:
    """Check that a tokenizer has the GGUF's tokens at the GGUF's ids, its end of sequence, and adds nothing to a text.

    Raises:
        MixMoEError: it has not; the message names the difference.
    """
    built = tokenizer.convert_ids_to_tokens(list(range(len(tokens))))
    wrong = [i for i, (token, wanted) in enumerate(zip(built, tokens, strict=True)) if token != wanted]
    if wrong or len(tokenizer) != len(tokens):
        what = f"id {wrong[0]} is {built[wrong[0]]!r}, not {tokens[wrong[0]]!r}" if wrong else f"{len(tokenizer)} ids"
        raise MixMoEError(f"the tokenizer that was built is not the GGUF's vocabulary of {len(tokens)} ids: {what}.")
    if tokenizer.eos_token_id != eos_id or tokenizer("").input_ids:
        raise MixMoEError("the tokenizer that was built has another end of sequence than the GGUF, or adds tokens.")


def _ids(fields: dict[str, Any], tokens: list[str]) -> list[int]:
    vocabulary = fields["tokenizer.ggml.tokens"]
    return [vocabulary.index(token) for token in tokens if token in vocabulary]
