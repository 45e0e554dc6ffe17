"""LLaMA-Pro: which blocks are copied, that the deeper model computes what the base does, and where it learns first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints_conversion import hf_to_mixmoe, mixmoe_to_hf
from mixmoe_megatron.checkpoint.metadata import METADATA_FILE, read_metadata
from mixmoe_megatron.conversion.deeper import deeper_config, new_layers
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.llama_pro import copied_blocks
from tests.helpers.tiny_hf import save_tiny_dense

ADDED = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def test_blocks_that_are_copied() -> None:
    assert copied_blocks(16, 12) == [0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15]  # what the released code gives
    assert copied_blocks(32, 8) == copied_blocks(32) == [3, 7, 11, 15, 19, 23, 27, 31]  # the paper's
    assert copied_blocks(2) == [1]
    assert new_layers([3, 7]) == (4, 9)
    for wrong in (0, 5):
        with pytest.raises(MixMoEError, match=r"--new-blocks must be from 1 to the 4 layers of the base"):
            copied_blocks(4, wrong)


def test_layer_types_are_copied_too() -> None:
    config = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
    deeper = deeper_config(config, [1])
    assert deeper == {"num_hidden_layers": 3, "layer_types": [*config["layer_types"], "sliding_attention"]}


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_the_deeper_model_starts_as_the_base(family: str, tmp_path: Path) -> None:
    base, checkpoint, export = (tmp_path / name for name in ("base", "checkpoint", "export"))
    save_tiny_dense(base, family)
    words = ["--hf-dir", base, "--output-dir", checkpoint, "--method", "llama_pro", "--new-blocks", "2"]
    assert hf_to_mixmoe.main(list(map(str, words))) == 0
    assert mixmoe_to_hf.main(["--checkpoint-dir", str(checkpoint), "--output-dir", str(export)]) == 0
    added = read_metadata(export).new_layers
    assert added == (2, 5)
    dense, deeper = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (base, export))
    assert (type(deeper), deeper.config.num_hidden_layers) == (type(dense), dense.config.num_hidden_layers + 2)
    tokens = torch.arange(24).reshape(2, 12) % dense.config.vocab_size
    assert torch.equal(deeper(tokens).logits, dense(tokens).logits)
    deeper(tokens, labels=tokens).loss.backward()
    for name, parameter in deeper.named_parameters():
        if any(f".layers.{layer}." in name for layer in added):
            assert bool(parameter.grad.any()) == name.endswith(ADDED), name


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    save_tiny_dense(base, "qwen2")
    convert = ["--hf-dir", str(base), "--output-dir", str(tmp_path / "out")]
    for words, message in (
        (["--new-blocks", "2"], "--new-blocks goes with a method that adds layers"),
        (["--method", "llama_pro", "--router-bias", "false"], "llama_pro makes no experts: leave out --router-bias"),
        (["--method", "llama_pro", "--dense"], "--dense is short for --method full"),
        (["--method", "llama_pro", "--measure", str(base / "config.json")], "nothing is upcycled: leave it out"),
    ):
        assert hf_to_mixmoe.main([*convert, *words]) == 2
        assert message in capsys.readouterr().err
    assert hf_to_mixmoe.main([*convert, "--method", "llama_pro"]) == 0
    metadata = json.loads((tmp_path / "out" / METADATA_FILE).read_text())
    for wrong, told in (([9], r"\[9\]"), ([[1]], r"\[\[1\]\]"), ([], r"\[\]"), ("1", "'1'")):
        (tmp_path / "out" / METADATA_FILE).write_text(json.dumps(metadata | {"options": {"new_layers": wrong}}))
        with pytest.raises(MixMoEError, match=f"options.new_layers must list layers of the 5 there are, not {told}"):
            read_metadata(tmp_path / "out")
