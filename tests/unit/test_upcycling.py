"""Upcycling: the experts add up to the dense FFN, and the routers' draw depends on the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model import upcycling
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.model.router_rows import folded_router, new_router_weight
from mixmoe_megatron.model.spectral import fold_router_weight
from mixmoe_megatron.model.upcycling import Array

HIDDEN, FFN, EXPERTS = 6, 12, 4
EXPECTED = [0.013221075, -0.042278696, 0.00928599, -0.032412663]  # of decoder.layers.0.mlp.router.lm.weight, seed 1234


@pytest.fixture
def dense() -> tuple[Array, Array, Array]:
    random = np.random.default_rng(0)
    return random.normal(size=(FFN, HIDDEN)), random.normal(size=(FFN, HIDDEN)), random.normal(size=(HIDDEN, FFN))


def run_expert(gate_up: Array, down: Array, x: Array) -> Array:
    gate, up = np.split(x @ gate_up.T, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ down.T


def test_slices_add_up_to_the_dense_ffn(dense) -> None:
    gate, up, down = dense
    x = np.random.default_rng(1).normal(size=(5, HIDDEN))
    gate_up = upcycling.experts_from_dense_gate_up(gate, up, EXPERTS, "slice")
    downs = upcycling.experts_from_dense_down(down, EXPERTS, "slice")
    assert gate_up.shape == (EXPERTS, 2 * FFN // EXPERTS, HIDDEN) and downs.shape == (EXPERTS, HIDDEN, FFN // EXPERTS)
    total = sum(run_expert(gate_up[e], downs[e], x) for e in range(EXPERTS))
    np.testing.assert_allclose(total, run_expert(upcycling.pack_gate_up(gate, up), down, x))


def test_each_copy_is_the_dense_ffn(dense) -> None:
    gate, up, down = dense
    gate_up = upcycling.experts_from_dense_gate_up(gate, up, EXPERTS, "copy")
    downs = upcycling.experts_from_dense_down(down, EXPERTS, "copy")
    for e in range(EXPERTS):
        assert np.array_equal(gate_up[e], np.concatenate((gate, up))) and np.array_equal(downs[e], down)


def test_width_of_an_expert() -> None:
    assert upcycling.expert_ffn_hidden_size(12, 4, "slice") == 3
    assert upcycling.expert_ffn_hidden_size(13, 4, "copy") == 13
    with pytest.raises(MixMoEError, match="13 is not divisible by num_experts_per_group=4"):
        upcycling.expert_ffn_hidden_size(13, 4, "slice")
    with pytest.raises(MixMoEError, match="expert_init"):
        upcycling.expert_ffn_hidden_size(12, 4, "split")


def test_router_draw_depends_on_seed_and_name_alone() -> None:
    """The values are written down: a checkpoint that is made again is the same, whatever numpy makes it."""
    names = [f"decoder.layers.{layer}.mlp.router.{group}.weight" for layer in (0, 1) for group in ("lm", "mt")]
    draws = {(seed, name): new_router_weight(name, (4, 512), 0.02, seed) for seed in (-1, 1234) for name in names}
    assert len({draw.tobytes() for draw in draws.values()}) == len(draws)
    drawn = draws[1234, names[0]]
    assert drawn.dtype == np.float32 and np.array_equal(drawn, new_router_weight(names[0], (4, 512), 0.02, 1234))
    assert drawn.std() == pytest.approx(0.02, rel=0.1) and abs(drawn.mean()) < 0.002
    assert drawn[0, :4] == pytest.approx(EXPECTED, rel=1e-6)


@pytest.mark.parametrize("transform", ["fft", "dct", "random", "none"])
@pytest.mark.parametrize("norm", ["ortho", "backward"])
@pytest.mark.parametrize("size", [6, 9])
def test_routers_are_folded_as_in_the_model(transform: str, norm: str, size: int) -> None:
    options = MixMoEOptions(spectral_transform=transform, spectral_norm=norm, spectral_scale=0.7, spectral_seed=3)
    kinds = 1 if transform == "none" else 2
    weights = [torch.randn(4, size) for _ in range(2 * kinds)]
    pairs = [(*weights[k * kinds : (k + 1) * kinds], None)[:2] for k in range(2)]
    expected = torch.cat([fold_router_weight(h, f, transform, norm, 0.7, 3) for h, f in pairs])
    found = folded_router([weight.numpy() for weight in weights], options)
    assert found.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)
