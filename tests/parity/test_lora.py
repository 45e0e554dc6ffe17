"""LoRA against PEFT: logits, loss and the gradients of A and B; the adapter that PEFT loads; the merged model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from transformers import AutoModelForCausalLM

from mixmoe_megatron.checkpoint.metadata import read_metadata
from mixmoe_megatron.conversion import parity
from mixmoe_megatron.conversion.hf_config import ADAPTER_FILE
from mixmoe_megatron.conversion.prepared import describe_model
from mixmoe_megatron.methods.registry import PHASES
from mixmoe_megatron.model.freezing import freeze_for_phase
from mixmoe_megatron.model.mapping import LORA_LAYERS
from mixmoe_megatron.planning.activations import activation_bytes
from mixmoe_megatron.planning.layouts import Batch, ParallelLayout
from tests.helpers.conversion import base_fields, run_conversion
from tests.helpers.megatron import model_loss, saved_bytes
from tests.helpers.tiny_hf import save_tiny_dense
from tests.parity.test_model_parity import TOKENS, assert_parity

peft = pytest.importorskip("peft", reason="PEFT is what LoRA is compared with")


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    with parity.single_process():
        yield


def start(tmp_path: Path, family: str, *flags: str) -> tuple[Path, Path]:
    base, checkpoint = tmp_path / "base", tmp_path / "m"
    save_tiny_dense(base, family, **base_fields(family))
    words = ("--hf-dir", base, "--output-dir", checkpoint, "--method", "lora", *flags)
    assert run_conversion("hf_to_mixmoe", *words) == 0
    return base, checkpoint


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_start_is_pefts(tmp_path: Path, family: str) -> None:
    """B is zero, A is uniform as PEFT draws it: within 1 / sqrt(inputs), of that deviation."""
    base, checkpoint = start(tmp_path, family)
    model = parity.build_megatron_model(read_metadata(checkpoint))
    parity.load_weights(model, checkpoint / "release")
    assert_parity(base, model)
    matrices = {name: value for name, value in model.named_parameters() if ".lora." in name}
    assert len(matrices) == 2 * len(LORA_LAYERS) * model.config.num_layers
    for name, value in matrices.items():
        if name.endswith("_b"):
            assert not value.any(), name
        else:
            bound = value.shape[1] ** -0.5
            assert value.shape[0] == 8 and value.abs().max() <= bound, name
            assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.15), name


@pytest.mark.parametrize("rank", [8, 64])
def test_planned_activations_are_near_what_autograd_saves(tmp_path: Path, rank: int) -> None:
    _, checkpoint = start(tmp_path, "llama", "--lora-rank", str(rank))
    metadata = read_metadata(checkpoint)
    model = freeze_for_phase(parity.build_megatron_model(metadata), PHASES["lora"])
    assert isinstance(model, torch.nn.Module)
    model.output_layer.gather_output = False  # as in training
    description = describe_model(metadata, metadata.megatron_args["vocab_size"])
    planned = replace(description, phase=PHASES["lora"])
    estimate = activation_bytes(planned, ParallelLayout(), Batch(4, 4, 32, dtype="fp32"), 0)
    assert 0.6 < estimate / saved_bytes(model, lambda: model_loss(model, 4, 32)) < 1.1


def with_random_matrices(checkpoint: Path) -> torch.nn.Module:
    """Draw all of A and B, and save the model as Megatron does, as iteration 3."""
    model = parity.build_megatron_model(read_metadata(checkpoint))
    parity.load_weights(model, checkpoint / "release")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora." in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    (checkpoint / "iter_0000003").mkdir()
    state = {"model": model.sharded_state_dict(), "iteration": 3}
    dist_checkpointing.save(state, str(checkpoint / "iter_0000003"))
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_loss_and_gradients_are_pefts(tmp_path: Path, family: str) -> None:
    base, checkpoint = start(tmp_path, family, "--lora-rank", "4", "--lora-alpha", "6")
    model = with_random_matrices(checkpoint).train()
    for format_ in ("merged", "adapter"):
        words = ("--checkpoint-dir", checkpoint, "--output-dir", tmp_path / format_, "--iteration", "3")
        assert run_conversion("mixmoe_to_hf", *words, "--format", format_) == 0
    assert_parity(tmp_path / "merged", model)
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter", is_trainable=True).train()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    logits = theirs(TOKENS).logits
    assert torch.allclose(logits, merged(TOKENS).logits, atol=1e-3, rtol=1e-4)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    loss.backward()
    positions = torch.arange(TOKENS.shape[1]).expand(len(TOKENS), -1)
    ours = model(TOKENS, positions, None)[:, :-1].flatten(0, 1)
    our_loss = torch.nn.functional.cross_entropy(ours, TOKENS[:, 1:].flatten())
    our_loss.backward()
    assert torch.allclose(our_loss, loss, atol=1e-5)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    found = {name: parameter.grad for name, parameter in model.named_parameters() if ".lora." in name}
    for layer in range(model.config.num_layers):
        for megatron_name, hf, _ in LORA_LAYERS:
            for kind in "ab":
                expected = gradients.pop(
                    f"base_model.model.model.layers.{layer}.{hf}.lora_{kind.upper()}.default.weight"
                )
                gradient = found.pop(f"decoder.layers.{layer}.{megatron_name}_{kind}")
                assert expected.any() and torch.allclose(gradient, expected, atol=1e-5, rtol=1e-3), (layer, hf, kind)
    assert not gradients and not found


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, checkpoint = start(tmp_path, "qwen2")
    adapter = tmp_path / "adapter"
    words = ("--checkpoint-dir", checkpoint, "--output-dir")
    assert run_conversion("mixmoe_to_hf", *words, adapter, "--format", "adapter") == 0
    assert run_conversion("mixmoe_to_hf", *words, tmp_path / "x", "--format", "mixmoe") == 2
    assert "--format mixmoe goes with models that have experts" in capsys.readouterr().err
    again = ("--hf-dir", base, "--output-dir", tmp_path / "again")
    for flags, message in (
        (["--adapter", adapter], "--adapter, --lora-rank and --lora-alpha go with --method lora"),
        (["--method", "lora", "--lora-rank", "0"], "lora_rank must be a positive integer, got 0"),
        (["--method", "lora", "--adapter", adapter, "--lora-rank", "4"], "--adapter brings its own rank and alpha"),
        (["--method", "lora", "--adapter", tmp_path], f"has no {ADAPTER_FILE} that can be read"),
    ):
        assert run_conversion("hf_to_mixmoe", *again, *flags) == 2
        assert message in capsys.readouterr().err
    config = json.loads((adapter / ADAPTER_FILE).read_text())
    for changed, message in (
        ({"use_rslora": True}, "use_rslora = True is not supported"),
        ({"target_modules": ["q_proj"]}, "target_modules must be q_proj, k_proj"),
        ({"peft_type": "IA3"}, "is not one of LoRA"),
    ):
        (adapter / ADAPTER_FILE).write_text(json.dumps(config | changed))
        assert run_conversion("hf_to_mixmoe", *again, "--method", "lora", "--adapter", adapter) == 2
        assert message in capsys.readouterr().err
