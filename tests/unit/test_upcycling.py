"""Upcycling: the experts add up to the dense FFN, and the routers' draw depends on the seed alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model import upcycling

HIDDEN, FFN, EXPERTS = 6, 12, 4


@pytest.fixture
def dense() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(FFN, HIDDEN), torch.randn(FFN, HIDDEN), torch.randn(HIDDEN, FFN)


def run_expert(gate_up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (silu(gate) * up) @ down.T


def test_slices_add_up_to_the_dense_ffn(dense) -> None:
    gate, up, down = dense
    x = torch.randn(5, HIDDEN)
    gate_up = upcycling.experts_from_dense_gate_up(gate, up, EXPERTS, "slice")
    downs = upcycling.experts_from_dense_down(down, EXPERTS, "slice")
    assert gate_up.shape == (EXPERTS, 2 * FFN // EXPERTS, HIDDEN) and downs.shape == (EXPERTS, HIDDEN, FFN // EXPERTS)
    total = sum(run_expert(gate_up[e], downs[e], x) for e in range(EXPERTS))
    torch.testing.assert_close(total, run_expert(upcycling.pack_gate_up(gate, up), down, x))


def test_each_copy_is_the_dense_ffn(dense) -> None:
    gate, up, down = dense
    gate_up = upcycling.experts_from_dense_gate_up(gate, up, EXPERTS, "copy")
    downs = upcycling.experts_from_dense_down(down, EXPERTS, "copy")
    for e in range(EXPERTS):
        assert torch.equal(gate_up[e], torch.cat((gate, up))) and torch.equal(downs[e], down)


@pytest.mark.parametrize("expert_init", ["slice", "copy"])
def test_numpy_arrays_are_cut_as_tensors_are(dense, expert_init: str) -> None:
    gate, up, down = dense
    for cut, matrices in (
        (upcycling.experts_from_dense_gate_up, (gate, up)),
        (upcycling.experts_from_dense_down, (down,)),
    ):
        found = cut(*(matrix.numpy() for matrix in matrices), EXPERTS, expert_init)
        assert torch.equal(torch.from_numpy(found), cut(*matrices, EXPERTS, expert_init))


def test_width_of_an_expert() -> None:
    assert upcycling.expert_ffn_hidden_size(12, 4, "slice") == 3
    assert upcycling.expert_ffn_hidden_size(13, 4, "copy") == 13
    with pytest.raises(MixMoEError, match="13 is not divisible by num_experts_per_group=4"):
        upcycling.expert_ffn_hidden_size(13, 4, "slice")
    with pytest.raises(MixMoEError, match="expert_init"):
        upcycling.expert_ffn_hidden_size(12, 4, "split")


def test_router_draw_depends_on_the_generator_alone() -> None:
    draws = [upcycling.init_router_weight(4, 512, 0.02, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draws) and draws[0].dtype is torch.float32
    assert draws[0].std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(draws[0][0], draws[0][1])
