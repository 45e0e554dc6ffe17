"""hf_to_mixmoe.py --measure: FFNs and neurons are measured as defined, and what is shown is what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from checkpoints_conversion import hf_to_mixmoe
from mixmoe_megatron import dtypes
from mixmoe_megatron.checkpoint.megatron_checkpoint import TorchDistReader, iteration_directory
from mixmoe_megatron.checkpoint.metadata import METADATA_FILE
from mixmoe_megatron.conversion import measured_start
from mixmoe_megatron.conversion.hf_import import ImportRequest, read_hf_model
from mixmoe_megatron.conversion.measured_start import _upcycled, measure_start
from mixmoe_megatron.evaluation.ffn_costs import (
    FITTED_TOKENS,
    MEASURED_TOKENS,
    RIDGE,
    fit_down_projections,
    measure_each,
    measure_ffn_costs,
    measure_importance,
    split_text,
)
from mixmoe_megatron.evaluation.models import LoadedModel, load_model
from mixmoe_megatron.model.options import MixMoEOptions, router_weight_std
from mixmoe_megatron.model.router_rows import folded_router
from mixmoe_megatron.model.upcycling import important_neurons
from tests.helpers.conversion import base_fields
from tests.helpers.mappings import read_tensor
from tests.helpers.tiny_hf import SENTENCES, save_tiny_dense

TEXTS = {"a.txt": list(SENTENCES[1:5]), "b.txt": list(SENTENCES[5:])}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_dense(path, request.param, **base_fields(request.param))
    return path


@pytest.fixture(scope="module")
def loaded(base: Path) -> LoadedModel:
    return load_model("base", base)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("texts")
    for name, lines in TEXTS.items():
        (folder / name).write_text("\n".join(lines))
    return [str(folder / name) for name in TEXTS]


def request_for(base: Path, directory: Path | str = "unused", **options: Any) -> ImportRequest:
    return ImportRequest(str(base), str(directory), MixMoEOptions(**options))


def logits_of(loaded: LoadedModel) -> torch.Tensor:
    ids = torch.tensor(loaded.tokenizer.encode([SENTENCES[1]], add_special_tokens=False))
    with torch.inference_mode():
        return loaded.model(ids).logits


def activations(loaded: LoadedModel, layer: int, lines: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer's neurons give, and the FFN with them: [T, F] and [T, H] float64, a line at a time."""
    mlp, seen = loaded.model.model.layers[layer].mlp, []
    hook = mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    for ids in loaded.tokenizer.encode(lines, add_special_tokens=False):
        with torch.inference_mode():
            loaded.model(torch.tensor([[loaded.start_id, *ids]]))
    hook.remove()
    h = torch.cat(seen)
    with torch.inference_mode():
        activation = functional.silu(mlp.gate_proj(h)) * mlp.up_proj(h)
        return activation.double(), mlp(h).double()


def test_costs_are_perplexities_without_an_ffn(loaded: LoadedModel) -> None:
    costs = measure_ffn_costs(loaded, TEXTS)
    layers = loaded.model.model.layers
    assert len(costs.without) == len(layers)
    down = layers[2].mlp.down_proj.weight
    kept = down.detach().clone()
    with torch.no_grad():
        down.zero_()
    try:
        silent = measure_each(loaded, TEXTS)
    finally:
        with torch.no_grad():
            down.copy_(kept)
    for name in TEXTS:
        assert costs.without[2][name].loss == pytest.approx(silent[name].loss, abs=1e-5)
        assert costs.dense[name].loss != pytest.approx(silent[name].loss, abs=1e-4)
    factors = [math.exp(sum(w[n].loss - costs.dense[n].loss for n in TEXTS) / 2) for w in costs.without]
    assert costs.factors() == pytest.approx(factors)
    assert costs.cheapest_layers(2) == sorted(np.argsort(factors)[:2].tolist())


def test_importance_is_mean_activation_times_the_length_of_the_column(loaded: LoadedModel) -> None:
    length = loaded.model.model.layers[1].mlp.down_proj.weight.detach().norm(dim=0)
    values = [activations(loaded, 1, lines)[0].abs().mean(dim=0) * length for lines in TEXTS.values()]
    found = measure_importance(loaded, TEXTS)[1]
    assert torch.from_numpy(found) == pytest.approx(sum(value / value.sum() for value in values) / 2, rel=1e-4)


