"""Training stops at its first step when no rank has a gradient, and asks only once."""

from __future__ import annotations

import argparse

import pytest
import torch

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.registry import phase_of_stage
from mixmoe_megatron.training import startup
from tests.helpers.megatron import initialize_megatron


@pytest.fixture(autouse=True)
def stub_of_megatron(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Stand in for Megatron's gradient reduction and arguments; return the calls of the former."""
    initialize_megatron()
    calls: list[tuple] = []
    monkeypatch.setattr(startup, "finalize_model_grads", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(startup, "get_args", lambda: argparse.Namespace(recompute_granularity="full"))
    return calls


def chunk_with_gradient(trained: float, frozen: float = 0.0) -> torch.nn.Module:
    """A model of one trained and one frozen tensor whose `main_grad` has one entry that is not zero, or none."""
    chunk = torch.nn.Linear(3, 2)
    chunk.bias.requires_grad_(False)
    for parameter, value in ((chunk.weight, trained), (chunk.bias, frozen)):
        parameter.main_grad = torch.zeros_like(parameter, requires_grad=False)
        parameter.main_grad.view(-1)[1] = value
    return chunk


@pytest.mark.parametrize("value", [1e-30, -2.0])
def test_a_gradient_lets_training_go_on(stub_of_megatron: list[tuple], value: float) -> None:
    finalize = startup.guard_first_gradient(phase_of_stage(1))
    chunk = chunk_with_gradient(value)
    finalize([chunk_with_gradient(0.0), chunk], "tokens", pg_collection=None)
    chunk.weight.main_grad.zero_()
    finalize([chunk], "tokens", pg_collection=None)  # a later step may have none
    assert [call[0][1:] for call in stub_of_megatron] == [("tokens",), ("tokens",)]
    assert stub_of_megatron[0][1] == {"pg_collection": None}


def test_no_gradient_stops_training(stub_of_megatron: list[tuple]) -> None:
    finalize = startup.guard_first_gradient(phase_of_stage(2))
    with pytest.raises(MixMoEError, match=r"zero on every rank \(stage2, 1 trainable tensors here, recompute full\)"):
        finalize([chunk_with_gradient(0.0, frozen=1.0)])
    assert len(stub_of_megatron) == 1, "after the gradients of all micro-batches and ranks are summed"


def test_a_gradient_that_is_not_a_number_is_left_to_megatron() -> None:
    startup.guard_first_gradient(phase_of_stage(1))([chunk_with_gradient(float("nan"))])


def test_rows_that_pad_the_vocabulary_take_no_part_and_no_copy() -> None:
    """Their write is not recorded: autograd would copy the gradient of all logits for it, in each micro-batch."""
    hidden = torch.randn(3, 2, 4, requires_grad=True)
    rows = torch.randn(5, 4)
    logits = hidden @ rows.T
    recorded = logits.grad_fn
    startup._lower_logits(3, torch.nn.Identity(), (), (logits, None))
    assert logits.grad_fn is recorded and logits.requires_grad
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    loss = torch.nn.functional.cross_entropy(logits.view(6, 5), labels)
    (found,) = torch.autograd.grad(loss, hidden)
    expected = torch.nn.functional.cross_entropy((hidden @ rows[:3].T).view(6, 3), labels)
    assert torch.allclose(loss, expected)
    assert torch.allclose(found, torch.autograd.grad(expected, hidden)[0])
