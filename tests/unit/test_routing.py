"""Routing shares equal a count by hand, leave padding out, and the aux loss is 1 when balanced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.models import LoadedModel, load_model
from mixmoe_megatron.evaluation.routing import (
    GroupRouting,
    Routing,
    group_sums,
    is_mixmoe,
    language_distance,
    measure_routing,
    routing_from_dict,
    specialisation,
)
from tests.helpers.tiny_hf import SENTENCES, save_tiny_dense, tiny_mixmoe, tiny_tokenizer

TEXTS = list(SENTENCES[1:6])


def save_and_load(path: Path, stage: int, **fields) -> LoadedModel:
    tiny_mixmoe(stage=stage, **fields).save_pretrained(path)
    tiny_tokenizer(path)
    return load_model("mixmoe", path)


def count_by_hand(loaded: LoadedModel, texts: list[str]) -> torch.Tensor:
    """Chosen experts [layers, E] by hooks on the router modules, one text at a time, without the BOS token."""
    counts: dict[str, torch.Tensor] = {}

    def hook(name):
        def record(module, inputs, outputs):
            index = outputs[2][1:].flatten()
            counts[name] = counts.get(name, 0) + torch.bincount(index, minlength=loaded.model.config.num_experts)

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in loaded.model.named_modules()
               if name.endswith("mlp.router")]  # fmt: skip
    with torch.inference_mode():
        for ids in loaded.tokenizer.encode(texts, add_special_tokens=True):
            loaded.model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(list(counts.values()))


@pytest.mark.parametrize(("stage", "top_k"), [(1, 1), (2, 1), (2, 2)])
def test_shares_equal_a_count_by_hand(tmp_path, stage, top_k) -> None:
    loaded = save_and_load(tmp_path, stage, topk_per_group=top_k)
    counts = count_by_hand(loaded, TEXTS).unflatten(-1, (stage, -1)).double()
    result = measure_routing(loaded, TEXTS)
    assert result.tokens == sum(map(len, loaded.tokenizer.encode(TEXTS, add_special_tokens=False)))
    assert list(result.layers) == ["1", "3"]
    for row, groups in enumerate(result.layers.values()):
        assert list(groups) == ["lm", "mt"][:stage]
        for index, group in enumerate(groups.values()):
            expected = counts[row, index] / counts[row, index].sum()
            assert group.share == pytest.approx(expected.tolist(), abs=1e-12)
            assert sum(group.mean_prob) == pytest.approx(1.0)
            assert 0.25 <= group.top_prob <= 1.0


def test_padding_does_not_count(tmp_path) -> None:
    loaded = save_and_load(tmp_path, 2)
    together = measure_routing(loaded, TEXTS)
    alone = [measure_routing(loaded, [text]) for text in TEXTS]
    for layer, groups in together.layers.items():
        for name, group in groups.items():
            expected = [
                sum(one.layers[layer][name].share[expert] * one.tokens for one in alone) / together.tokens
                for expert in range(4)
            ]
            assert group.share == pytest.approx(expected, abs=1e-9)


def test_balanced_and_collapsed_routing() -> None:
    balanced = torch.eye(4).repeat(5, 1)
    counts, probs, _ = group_sums(torch.cat([balanced, balanced * 100], dim=-1), num_groups=2, top_k=1)
    assert counts.tolist() == [[5.0] * 4] * 2
    assert probs.sum(dim=-1).tolist() == pytest.approx([20.0, 20.0])
    collapsed = torch.tensor([[50.0, 0.0, 0.0, 0.0]]).repeat(3, 1)
    counts, probs, top = group_sums(collapsed, num_groups=1, top_k=1)
    load_balance = 4 * (counts[0] / 3 * probs[0] / 3).sum().item()
    assert load_balance == pytest.approx(4.0)
    assert top.tolist() == pytest.approx([3.0])


def test_distance_of_languages(tmp_path) -> None:
    loaded = save_and_load(tmp_path, 2)
    german, russian = measure_routing(loaded, [SENTENCES[2]]), measure_routing(loaded, [SENTENCES[4]])
    assert all(value == 0.0 for groups in language_distance(german, german).values() for value in groups.values())
    distances = [value for groups in language_distance(german, russian).values() for value in groups.values()]
    assert len(distances) == 4
    assert all(0.0 <= value <= 1.0 for value in distances)
    assert max(distances) > 0.0


def test_dense_models_have_no_routers(tmp_path) -> None:
    save_tiny_dense(tmp_path)
    loaded = load_model("base", tmp_path)
    assert not is_mixmoe(loaded)
    with pytest.raises(MixMoEError, match="not a Mix-MoE model"):
        measure_routing(loaded, TEXTS)


def test_specialisation_of_languages() -> None:
    def routing(*shares: float) -> Routing:
        return Routing(10, {"1": {"lm": GroupRouting(list(shares), list(shares), 1.0, 0.5)}})

    apart = specialisation({"de": routing(1, 0), "en": routing(0, 1)})["1"]["lm"]
    assert apart == {"mutual_information": 1.0, "normalised": 1.0, "entropy": 0.0, "mean_entropy": 1.0}
    alike = specialisation({"de": routing(0.5, 0.5), "en": routing(0.5, 0.5)})["1"]["lm"]
    assert (alike["mutual_information"], alike["entropy"]) == (0.0, 1.0)
    between = specialisation({"de": routing(0.75, 0.25), "en": routing(0.25, 0.75)})["1"]["lm"]
    assert between["mutual_information"] == pytest.approx(1 - 0.8112781, abs=1e-6)
    value = routing(0.75, 0.25)
    assert routing_from_dict(value.to_dict()) == value