def test_down_projections_are_the_least_squares_of_what_is_left_out(loaded: LoadedModel) -> None:
    neurons = {layer: important_neurons(measure_importance(loaded, TEXTS)[layer], 4) for layer in (1, 3)}
    found = fit_down_projections(loaded, TEXTS, neurons, 4)
    for layer, order in neurons.items():
        down = loaded.model.model.layers[layer].mlp.down_proj.weight.detach().double()
        seen = [activations(loaded, layer, lines) for lines in TEXTS.values()]
        a, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
        for expert, chosen in enumerate(order.reshape(4, -1)):
            a_e, w = a[:, chosen], down[:, chosen]
            # the same minimum as one plain least-squares problem: rows that hold each column to what it was
            held = torch.diag((RIDGE * a_e.square().sum(dim=0)).sqrt())
            rest = torch.cat([y - a_e @ w.T, torch.zeros(len(chosen), len(w))])
            change = torch.linalg.lstsq(torch.cat([a_e, held]), rest, driver="gelsd").solution.T
            columns = torch.from_numpy(found[layer][:, expert * len(chosen) : (expert + 1) * len(chosen)]).double()
            torch.testing.assert_close(columns, w + change, rtol=1e-3, atol=1e-4)
            better, worse = ((y - a_e @ columns.T).square().sum(), (y - a_e @ w.T).square().sum())
            assert better < 0.9 * worse


def test_experts_share_the_most_important_neurons_and_are_dealt_the_next() -> None:
    dealt = important_neurons(np.array([5, 1, 9, 3, 8, 7, 2, 6, 4, 0, -1, -2, -3, -4, -5, -6]), 4).reshape(4, 4)
    assert dealt.tolist() == [[2, 4, 5, 3], [2, 4, 7, 6], [2, 4, 0, 1], [2, 4, 8, 9]]


@pytest.mark.parametrize(
    "options",
    [
        {"expert_init": "copy", "router_init_std": 0.0},
        {"expert_init": "slice", "router_init_std": 0.0, "topk_per_group": 4},
        {"expert_init": "copy", "router_prob_scaling": False},
    ],
)
def test_these_starts_equal_the_dense_model(base: Path, loaded: LoadedModel, options: dict[str, Any]) -> None:
    dense = logits_of(loaded)
    with _upcycled(loaded.model, read_hf_model(request_for(base, **options))):
        assert hasattr(loaded.model.model.layers[3].mlp, "experts")
        found = logits_of(loaded)
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)
    assert not hasattr(loaded.model.model.layers[3].mlp, "experts"), "the FFNs are back"


@pytest.mark.parametrize("transform", ["fft", "dct", "random", "none"])
@pytest.mark.parametrize("norm", ["ortho", "backward"])
def test_routers_start_near_uniform_on_real_hidden_states(
    base: Path, loaded: LoadedModel, transform: str, norm: str
) -> None:
    options = {"spectral_transform": transform, "spectral_norm": norm, "moe_layer_placement": "0,1,2,3"}
    probs = []
    with _upcycled(loaded.model, read_hf_model(request_for(base, **options))):
        for layer in loaded.model.model.layers:
            layer.mlp.router.register_forward_hook(lambda m, i, output: probs.append(output[0].softmax(dim=-1)))
        logits_of(loaded)
    assert len(probs) == 4
    for p in probs:
        assert ((p * 4 - 1).abs() < 0.1).all()
        assert p.std() > 1e-4, "not all the same"


@pytest.mark.parametrize("hidden_size", [256, 1024])
@pytest.mark.parametrize("transform", ["fft", "dct", "random", "none"])
@pytest.mark.parametrize("norm", ["ortho", "backward"])
def test_the_logits_have_the_deviation_asked_for_whatever_the_width(
    hidden_size: int, transform: str, norm: str
) -> None:
    options = MixMoEOptions(
        spectral_transform=transform, spectral_norm=norm, spectral_scale=0.5, router_init_std=0.7,
    )  # fmt: skip
    std = router_weight_std(options, hidden_size, 0.02)
    random = np.random.default_rng(0)
    weights = [random.standard_normal((64, hidden_size), dtype=np.float32) * np.float32(std) for _ in range(2)]
    folded = folded_router(weights if transform != "none" else weights[:1], options)
    h = random.standard_normal((hidden_size, 256), dtype=np.float32)
    assert (folded @ h).std() == pytest.approx(0.7, rel=0.05)
    assert router_weight_std(MixMoEOptions.from_preset("paper"), hidden_size, 0.03) == 0.03


