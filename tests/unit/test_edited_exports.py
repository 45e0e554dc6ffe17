"""An export that was edited, by transformers or by hand, goes back as it is: config.json is the record of the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.conversion import assert_bit_equal, base_fields, load_weights_of, run_conversion
from tests.helpers.tiny_hf import save_tiny_dense


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of upcycled models, one of each family."""
    root = tmp_path_factory.mktemp("exports")
    for family in ("llama", "mistral", "qwen2"):
        save_tiny_dense(root / "base", family, tokenizer=None, **base_fields(family))
        for command, *words in (
            ("hf_to_mixmoe", "--hf-dir", root / "base", "--output-dir", root / "up"),
            ("mixmoe_to_hf", "--checkpoint-dir", root / "up", "--output-dir", root / family),
        ):
            assert run_conversion(command, *words, "--force") == 0
    return root


def fields_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text()))


def edit(directory: Path, **fields: Any) -> None:
    (directory / "config.json").write_text(json.dumps({**fields_of(directory), **fields}))


def there_and_back(directory: Path) -> Path:
    back = directory.parent / "back"
    megatron = directory.parent / "megatron"
    assert run_conversion("hf_to_mixmoe", "--hf-dir", directory, "--output-dir", megatron) == 0
    assert run_conversion("mixmoe_to_hf", "--checkpoint-dir", megatron, "--output-dir", back) == 0
    return back


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("qwen2", {}),
        ("llama", {"eos_token_id": [2, 7], "pad_token_id": 3}),
        ("llama", {"max_position_embeddings": 4096}),
        ("mistral", {"max_position_embeddings": 512}),
        ("llama", {"rms_norm_eps": 1e-3, "use_cache": False, "initializer_range": 0.01}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 26881.44}}),
        ("qwen2", {"topk_per_group": 2, "num_experts_per_tok": 2, "group_combine": "sum", "expert_scale": 1.5}),
        ("qwen2", {"mixmoe_aux_loss_coef": 0.01, "output_router_logits": True, "bos_token_id": 5}),
    ],
    ids=str,
)
def test_config_goes_there_and_back(exports: Path, tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(exports / family, edited)
    edit(edited, **fields)
    back = there_and_back(edited)
    given, found = fields_of(edited), fields_of(back)
    recorded, found_recorded = given.pop("mixmoe"), found.pop("mixmoe")
    assert found == given
    assert found_recorded == {**recorded, **{name: value for name, value in fields.items() if name in recorded}}
    assert_bit_equal(load_weights_of(back), load_weights_of(edited))


def test_a_resized_vocabulary_goes_there_and_back(exports: Path, tmp_path: Path) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(exports / "llama", edited)
    model = AutoModelForCausalLM.from_pretrained(edited)
    model.resize_token_embeddings(523)
    model.save_pretrained(edited)
    back = there_and_back(edited)
    assert fields_of(back)["vocab_size"] == 523
    assert_bit_equal(load_weights_of(back), load_weights_of(edited))


def test_a_lost_record_of_options_is_found_in_the_metadata(exports: Path, tmp_path: Path) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(exports / "llama", edited)
    edit(edited, mixmoe={})
    assert fields_of(there_and_back(edited))["mixmoe"] == fields_of(exports / "llama")["mixmoe"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 7.0}, "two values of rope_theta"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope_parameters and rope_scaling disagree about"),
        ({"num_experts": 3}, "num_experts must be num_experts_per_group times stage"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok must be topk_per_group times stage"),
        ({"stage": 2, "num_experts": 8, "num_experts_per_tok": 2}, "says 'upcycled', but config.json says stage 2"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not known here"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights = 'other.safetensors'"),
        ({"hidden_size": 64, "head_dim": 16}, "the configuration asks for"),
        ({"moe_intermediate_size": 17}, "moe_intermediate_size must be "),
        ({"moe_layers": None}, "moe_layers must be a list of layer indices, not None"),
        ({"mixmoe": [1]}, "mixmoe must be an object, not [1]"),
        ({"router_bias": False}, "tensors that no mapping uses"),
    ],
    ids=str,
)
def test_what_contradicts_is_named(
    exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], message: str
) -> None:
    shutil.copytree(exports / "llama", tmp_path / "edited")
    edit(tmp_path / "edited", **fields)
    assert run_conversion("hf_to_mixmoe", "--hf-dir", tmp_path / "edited", "--output-dir", tmp_path / "m") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
