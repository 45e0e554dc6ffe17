"""Exported models in fairseq2: the same logits as in Hugging Face, and back bit by bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from mixmoe_megatron.hf import router_aux_loss
from mixmoe_megatron.integrations.fairseq2.architecture import MixMoEModelConfig, architectures
from tests.helpers.conversion import assert_bit_equal, load_weights_of
from tests.helpers.fairseq2_models import REASON, add_card, export_tiny, run_python

pytest.importorskip("fairseq2", reason=REASON)

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_stage1": {"stage": 1},
    "llama_tied": {"tie_word_embeddings": True},
    "llama_k2": {"topk_per_group": 2, "renormalize_topk": True},
    "llama_sum": {"group_combine": "sum", "expert_scale": 1.0},
    "llama_plain": {"router_prob_scaling": False, "router_bias": False, "attention_bias": True},
    "llama_bf16": {"tokenizer": "bpe"},
    "qwen": {"family": "qwen2"},
    "qwen_stage1": {"family": "qwen2", "stage": 1, "tie_word_embeddings": True},
    "qwen_k2": {"family": "qwen2", "topk_per_group": 2, "group_combine": "sum"},
}


World = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, fairseq2_is_set_up: None) -> World:
    """The directory of all exports, with their cards in CARDS, and the models by name."""
    directory = tmp_path_factory.mktemp("exports")
    models = {name: export_tiny(directory, name, **fields) for name, fields in MODELS.items()}
    for name, parameter in models["llama_bf16"].named_parameters():
        if ".router." not in name:
            parameter.data = parameter.data.bfloat16()
    models["llama_bf16"].save_pretrained(directory / "llama_bf16")
    add_card(directory / "llama_bf16", directory / "cards")
    return directory, {name: model.float().eval() for name, model in models.items()}


def load(directory: Path, **changed: Any) -> Any:
    from mixmoe_megatron.integrations.fairseq2.extension import get_mixmoe_model_hub

    config = replace(MixMoEModelConfig.from_hf(json.loads((directory / "config.json").read_text())), **changed)
    return get_mixmoe_model_hub().load_custom_model(directory, config, dtype=torch.float32).eval()


def logits_of(model: Any, ids: torch.Tensor, lengths: list[int] | None = None) -> torch.Tensor:
    from fairseq2.nn import BatchLayout

    with torch.no_grad():
        return model(ids, BatchLayout.of(ids, lengths))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_hugging_face(world: World, name: str) -> None:
    ids = torch.randint(4, 450, (3, 40))
    with torch.no_grad():
        expected = world[1][name](ids).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits_of(load(world[0] / name), ids), expected, rtol=0, atol=1e-5)


def test_padding_changes_nothing(world: World) -> None:
    ids, lengths = torch.randint(4, 450, (3, 40)), [40, 7, 23]
    model = load(world[0] / "llama")
    padded = logits_of(model, ids, lengths)
    for row, length in enumerate(lengths):
        alone = logits_of(model, ids[row : row + 1, :length])
        torch.testing.assert_close(padded[row : row + 1, :length], alone, rtol=0, atol=1e-5)


def test_packed_documents_do_not_see_each_other(world: World) -> None:
    from fairseq2.nn import BatchLayout

    ids, lengths = torch.randint(4, 450, (40,)), [11, 20, 9]
    model = load(world[0] / "qwen")
    with torch.no_grad():
        packed = model(ids, BatchLayout.of(ids, lengths, packed=True))
    for document, logits in zip(ids.split(lengths), packed.split(lengths), strict=True):
        torch.testing.assert_close(logits, logits_of(model, document[None])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama_stage1", "llama_k2", "qwen_k2", "llama_tied"])
def test_loss_aux_losses_and_gradients(world: World, name: str) -> None:
    """Of a batch as the recipe takes it: padded, the loss on the target, the aux losses without padding."""
    from fairseq2.datasets import SequenceBatch
    from fairseq2.metrics import MetricBag

    from mixmoe_megatron.integrations.fairseq2.recipe import MixMoETrainUnit
    from mixmoe_megatron.integrations.fairseq2.state_dicts import from_any_state_dict

    ids, lengths = torch.randint(4, 450, (3, 24)), [24, 15, 9]
    places = torch.arange(24).expand(3, -1)
    is_text = places < torch.tensor(lengths)[:, None]
    is_target = is_text & (places >= 5)
    model, hf = load(world[0] / name).train(), world[1][name].train()
    unit, metrics = MixMoETrainUnit(model, model, 0.5), MetricBag(device=torch.device("cpu"))
    unit.prepare_metric_bag(metrics)
    loss, num_targets = unit.process_batch(SequenceBatch(ids, lengths, target_mask=is_target), metrics)
    (loss / num_targets).backward()

    is_input = is_text[:, 1:]  # the last token of each row is a target only
    out = hf(ids[:, :-1], attention_mask=is_input.long(), output_router_logits=True)
    labels = ids.where(is_target, -100)[:, 1:]
    aux_losses = router_aux_loss(out.router_logits, hf.config.stage, hf.config.topk_per_group, is_input)
    hf.zero_grad()
    expected = cross_entropy(out.logits.flatten(0, 1), labels.flatten()) + 0.5 * aux_losses.sum()
    expected.backward()
    hf.eval()

    assert num_targets == int((labels != -100).sum())
    torch.testing.assert_close(loss / num_targets, expected, rtol=0, atol=1e-5)
    for group, value in zip(("lm", "mt"), aux_losses, strict=False):
        assert float(metrics.metrics[f"{group}_aux_loss"].compute()) == pytest.approx(float(value), abs=1e-5)
    gradients = {key: parameter.grad for key, parameter in hf.named_parameters()}
    config = MixMoEModelConfig.from_hf(hf.config.to_dict())
    gradients = from_any_state_dict(gradients, config)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-6, msg=key)


def test_rope_beyond_8192_positions(world: World) -> None:
    """Llama 3's scaling, which depends on no length: float32 tables as long as the context."""
    directory, _ = world
    model = export_tiny(directory, "long", max_position_embeddings=8400, num_hidden_layers=2, moe_layers=[1]).eval()
    ids = torch.randint(4, 450, (1, 8300))
    with torch.no_grad():
        expected = model(ids).logits[:, -64:]
    torch.testing.assert_close(logits_of(load(directory / "long"), ids)[:, -64:], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen_k2", "qwen_stage1", "llama_bf16"])
def test_back_to_hugging_face_bit_by_bit(world: World, tmp_path: Path, name: str) -> None:
    """By fairseq2's own exporter, which by itself knows neither tokenizer nor dtype."""
    directory, models = world
    done = run_python(
        ["-m", "fairseq2.models.utils.hg_export", "--no-rich", f"mixmoe_{name}", tmp_path / "hf"], directory / "cards"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_bit_equal(load_weights_of(tmp_path / "hf"), load_weights_of(directory / name))
    for file in (directory / name).iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes(), file.name
    without = "import sys, torch; from transformers import AutoModelForCausalLM as M\n"
    without += "m = M.from_pretrained(sys.argv[1], trust_remote_code=True).float()\n"
    without += "assert 'mixmoe_megatron' not in sys.modules\n"
    without += "torch.save(m(torch.arange(4, 44)[None]).logits, sys.argv[2])"
    done = run_python(["-c", without, tmp_path / "hf", tmp_path / "logits.pt"])
    assert done.returncode == 0, done.stderr
    expected = models[name](torch.arange(4, 44)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-5)


def test_stage_2_starts_as_a_copy_of_stage_1(world: World) -> None:
    """Mean of two equal groups: the logits of stage 1."""
    model = load(world[0] / "llama_stage1", stage=2)
    ids = torch.randint(4, 450, (2, 30))
    torch.testing.assert_close(
        logits_of(model, ids), logits_of(load(world[0] / "llama_stage1"), ids), rtol=0, atol=1e-5
    )
    names = dict(model.named_parameters())
    pairs = [(name, name.replace(".mt.", ".lm.")) for name in names if ".mt." in name]
    assert pairs and all(torch.equal(names[mt], names[lm]) and names[mt] is not names[lm] for mt, lm in pairs)


def test_an_unsplit_router_would_be_moved_by_weight_decay(world: World) -> None:
    """Why the groups are modules: AdamW moves rows whose gradient is masked to zero."""
    router = torch.nn.Parameter(torch.ones(8, 4))
    router.grad = torch.zeros(8, 4)
    torch.optim.AdamW([router], lr=0.1, weight_decay=0.1).step()
    assert not router.eq(1).any()
    assert {name.split(".")[4] for name, _ in load(world[0] / "llama").named_parameters() if ".router." in name} == {
        "lm",
        "mt",
    }


def test_cards_are_listed(world: World) -> None:
    done = run_python(["-m", "fairseq2.assets", "list"], world[0] / "cards")
    assert done.returncode == 0, done.stderr
    told = (done.stdout + done.stderr).lower()
    warned = [line for line in told.splitlines() if "warning" in line]  # of cards that need other packages
    assert "fail" not in told and all("librispeech" in line for line in warned)
    assert all(f"mixmoe_{name}" in done.stdout for name in MODELS)


def test_presets_are_the_papers_bases() -> None:
    """As many parameters as the dense model, the MT group and the routers."""
    from mixmoe_megatron.integrations.fairseq2.native_model import create_mixmoe_model

    dense = {"llama3_2_1b": 1235814400, "llama3_1_8b": 8030261248, "qwen2_5_0_5b": 494032768}
    dense["qwen2_5_14b"] = 14770033664
    for name, number in dense.items():
        arch = architectures()[name]
        layers, hidden = arch.num_hidden_layers // 4, arch.hidden_size
        with torch.device("meta"):
            model = create_mixmoe_model(arch)
        added = layers * (3 * hidden * arch.intermediate_size + 2 * 4 * (hidden + 1))
        assert sum(parameter.numel() for parameter in model.parameters()) == number + added, name


def test_an_eos_that_pads_is_a_target(world: World) -> None:
    """fairseq2 takes the padding id out of the loss, masks or not."""
    ids = torch.randint(4, 450, (1, 12))
    ids[0, -1] = 2
    for pad, expected in ((0, 0), (2, None), (None, None)):
        model = load(world[0] / "llama", pad_token_id=pad)
        assert model.pad_idx == expected
        logits = logits_of(model, ids[:, :-1])[0]
        loss = model.compute_loss(logits[None], ids[:, 1:])
        torch.testing.assert_close(loss, cross_entropy(logits, ids[0, 1:], reduction="sum"))


def test_another_release_of_fairseq2_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from fairseq2.runtime.dependency import DependencyContainer

    from mixmoe_megatron.errors import MixMoEError
    from mixmoe_megatron.integrations.fairseq2 import extension

    monkeypatch.setattr(extension.metadata, "version", lambda name: "0.9.0")
    with pytest.raises(MixMoEError, match=r"goes with fairseq2 0\.8\.x, not 0\.9\.0: "):
        extension.setup_fairseq2_extension(DependencyContainer())


@pytest.mark.parametrize("name", ["llama", "llama_bf16"])
def test_the_tokenizer_is_hugging_faces(world: World, name: str) -> None:
    from mixmoe_megatron.integrations.fairseq2.extension import get_mixmoe_tokenizer_hub
    from mixmoe_megatron.integrations.fairseq2.native_tokenizer import MixMoETokenizerConfig

    tokenizer = get_mixmoe_tokenizer_hub().load_custom_tokenizer(world[0] / name, MixMoETokenizerConfig())
    hf = AutoTokenizer.from_pretrained(world[0] / name)
    text = "Das Haus ist </s> alt."
    ids = hf(text, split_special_tokens=True)["input_ids"]
    assert ids[0] == hf.bos_token_id
    for mode, expected in {"prompt": ids, "default": [*ids, 2], "prompt_response": [*ids[1:], 2]}.items():
        encoder = tokenizer.create_encoder(mode=mode)
        assert encoder(text).tolist() == expected
        assert encoder.encode_as_tokens(text) == hf.convert_ids_to_tokens(expected)
        prefix = [] if mode == "prompt_response" else [1]
        assert prefix == ([] if encoder.prefix_indices is None else encoder.prefix_indices.tolist())
    assert tokenizer.create_raw_encoder()(text).tolist() == ids[1:]
    assert tokenizer.create_decoder(skip_special_tokens=True)(torch.tensor([*ids, 2])) == text
    assert (tokenizer.vocab_info.bos_idx, tokenizer.vocab_info.eos_idx, tokenizer.vocab_info.pad_idx) == (1, 2, 0)
