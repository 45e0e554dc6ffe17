"""The Megatron MoE layer against the plain PyTorch block of hf/: outputs, aux losses and every gradient, in float32."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.func import functional_call

from mixmoe_megatron.hf.modeling_mixmoe import router_aux_loss
from mixmoe_megatron.model.moe_layer import MixMoELayer
from tests.helpers.megatron import initialize_megatron, make_config, make_layer, make_options
from tests.helpers.reference import reference_block

TOLERANCE = 1e-5  # of the largest value
AUX_LOSS_COEFF = 0.3
LENGTH, BATCH = 9, 3


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    initialize_megatron()


def reference_parameters(layer: MixMoELayer) -> dict[str, torch.Tensor]:
    """The block's parameters as differentiable functions of the layer's."""
    (weight, bias), groups = layer.router.folded(), layer.experts.groups()
    parameters = {
        "router.weight": weight,
        "experts.gate_up_proj": torch.cat([group.linear_fc1.weight for group in groups]),
        "experts.down_proj": torch.cat([group.linear_fc2.weight for group in groups]),
    }
    if bias is not None:
        parameters["router.bias"] = bias
    return parameters


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error < TOLERANCE, f"relative error {error:.2e}"


def all_gradients(loss: torch.Tensor, layer: MixMoELayer, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {**dict(layer.named_parameters()), "hidden_states": hidden}
    return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))


def check_parity(stage: int, hidden_size: int, with_padding: bool = False, **options: object) -> None:
    config = make_config(
        make_options(moe_every=2, **options),
        stage,
        num_layers=2,
        hidden_size=hidden_size,
        ffn_hidden_size=96,
        moe_aux_loss_coeff=AUX_LOSS_COEFF,
    )
    layer = make_layer(config)
    hidden = torch.randn(LENGTH, BATCH, hidden_size, requires_grad=True)
    weight = torch.randn(LENGTH, BATCH, hidden_size)  # of the outputs in the loss
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    if with_padding:
        padding[0, 5:] = padding[2, 2:] = True
    output, _ = layer(hidden, padding_mask=padding if with_padding else None)
    is_token = ~padding.T.unsqueeze(-1)
    weight = weight * is_token  # nothing depends on what padding becomes

    block, parameters = reference_block(layer, hidden_size), reference_parameters(layer)
    expected = functional_call(block, parameters, (hidden,))
    router = {name.removeprefix("router."): p for name, p in parameters.items() if name.startswith("router.")}
    logits, _, _ = functional_call(block.router, router, (hidden.flatten(0, 1),))
    aux_loss = router_aux_loss((logits,), stage, config.options().topk_per_group, ~padding.T.contiguous())

    close(output * is_token, expected * is_token)
    assert not with_padding or (output * ~is_token).abs().max() < 1e-12  # padding gets next to nothing
    # The layer's aux loss reaches the gradient without being in the loss: its value is added to the reference alone.
    actual_gradients = all_gradients((output * weight).sum(), layer, hidden)
    expected_gradients = all_gradients((expected * weight).sum() + AUX_LOSS_COEFF * aux_loss.sum(), layer, hidden)
    for name, gradient in expected_gradients.items():
        assert gradient.abs().max() > 0, name
        close(actual_gradients[name], gradient)


CASES = [
    (stage, preset, n, k, bias, hidden_size)
    for (n, hidden_size), stage, preset, k, bias in itertools.product(
        [(2, 24), (4, 48), (8, 56)], [1, 2], ["recommended", "paper"], [1, 2], [True, False]
    )
]


@pytest.mark.parametrize(("stage", "preset", "n", "k", "bias", "hidden_size"), CASES)
def test_layer_equals_reference(stage: int, preset: str, n: int, k: int, bias: bool, hidden_size: int) -> None:
    check_parity(stage, hidden_size, preset=preset, num_experts_per_group=n, topk_per_group=k, router_bias=bias)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("transform", ["dct", "random", "none"])
def test_other_transforms(stage: int, transform: str) -> None:
    check_parity(stage, 24, spectral_transform=transform, spectral_scale=0.7, spectral_seed=3)


@pytest.mark.parametrize("stage", [1, 2])
def test_padding_gets_nothing_and_is_left_out_of_the_aux_loss(stage: int) -> None:
    check_parity(stage, 24, with_padding=True)


def test_full_width_experts_and_an_expert_scale() -> None:
    check_parity(2, 24, expert_init="copy", expert_scale=0.5, group_combine="sum")


def test_without_prob_scaling_the_router_learns_from_the_aux_loss_alone() -> None:
    check_parity(2, 24, router_prob_scaling=False)
