"""Cards of exported models, which need no fairseq2: what they say, and what can be none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.integrations.fairseq2.architecture import MixMoEModelConfig, architectures
from mixmoe_megatron.integrations.fairseq2.cards import asset_card, card_text
from tests.helpers.fairseq2_models import export_tiny, run_python


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("stage", [1, 2])
def test_configurations_survive_the_way_there_and_back(tmp_path: Path, family: str, stage: int) -> None:
    fields = {"topk_per_group": 2, "mixmoe": {"lb_reduction": "sum"}, "tie_word_embeddings": stage == 1}
    export_tiny(tmp_path, "model", family, stage, **fields)
    config = AutoConfig.from_pretrained(tmp_path / "model").to_dict()
    card = yaml.safe_load((tmp_path / "cards" / "mixmoe_model.yaml").read_text())
    for ours in (MixMoEModelConfig.from_hf(config), MixMoEModelConfig(**card["model_config"])):
        returned = ours.to_hf().to_dict()
        assert returned == {**config, "architectures": None, "_name_or_path": returned["_name_or_path"]}


def test_presets_are_models() -> None:
    for name, arch in architectures().items():
        hf = arch.to_hf()
        assert (hf.num_experts, hf.moe_layers[0], hf.moe_intermediate_size) == (8, 3, arch.intermediate_size // 4), name


def test_a_card_names_weights_and_tokenizer(tmp_path: Path) -> None:
    export_tiny(tmp_path, "model")
    card = yaml.safe_load(card_text(asset_card(tmp_path / "model", "mine")))
    place = (tmp_path / "model").as_uri()
    assert (card["name"], card["model_family"], card["tokenizer_family"]) == ("mine", "mixmoe", "mixmoe")
    assert (card["checkpoint"], card["tokenizer"]) == (place, place)
    assert card["model_config"]["side_files"] == str(tmp_path / "model")
    for file in (tmp_path / "model").glob("*token*"):
        file.unlink()
    assert "tokenizer" not in asset_card(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"use_sliding_window": True, "sliding_window": 8}, "A model with a sliding window does not run in fairseq2"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0 in fairseq2, not 0.1"),
        ({"topk_per_group": 9}, "topk_per_group must be in 1..num_experts_per_group, got 9 of 4."),
        ({"model_type": "llama"}, "is a model of type 'llama', not mixmoe"),
    ],
)
def test_what_cannot_be_a_card(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    export_tiny(tmp_path, "model", "qwen2")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config = {name: value for name, value in config.items() if name not in ("num_experts_per_tok", "layer_types")}
    path.write_text(json.dumps({**config, **change}))
    with pytest.raises(MixMoEError, match=r"^[^\n]*$") as error:
        asset_card(tmp_path / "model")
    assert told in str(error.value)


def test_a_card_needs_weights_and_a_name(tmp_path: Path) -> None:
    export_tiny(tmp_path, "model")
    with pytest.raises(MixMoEError, match="not 'a/b'"):
        asset_card(tmp_path / "model", "a/b")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(MixMoEError, match="holds no weights"):
        asset_card(tmp_path / "model")


def test_the_command(tmp_path: Path) -> None:
    export_tiny(tmp_path, "model")
    words = ["tools/fairseq2_card.py", tmp_path / "model", "--output-dir", tmp_path / "new" / "cards"]
    done = run_python(words)
    path = tmp_path / "new" / "cards" / "mixmoe_model.yaml"
    assert (done.returncode, done.stdout) == (0, f"{path}\n"), done.stderr
    assert path.read_text() == card_text(asset_card(tmp_path / "model"))


def test_translation_without_fairseq2_names_it(tmp_path: Path) -> None:
    words = ["--model", "m", "--input", "i", "--output", "o", "--source-language", "de", "--target-language", "en"]
    hide = "import importlib.util as u, runpy, sys; find = u.find_spec\n"
    hide += "u.find_spec = lambda name, *rest: None if name == 'fairseq2' else find(name, *rest)\n"
    hide += "sys.argv = sys.argv[1:]; sys.exit(runpy.run_path(sys.argv[0])['main']())"
    done = run_python(["-c", hide, "tools/fairseq2_translate.py", *words])
    assert done.returncode == 2 and done.stderr.startswith("error: fairseq2 is not installed: ")
