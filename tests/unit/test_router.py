"""The router: folding equals transforming, the routing contract, aux losses, and what gradients reach."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from mixmoe_megatron.model.metrics import install_metrics_tracker
from mixmoe_megatron.model.options import router_weight_std
from mixmoe_megatron.model.router import MixMoERouter
from mixmoe_megatron.model.router_rows import new_router_weight
from mixmoe_megatron.model.spectral import (
    fold_router_weight,
    fold_spectral_weight,
    random_projection,
    spectral_features,
)
from tests.helpers.megatron import initialize_megatron, make_config, make_layer, make_options

TRANSFORMS = ["fft", "dct", "random"]
AUX_COEFF = 0.01


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    initialize_megatron()


@pytest.fixture
def tracker() -> MoEMetricsTracker:
    tracker = MoEMetricsTracker()
    set_moe_metrics_tracker(tracker)
    return tracker


def make_router(stage: int, hidden_size: int = 24, coeff: float = 0.0, **options: Any) -> MixMoERouter:
    config = make_config(
        make_options(moe_every=2, **options), stage, num_layers=2, hidden_size=hidden_size, moe_aux_loss_coeff=coeff
    )
    return make_layer(config).router


@pytest.mark.parametrize("hidden_size", [8, 21, 24, 56])
@pytest.mark.parametrize("norm", ["ortho", "backward"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_folded_weight_equals_transformed_activations(transform: str, norm: str, hidden_size: int) -> None:
    hidden = torch.randn(7, hidden_size, requires_grad=True)
    weight, spectral_weight = torch.randn(2, 4, hidden_size).unbind()
    weight.requires_grad_()
    spectral_weight.requires_grad_()
    loss_weight = torch.randn(7, 4)
    folded = functional.linear(hidden, fold_router_weight(weight, spectral_weight, transform, norm, 0.7, 5))
    features = spectral_features(hidden, transform, norm, 0.7, 5)
    transformed = functional.linear(hidden, weight) + functional.linear(features, spectral_weight)
    torch.testing.assert_close(folded, transformed, rtol=1e-4, atol=1e-4)
    inputs = (hidden, weight, spectral_weight)
    for one, other in zip(
        torch.autograd.grad((folded * loss_weight).sum(), inputs),
        torch.autograd.grad((transformed * loss_weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_fft_features_are_the_papers() -> None:
    hidden = torch.randn(3, 21)
    torch.testing.assert_close(spectral_features(hidden, "fft", "backward"), torch.fft.fft(hidden).real)


@pytest.mark.parametrize("norm", ["ortho", "backward"])
def test_dct_is_scipys(norm: str) -> None:
    scipy_fft = pytest.importorskip("scipy.fft")
    hidden = torch.randn(3, 21)
    expected = torch.from_numpy(scipy_fft.dct(hidden.numpy(), type=2, norm=norm))
    torch.testing.assert_close(spectral_features(hidden, "dct", norm), expected, rtol=1e-5, atol=1e-5)


def test_random_projection_is_fixed_by_its_seed() -> None:
    device = torch.device("cpu")
    first = random_projection(24, "ortho", 1, device).clone()
    random_projection.cache_clear()
    torch.manual_seed(99)
    assert torch.equal(first, random_projection(24, "ortho", 1, device))
    assert not torch.equal(first, random_projection(24, "ortho", 2, device))
    assert abs(first.std().item() * math.sqrt(24) - 1) < 0.1


def test_unknown_transforms_and_missing_weights() -> None:
    weight = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="unknown spectral transform"):
        fold_spectral_weight(weight, "none")
    with pytest.raises(ValueError, match="does not go with"):
        fold_router_weight(weight, None, "fft")
    assert torch.equal(fold_router_weight(weight, None, "none"), weight)


@pytest.mark.parametrize("transform", [*TRANSFORMS, "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_and_their_marks(transform: str, bias: bool) -> None:
    router = make_router(2, spectral_transform=transform, router_bias=bias)
    names = [name for name, _ in router.named_parameters()]
    expected = ["weight"] + ["spectral_weight"] * (transform != "none") + ["bias"] * bias
    assert names == [f"{group}.{name}" for group in ("lm", "mt") for name in expected]
    assert all(hasattr(parameter, "sequence_parallel") for parameter in router.parameters())
    assert "mt.weight" not in dict(make_router(1).named_parameters())


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_routing_contract(stage: int, n: int, k: int, preset: str) -> None:
    router = make_router(stage, preset=preset, num_experts_per_group=n, topk_per_group=k)
    probs, routing_map = router(torch.randn(6, 3, 24))
    assert probs.dtype == torch.float32 and routing_map.dtype == torch.bool
    assert probs.shape == routing_map.shape == (18, n * stage)
    assert torch.equal(routing_map.view(18, stage, n).sum(-1), torch.full((18, stage), k)), "k in each group"
    assert torch.equal(probs > 0, routing_map)
    if k == n:
        scale = {"recommended": n / stage, "paper": 1.0}[preset]
        torch.testing.assert_close(probs.view(18, stage, n).sum(-1), torch.full((18, stage), scale))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"expert_scale": 1e-3}, {"router_prob_scaling": False}])
def test_the_flex_dispatcher_finds_the_chosen_experts(
    options: dict[str, Any], padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees the probs alone: they are never so small that hardware takes them for 0, whatever the softmax gave."""
    router = make_router(2, num_experts_per_group=4, topk_per_group=3, **options)
    with torch.no_grad():
        router.lm.bias.copy_(torch.tensor([0.0, -500.0, -900.0, -1000.0]))
        router.mt.bias.copy_(torch.tensor([0.0, 80.0, -80.0, 1e4]))
    padding_mask = torch.tensor([[False, True, False, True]]) if padded else None
    probs, routing_map = router(torch.randn(4, 1, 24), padding_mask)
    assert probs.dtype == torch.float32 and probs[routing_map].min() >= torch.finfo(torch.float32).tiny
    for name in ("fused_dispatch", "set_deepep_num_sms"):
        monkeypatch.setattr(token_dispatcher, name, lambda *args: None)
    manager = token_dispatcher._DeepepManager(None, 8, 6, 8, router.config)
    manager.setup_metadata(routing_map, probs)
    assert torch.equal(torch.zeros_like(routing_map).scatter_(1, manager.token_indices, True), routing_map)
    assert torch.equal(torch.zeros_like(probs).scatter_(1, manager.token_indices, manager.token_probs), probs)


