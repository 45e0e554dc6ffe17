"""The experts' linear layers on several threads of a CPU."""

from __future__ import annotations

import pytest
import torch

from mixmoe_megatron.model import expert_ops


@pytest.mark.parametrize("few_rows", [0, 512])  # never, or wherever it may, the product of the transposed matrices
def test_an_expert_multiplies_its_rows(monkeypatch: pytest.MonkeyPatch, few_rows: int) -> None:
    monkeypatch.setattr(expert_ops, "_FEW_ROWS", few_rows)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    counts = [3, 0, 5, 2]
    x = torch.randn(sum(counts), 24, requires_grad=True)
    weight = torch.randn(len(counts), 40, 24, requires_grad=True)
    grad = torch.randn(sum(counts), 40)
    expected = torch.cat([rows @ matrix.T for rows, matrix in zip(x.split(counts), weight, strict=True)])
    wanted = torch.autograd.grad(expected, [x, weight], grad)
    output = expert_ops.looped_linear(x, weight, counts)
    torch.testing.assert_close(output, expected)
    for actual, gradient in zip(torch.autograd.grad(output, [x, weight], grad), wanted, strict=True):
        torch.testing.assert_close(actual, gradient)