def test_the_start_that_is_shown_is_the_one_that_is_written(
    base: Path, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtypes, "FAST_BFLOAT16_FLAGS", ())  # float32 on any machine, as `loaded` below
    status = hf_to_mixmoe.main(
        ["--hf-dir", str(base), "--output-dir", str(tmp_path / "out"), "--moe-every", "2", "--measure", *files]
    )
    assert status == 0
    shown = capsys.readouterr().out
    metadata = json.loads((tmp_path / "out" / METADATA_FILE).read_text())
    options, measured = metadata["options"], metadata["measured"]
    layers = [int(number) for number in options["moe_layer_placement"].split(",")]
    factors = measured["factor_without_ffn"]
    assert options["expert_init"] == "important" and layers == sorted(np.argsort(factors)[:2].tolist())
    dense, upcycled = measured["starts"][:2]
    assert (dense["start"], dense["factor"], upcycled["layers"]) == ("dense", 1.0, layers)
    assert f"| {', '.join(map(str, layers))} | {upcycled['perplexity']['a.txt']:.1f} |" in shown
    assert measured_start.CAVEAT in shown
    assert measured["tokens"].keys() == TEXTS.keys()
    reader = TorchDistReader(iteration_directory(tmp_path / "out"))
    loaded = load_model("base", base)
    fitted = {name: split_text(loaded, lines)[1] for name, lines in TEXTS.items()}
    for layer in layers:
        experts = f"decoder.layers.{layer}.mlp.experts.lm_experts.experts."
        mlp = loaded.model.model.layers[layer].mlp
        order = important_neurons(measure_importance(loaded, fitted)[layer], 4)
        down = fit_down_projections(loaded, fitted, {layer: order}, 4)[layer]
        for expert, chosen in enumerate(torch.from_numpy(order.reshape(4, -1))):
            first = read_tensor(reader, experts + "linear_fc1.weight")[expert]
            assert torch.equal(first, torch.cat([mlp.gate_proj.weight[chosen], mlp.up_proj.weight[chosen]]))
            second = read_tensor(reader, experts + "linear_fc2.weight")[expert]
            assert torch.equal(second, torch.from_numpy(down[:, expert * len(chosen) : (expert + 1) * len(chosen)]))


def test_a_start_that_costs_much_is_told_with_what_costs_less(
    base: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured_start, "WARN_ABOVE", 0.0)
    found = measure_start(request_for(base, expert_init="slice", expert_scale=300.0), files)
    assert found.request.options == MixMoEOptions(expert_init="slice", expert_scale=300.0)
    assert found.request.ffns is None
    starts = found.request.measured["starts"]
    assert [row["start"].split()[1:2] for row in starts] == [[], ["slice"], ["important"], ["copy"]]
    assert found.warning.startswith("this start multiplies the perplexity by")
    for row in starts[2:]:
        assert (f"with {row['start']}" in found.warning) == (row["factor"] < starts[1]["factor"])
    monkeypatch.setattr(measured_start, "WARN_ABOVE", 1.5)
    quiet = measure_start(request_for(base, expert_init="copy", router_init_std=0.0), files)
    assert found.caveat and not quiet.caveat
    assert quiet.warning == "" and quiet.request.measured["factor_without_ffn"] is None
    assert quiet.request.measured["starts"][1]["factor"] == pytest.approx(1, abs=1e-3)


def test_few_lines_of_a_long_text_are_read_and_none_is_both_measured_and_fitted(loaded: LoadedModel) -> None:
    lines = [f"{number} {SENTENCES[1]}" for number in range(10_000)]
    for found, tokens in zip(split_text(loaded, lines), (MEASURED_TOKENS, FITTED_TOKENS), strict=True):
        counts = [len(ids) for ids in loaded.tokenizer.encode(found, add_special_tokens=False)]
        assert sum(counts[:-1]) < tokens <= sum(counts)
    measured, fitted = split_text(loaded, lines)
    assert not set(measured) & set(fitted)
    assert split_text(loaded, lines[:5]) == ([lines[0], lines[4]], lines[1:4])


def test_a_corpus_is_not_read_to_its_end(base: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes((SENTENCES[1].replace("\n", " ") + "\n").encode() * 10_000 + b"\xff is no UTF-8\n")
    assert measure_start(request_for(base, expert_init="copy"), [corpus]).request.measured["tokens"]["corpus.txt"] > 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--expert-init", "important"], "expert_init=important needs text to measure on"),
        (["--moe-layer-placement", "measured"], "moe_layer_placement=measured needs text to measure on"),
        (["--dense", "--measure", "FILE"], "nothing is upcycled: leave it out"),
        (["--measure", "FILE", "--num-experts-per-group", "7"], "ffn_hidden_size=64 is not divisible"),
        (["--measure", "missing.txt"], "missing.txt"),
        (["--measure", "FILE", "FILE"], "two files are called"),
        (["--measure", "ONE LINE"], "one line is not enough"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    base: Path, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    (tmp_path / "one.txt").write_text(SENTENCES[1].replace("\n", " "))
    given = {"FILE": files[0], "ONE LINE": str(tmp_path / "one.txt")}
    words = [given.get(word, word) for word in words]
    assert hf_to_mixmoe.main(["--hf-dir", str(base), "--output-dir", str(tmp_path / "out"), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