@pytest.mark.parametrize(("hidden_size", "n", "k"), [(5120, 4, 2), (5120, 8, 4), (896, 3, 2)])
def test_saturated_routers_choose_by_their_logits(hidden_size: int, n: int, k: int) -> None:
    """An unnormalised FFT spreads the logits so far that all probabilities but one may underflow to 0."""
    router = make_router(2, hidden_size, preset="paper", num_experts_per_group=n, topk_per_group=k)
    hidden = torch.randn(1000, 1, hidden_size, generator=torch.Generator().manual_seed(0))
    probs, routing_map = router(hidden)
    oracle = torch.cat([
        functional.linear(hidden[:, 0].double(), group.weight.double())
        + functional.linear(torch.fft.fft(hidden[:, 0].double()).real, group.spectral_weight.double())
        for group in (router.lm, router.mt)
    ], dim=1).view(1000, 2, n)  # fmt: skip
    assert (oracle.float().softmax(-1) == 0).float().mean() > 0.1, "the case that is meant"
    expected = torch.zeros_like(oracle, dtype=torch.bool).scatter_(-1, oracle.topk(k).indices, True)
    wrong = (routing_map.view(1000, 2, n) != expected).any(-1).float().mean()
    assert wrong < 2e-3, "nothing but float32's rounding of two logits that are next to equal"
    assert torch.equal(probs > 0, routing_map)


