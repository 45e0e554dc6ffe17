"""Models of one expert group as transformers' Qwen2Moe: the base at the start; loss, aux loss and gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from mixmoe_megatron.checkpoint.metadata import METADATA_FILE, read_metadata
from mixmoe_megatron.conversion import parity
from mixmoe_megatron.methods.registry import METHODS
from tests.helpers.conversion import base_fields, run_conversion
from tests.helpers.tiny_hf import save_tiny_dense
from tests.parity.test_model_parity import TOKENS, assert_parity, save_random_model

COEFFICIENT = 0.1  # large enough to be seen in the gradients
IN_A_FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__name__ == "Qwen2MoeForCausalLM" and "mixmoe_megatron" not in sys.modules
print(model.generate(torch.arange(3, 11)[None], max_new_tokens=4, do_sample=False).tolist())
"""


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    with parity.single_process():
        yield


def convert(base: Path, output: Path, method: str, *flags: str) -> Path:
    assert run_conversion("hf_to_mixmoe", "--hf-dir", base, "--output-dir", output, "--method", method, *flags) == 0
    return output


def export(checkpoint: Path, output: Path, *flags: str) -> Path:
    words = ("--checkpoint-dir", checkpoint, "--output-dir", output, *flags)
    assert run_conversion("mixmoe_to_hf", *words) == 0
    return output


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("moe", ["--moe-every=2"]),
        ("moe_lpr", ["--moe-every=2"]),
        # all of the slices, each at the weight n * 1/n that it had in the FFN
        ("llama_moe_v2", ["--topk-per-group=8", "--expert-scale=8", "--router-init-std=0"]),
        ("llama_moe_v2_residual", ["--topk-per-group=7", "--expert-scale=7", "--router-init-std=0"]),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_start_is_the_base(tmp_path: Path, family: str, method: str, flags: list[str], tied: bool) -> None:
    base = tmp_path / "base"
    save_tiny_dense(base, family, tied, **base_fields(family))
    upcycled = export(convert(base, tmp_path / "m", method, *flags), tmp_path / "hf")
    dense, model = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (base, upcycled))
    assert isinstance(model, Qwen2MoeForCausalLM)
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, dense(TOKENS).logits, atol=1e-5)
    done = subprocess.run([sys.executable, "-I", "-c", IN_A_FRESH_PROCESS, upcycled], capture_output=True, text=True)
    assert done.returncode == 0 and "newly initialized" not in done.stderr, done.stderr


@pytest.mark.parametrize("method", ["moe", "moe_lpr", "llama_moe_v2", "llama_moe_v2_residual"])
def test_loss_aux_loss_and_gradients(tmp_path: Path, method: str) -> None:
    """One MoE layer: of several, transformers takes the product of means over the layers, we the mean of products."""
    save_tiny_dense(tmp_path / "base", "qwen2", **base_fields("qwen2"))
    checkpoint = convert(tmp_path / "base", tmp_path / "m", method, "--moe-layer-placement=3")
    metadata = read_metadata(checkpoint)
    assert metadata.options is not None
    k, scale = metadata.options["topk_per_group"], metadata.options["expert_scale"]
    ours = save_random_model(checkpoint, metadata)
    hf = export(checkpoint, tmp_path / "hf", "--iteration", "3")
    assert_parity(hf, ours)
    theirs = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).train()
    output = theirs(TOKENS[:, :-1], output_router_logits=True)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), TOKENS[:, 1:].flatten())
    aux_loss = load_balancing_loss_func(output.router_logits, metadata.options["num_experts_per_group"], k)
    (loss + COEFFICIENT * aux_loss).backward()
    for parameter in theirs.parameters():  # transformers leaves out experts without tokens
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    ours = parity.build_megatron_model(metadata, moe_aux_loss_coeff=COEFFICIENT * k).train()
    parity.load_weights(ours, checkpoint / "iter_0000003")
    positions = torch.arange(TOKENS.shape[1] - 1).expand(len(TOKENS), -1)
    logits = ours(TOKENS[:, :-1], positions, None)
    our_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
    our_loss.backward()
    assert torch.allclose(our_loss, loss, atol=1e-5)
    layer, blocks = theirs.model.layers[3].mlp, ours.decoder.layers[3].mlp.experts.groups()
    fc1, fc2 = (
        torch.cat([getattr(block, name).weight.grad for block in blocks]) for name in ("linear_fc1", "linear_fc2")
    )
    gate_up = [torch.cat((e.gate_proj.weight.grad, e.up_proj.weight.grad)) for e in layer.experts]
    pairs = {
        "router": (ours.decoder.layers[3].mlp.router.lm.weight.grad, layer.gate.weight.grad),
        "gate and up": (fc1, torch.stack(gate_up)),
        "down": (fc2, scale * torch.stack([e.down_proj.weight.grad for e in layer.experts])),
        **shared_expert_gradients(ours.decoder.layers[3].mlp.shared_experts, layer),
        "output": (ours.output_layer.weight.grad, theirs.lm_head.weight.grad),
        # row 0 is padding's, to which transformers gives no gradient
        "embedding": (ours.embedding.word_embeddings.weight.grad[1:], theirs.model.embed_tokens.weight.grad[1:]),
    }
    for name, (found, expected) in pairs.items():
        assert expected.any() and torch.allclose(found, expected, atol=1e-5, rtol=1e-4), name


