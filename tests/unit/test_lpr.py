"""The loss of MoE-LPR's second phase by hand, the scale that makes it a mean, and what it does not go with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.moe_lpr import MOE_LPR
from mixmoe_megatron.model.metrics import install_metrics_tracker
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.training import lpr_step
from tests.helpers.megatron import gradients, initialize_megatron, make_config, make_layer

COEFF = 0.1
SHAPE = (6, 2)  # S, B


@pytest.fixture(autouse=True)
def megatron() -> None:
    initialize_megatron()


def make_lpr_layer(**settings: Any) -> torch.nn.Module:
    options = MixMoEOptions.from_preset("recommended", **MOE_LPR.options, moe_every=2)
    return make_layer(make_config(options, 1, **{"num_layers": 2, "lpr_coeff": COEFF, **settings}))


@pytest.mark.parametrize("form", ["paper", "released"])
def test_the_loss_is_the_mean_of_minus_log_p_by_hand(form: str) -> None:
    layer, hidden = make_lpr_layer(lpr_impl=form), torch.randn(*SHAPE, 24)
    is_original = torch.tensor([[True] * SHAPE[0], [False] * SHAPE[0]])
    weights = is_original / is_original.sum()
    tracker = install_metrics_tracker(1, [1], 4, has_lpr=True)

    def lpr_loss() -> torch.Tensor:
        probs = torch.softmax(hidden @ layer.router.lm.weight.T, dim=-1)
        if form == "released":
            probs = torch.softmax(probs, dim=-1)
        return -probs[..., 0][is_original.T].log().mean()

    def by_hand() -> torch.Tensor:
        return layer(hidden)[0].square().sum() + COEFF * lpr_loss()

    expected = gradients(layer, by_hand)
    tracker.clear()
    found = gradients(layer, lambda: layer(hidden, padding_mask=weights)[0].square().sum())
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    without = gradients(layer, lambda: layer(hidden)[0].square().sum())
    assert not torch.allclose(without["router.lm.weight"], found["router.lm.weight"], atol=1e-4)
    logged = float(tracker.report(1.0, 1).partition("lpr_loss: ")[2].split()[0])
    assert logged == pytest.approx(lpr_loss().item(), rel=1e-5)


def test_a_batch_of_new_languages_alone_gives_nothing() -> None:
    layer, hidden = make_lpr_layer(), torch.randn(*SHAPE, 24)
    tracker = install_metrics_tracker(1, [1], 4, has_lpr=True)
    found = gradients(layer, lambda: layer(hidden, padding_mask=torch.zeros(SHAPE[::-1]))[0].square().sum())
    expected = gradients(layer, lambda: layer(hidden)[0].square().sum())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "lpr_loss: 0.000000E+00" in tracker.report(1.0, 1)
    assert layer.router.lpr_weights is None


def test_an_improbable_base_expert_gives_a_finite_gradient() -> None:
    layer, hidden = make_lpr_layer(), torch.ones(*SHAPE, 24)
    with torch.no_grad():
        layer.router.lm.weight.copy_(torch.tensor([-100.0, 100, 0, 0])[:, None])
    found = gradients(layer, lambda: layer(hidden, padding_mask=torch.ones(SHAPE[::-1]))[0].sum() * 0)
    assert found["router.lm.weight"][0].min() < 0 < found["router.lm.weight"][1].max()
    assert all(gradient.isfinite().all() for gradient in found.values())


def batch(*is_original: bool, length: int = 4) -> dict[str, torch.Tensor]:
    shape = (len(is_original), length)
    return {
        "tokens": torch.zeros(shape).long(),
        "loss_mask": torch.ones(shape),
        "is_original": torch.tensor(is_original),
    }


@pytest.mark.parametrize(
    ("per_token", "originals", "scale"),
    [
        (False, [(True, False), (False, False), (True, True)], 3 / 12),  # 3 micro-batches, 12 tokens of 24 count
        (True, [(True, False), (False, False), (True, True)], 24 / 12),
        (False, [(False, False)], 1.0),
    ],
)
def test_the_scale_makes_it_the_mean_over_the_global_batch(
    monkeypatch: pytest.MonkeyPatch, per_token: bool, originals: list[tuple[bool, ...]], scale: float
) -> None:
    """Megatron divides by the micro-batches, or by the tokens of the main loss; each token's weight is the rest."""
    calls: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
    monkeypatch.setattr(lpr_step, "get_args", lambda: SimpleNamespace(calculate_per_token_loss=per_token))
    monkeypatch.setattr(lpr_step, "get_num_microbatches", lambda: len(originals))
    monkeypatch.setattr(lpr_step, "forward_step", lambda data, model, scale: calls.append((next(data), scale)))
    step, data = lpr_step.LPRStep(), iter([batch(*samples) for samples in originals * 2])
    for _ in range(2 * len(originals)):  # two steps
        step(data, SimpleNamespace(training=True))
    for (read, found), samples in zip(calls, originals * 2, strict=True):
        assert found.item() == pytest.approx(scale)
        assert read["padding_mask"].tolist() == [[float(sample)] * 4 for sample in samples]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lpr_coeff": -1.0}, "lpr_coeff must be finite and not negative"),
        ({"lpr_impl": "twice"}, "lpr_impl must be paper or released, got 'twice'"),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
            "--recompute-modules moe, which",
        ),
    ],
)
def test_refusals(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MixMoEError, match=sentence):
        make_lpr_layer(**settings)


def test_it_needs_a_base_expert() -> None:
    with pytest.raises(MixMoEError, match="convert one with --method moe_lpr"):
        make_config(MixMoEOptions(moe_every=2), 1, lpr_coeff=COEFF)
    for values in ({"expert_init": "slice"}, {"expert_init": "copy", "num_experts_per_group": 1}):
        with pytest.raises(MixMoEError, match="base_expert needs expert_init=copy and num_experts_per_group of 2"):
            MixMoEOptions(base_expert=True, **values)
    with pytest.raises(MixMoEError, match="there are no MT experts beside it"):
        make_config(MixMoEOptions(base_expert=True, expert_init="copy", moe_every=2), 2)