def test_probs_are_constant_without_prob_scaling() -> None:
    router = make_router(2, router_prob_scaling=False)
    probs, routing_map = router(torch.randn(4, 1, 24))
    assert torch.equal(probs, 0.5 * routing_map)
    probs.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in router.parameters()), "a zero gradient, not none"


def test_maths_is_float32_for_bfloat16_input() -> None:
    router = make_router(2).bfloat16()
    hidden = torch.randn(5, 2, 24, dtype=torch.bfloat16, requires_grad=True)
    logits = router.gating(hidden)
    weight, bias = router.folded()
    assert weight.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, functional.linear(hidden.float(), weight, bias.float()))
    logits.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_physical_order_gives_each_rank_both_groups(ep_size: int) -> None:
    router = make_router(2)
    router.ep_size = ep_size
    n = 4
    columns = torch.arange(2 * n).view(1, 2, n)
    local = n // ep_size
    expected = []
    for rank in range(ep_size):
        ids = range(rank * local, (rank + 1) * local)
        expected += [*ids, *(n + i for i in ids)]
    assert router._to_physical_order(columns).tolist() == [expected]


def routed(router: MixMoERouter, bias: list[float], tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        for group in router.group_routers():
            group.weight.zero_()
            group.spectral_weight.zero_()
            group.bias.copy_(torch.tensor(bias))
    return router(tokens, **kwargs)[0]


def recorded(tracker: MoEMetricsTracker) -> dict[str, float]:
    return {name: entry.values.sum().item() for name, entry in tracker.metrics.items()}


def test_aux_loss_is_n_at_collapse(tracker: MoEMetricsTracker) -> None:
    routed(make_router(2, coeff=AUX_COEFF), [80.0, 0.0, 0.0, 0.0], torch.randn(5, 2, 24))
    expected = {"lm_load_balancing_loss": 4.0, "mt_load_balancing_loss": 4.0}
    assert recorded(tracker) == pytest.approx(expected)


def test_aux_loss_is_one_when_balanced(tracker: MoEMetricsTracker) -> None:
    router = make_router(1, coeff=AUX_COEFF)
    with torch.no_grad():
        router.lm.spectral_weight.zero_()
        router.lm.bias.zero_()
        router.lm.weight.zero_()
        router.lm.weight[:, :4] = 3 * torch.eye(4)
    router(functional.one_hot(torch.arange(8) % 4, 24).float().view(8, 1, 24))
    assert recorded(tracker) == pytest.approx({"lm_load_balancing_loss": 1.0})


def test_padding_counts_for_nothing(tracker: MoEMetricsTracker) -> None:
    router, hidden = make_router(2, coeff=AUX_COEFF), torch.randn(6, 2, 24)
    router(hidden[:4])
    without = recorded(tracker)
    tracker.clear()
    padding = torch.zeros(6, 2, dtype=torch.bool)
    padding[4:] = True
    router(hidden, padding)
    assert recorded(tracker) == pytest.approx(without)
    tracker.clear()
    router(hidden, torch.ones(6, 2, dtype=torch.bool))
    assert set(recorded(tracker).values()) == {0.0}


@pytest.mark.parametrize(("reduction", "divisor"), [("mean", 2), ("sum", 1)])
def test_coefficient_by_reduction(reduction: str, divisor: int) -> None:
    config = make_config(make_options(moe_every=2, lb_reduction=reduction), 1, moe_aux_loss_coeff=AUX_COEFF)
    assert make_layer(config).router.group_aux_loss_coeff == pytest.approx(AUX_COEFF / divisor)


def test_no_aux_loss_without_training_or_gradients(tracker: MoEMetricsTracker) -> None:
    router, hidden = make_router(2, coeff=AUX_COEFF), torch.randn(4, 1, 24)
    with torch.no_grad():
        router(hidden)
    router.eval()
    router(hidden)
    assert not tracker.metrics


def test_a_frozen_lm_router_sends_its_aux_loss_to_the_hidden_states(tracker: MoEMetricsTracker) -> None:
    router = make_router(2, coeff=AUX_COEFF)
    router.lm.requires_grad_(False)
    hidden = torch.randn(5, 2, 24, requires_grad=True)
    probs, _ = router(hidden)
    (probs.view(10, 2, 4)[:, 0] * 0).sum().backward()  # only the aux losses are left
    assert router.lm.weight.grad is None and router.mt.weight.grad is not None
    both = hidden.grad.clone()
    hidden.grad = None
    router.stage = 1  # the LM group alone
    (router.routing(_lm_logits(router, hidden))[0] * 0).sum().backward()
    assert hidden.grad.abs().max() > 0 and not torch.equal(both, hidden.grad)


def _lm_logits(router: MixMoERouter, hidden: torch.Tensor) -> torch.Tensor:
    weight, bias = router.folded()
    return functional.linear(hidden, weight[:4], bias[:4])


def test_the_loss_scale_scales_the_aux_loss() -> None:
    gradients = []
    for scale in (1.0, 8.0):
        router = make_router(1, coeff=AUX_COEFF)
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(scale))
        (router(torch.ones(4, 1, 24))[0] * 0).sum().backward()
        gradients.append(router.lm.weight.grad)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    torch.testing.assert_close(8 * gradients[0], gradients[1])