def shared_expert_gradients(ours: Any, layer: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Found and expected gradients of a shared expert, where there is one; a gate of 1/2 makes up for down times 2."""
    if ours is None:
        return {}
    theirs = layer.shared_expert
    gate_up = torch.cat((theirs.gate_proj.weight.grad, theirs.up_proj.weight.grad))
    return {
        "shared gate and up": (ours.linear_fc1.weight.grad, gate_up),
        "shared down": (ours.linear_fc2.weight.grad, 2 * theirs.down_proj.weight.grad),
    }


@pytest.mark.parametrize("form", ["paper", "released"])
def test_lpr_loss(form: str, tmp_path: Path) -> None:
    """The mean over tokens of the first sequence, and over two layers, of -log of expert 0's probability."""
    save_tiny_dense(tmp_path / "base", "qwen2", **base_fields("qwen2"))
    checkpoint = convert(tmp_path / "base", tmp_path / "m", "moe_lpr", "--moe-every=2")
    metadata = read_metadata(checkpoint)
    save_random_model(checkpoint, metadata)
    theirs = AutoModelForCausalLM.from_pretrained(
        export(checkpoint, tmp_path / "hf", "--iteration", "3"), dtype=torch.float32
    ).train()
    inputs, labels = TOKENS[:, :-1], TOKENS[:, 1:]
    output = theirs(inputs, output_router_logits=True)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    logits = [logits.softmax(-1) if form == "released" else logits for logits in output.router_logits]
    log_probs = [logits.log_softmax(-1).view(*inputs.shape, -1) for logits in logits]
    (loss - COEFFICIENT * torch.stack(log_probs)[:, 0, :, 0].mean()).backward()
    ours = parity.build_megatron_model(metadata, lpr_coeff=COEFFICIENT, lpr_impl=form).train()
    parity.load_weights(ours, checkpoint / "iter_0000003")
    weights = torch.zeros(inputs.shape)
    weights[0] = 1 / inputs.shape[1]
    logits = ours(inputs, torch.arange(inputs.shape[1]).expand(len(inputs), -1), None, padding_mask=weights)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    for layer in (1, 3):
        expected = theirs.model.layers[layer].mlp.gate.weight.grad
        found = ours.decoder.layers[layer].mlp.router.lm.weight.grad
        assert expected.any() and torch.allclose(found, expected, atol=1e-5, rtol=1e-4), layer


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_dense(tmp_path / "base", "qwen2", **base_fields("qwen2"))
    checkpoint = convert(tmp_path / "base", tmp_path / "m", "moe", "--moe-every=2")
    hf = export(checkpoint, tmp_path / "hf")
    again = ["--hf-dir", hf, "--output-dir", tmp_path / "again"]
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"norm_topk_prob": False}))
    assert run_conversion("hf_to_mixmoe", *again) == 2
    assert "norm_topk_prob is False, but the metadata beside it give True" in capsys.readouterr().err
    (hf / "config.json").write_text(json.dumps(config))
    assert run_conversion("hf_to_mixmoe", *again, "--router-bias", "false") == 2
    assert "the model has experts already: leave out --router-bias" in capsys.readouterr().err
    (hf / METADATA_FILE).unlink()
    assert run_conversion("hf_to_mixmoe", *again) == 2
    assert "only what this package exported is taken" in capsys.readouterr().err
    biased = convert(tmp_path / "base", tmp_path / "biased", "moe", "--router-bias", "true")
    words = ("--checkpoint-dir", biased, "--output-dir", tmp_path / "hf2")
    assert run_conversion("mixmoe_to_hf", *words) == 2
    assert "Qwen2Moe has no place for a router bias: export with --format mixmoe" in capsys.readouterr().err
    assert_parity(export(biased, tmp_path / "own", "--format", "mixmoe"), loaded(biased))


def test_refusals_of_a_shared_expert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_dense(tmp_path / "base", "qwen2", **base_fields("qwen2"))
    method = ("--method", "llama_moe_v2_residual")
    start = convert(tmp_path / "base", tmp_path / "m", *method[1:])
    hf = export(start, tmp_path / "hf")
    (weights,) = hf.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.layers.2.mlp.shared_expert_gate.weight"][0, 3] = 1e-3
    save_file(tensors, weights)
    base, out = ("--hf-dir", tmp_path / "base", "--output-dir", tmp_path / "out"), ("--output-dir", tmp_path / "out")
    for command, words, sentence in (
        ("hf_to_mixmoe", ["--hf-dir", hf, *out], "layers.2.mlp.shared_expert_gate.weight is not zero"),
        ("mixmoe_to_hf", ["--checkpoint-dir", start, *out, "--format", "mixmoe"], "no place for a shared expert"),
        ("hf_to_mixmoe", [*base, *method, "--measure", "x"], "--measure has no model with a shared expert"),
        ("hf_to_mixmoe", [*base, *method, "--router-bias", "true"], "alone has a place for a shared expert, has none"),
    ):
        assert run_conversion(command, *words) == 2
        assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()


def loaded(checkpoint: Path) -> torch.nn.Module:
    model = parity.build_megatron_model(read_metadata(checkpoint))
    parity.load_weights(model, checkpoint / "release")
    return model


def test_methods_that_export_so_have_one_group() -> None:
    for method in METHODS.values():
        assert method.exports_as == "mixmoe" or all(phase.stage == 1 for phase in method.phases)