class CountOperations(TorchDispatchMode):
    """Counts the operations that reach a device's kernels, views too: each costs the host some microseconds."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("stage", "most_forward", "most_backward"), [(1, 48, 32), (2, 51, 38)])
def test_the_router_is_few_operations(stage: int, most_forward: int, most_backward: int) -> None:
    """They, not its arithmetic, decide its time on a GPU. In bfloat16, in training, with aux losses and metrics."""
    router = make_router(stage, coeff=AUX_COEFF).bfloat16()
    if stage == 2:
        router.lm.requires_grad_(False)
    router.set_layer_number(2)
    install_metrics_tracker(stage, [1], 4)
    hidden = torch.randn(16, 2, 24, dtype=torch.bfloat16, requires_grad=True)
    router(hidden)  # makes room for the metrics
    with CountOperations() as forward:
        probs, _ = router(hidden)
    with CountOperations() as backward:
        probs.backward(torch.ones_like(probs))
    assert forward.count <= most_forward and backward.count <= most_backward, (forward.count, backward.count)
    assert hidden.grad is not None and hidden.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_weights_are_those_of_a_conversion(dtype: torch.dtype) -> None:
    """They hang on seed, layer and group alone: not on what torch drew before, nor on which layers a rank holds."""
    config = make_config(make_options(moe_every=2), 2, num_layers=2, params_dtype=dtype, seed=7)
    torch.manual_seed(torch.randint(1 << 30, ()).item())
    router = make_layer(config).router
    std = router_weight_std(config.options(), 24, config.init_method_std)
    for name, parameter in router.named_parameters():
        if name.endswith("weight"):
            drawn = new_router_weight(f"decoder.layers.1.mlp.router.{name}", (4, 24), std, 7)
            assert torch.equal(parameter, torch.from_numpy(drawn).to(dtype)), name
    with torch.no_grad():
        router.lm.weight.zero_()
    router.set_layer_number(1)
    assert not router.lm.weight.any()  # weights that were loaded stay


@pytest.mark.parametrize("size", [8, 15])
def test_of_the_transforms_only_the_dct_keeps_every_direction(size: int) -> None:
    """What examples/study/README.md says of Table V: the real FFT keeps the even half of h, the DCT all of it."""
    identity = torch.eye(size)
    reversal = identity[[-index % size for index in range(size)]]
    fft, dct = (spectral_features(identity, transform).T for transform in ("fft", "dct"))
    torch.testing.assert_close(dct.T @ dct, identity, atol=1e-5, rtol=0)
    torch.testing.assert_close(fft.T @ fft, (identity + reversal) / 2, atol=1e-5, rtol=0)
