"""The experts of the Hugging Face model: every way to compute them gives the same outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from mixmoe_megatron.hf import modeling_mixmoe
from mixmoe_megatron.hf.modeling_mixmoe import MixMoEBlock, MixMoEPackedExperts
from tests.helpers.tiny_hf import randomize, tiny_mixmoe, tiny_mixmoe_config

HERE = 8  # experts of the layer; an id of 8 is an expert of another rank


def tiny_experts(dtype: torch.dtype) -> MixMoEPackedExperts:
    config = tiny_mixmoe_config()
    config._experts_implementation = "eager"  # read by transformers 5.x only
    experts = MixMoEPackedExperts(config).to(dtype)
    randomize(experts)
    return experts


def one_by_one(
    experts: MixMoEPackedExperts, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Equations 1-2, one token and one expert at a time."""
    output = []
    for token, ids, factors in zip(hidden_states, index.tolist(), weights, strict=True):
        total = torch.zeros_like(factors[0]) * token
        for expert, factor in zip(ids, factors, strict=True):
            if expert < HERE:
                gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
                total = total + factor * (experts.down_proj[expert] @ (experts.act_fn(gate) * up))
        output.append(total)
    return torch.stack(output).to(hidden_states.dtype)


def outputs_and_gradients(experts: MixMoEPackedExperts, forward: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    """Experts 1 and 6 get no token; the last token's second expert is on another rank."""
    generator = torch.Generator().manual_seed(3)
    index = torch.tensor([0, 2, 3])[torch.randint(0, 3, (9, 1), generator=generator)]
    index = torch.cat([index, torch.tensor([4, 5, 7])[torch.randint(0, 3, (9, 1), generator=generator)]], dim=1)
    index[-1, 1] = HERE
    hidden_states = torch.linspace(-1, 1, 9 * 32).view(9, 32).to(experts.down_proj.dtype).requires_grad_()
    weights = torch.linspace(0.1, 2, 18).view(9, 2).requires_grad_()
    experts.zero_grad()
    output = forward(hidden_states, index, weights)
    output.float().square().sum().backward()
    gradients = [hidden_states.grad, weights.grad, experts.gate_up_proj.grad, experts.down_proj.grad]
    return [output.detach(), *(gradient.clone() for gradient in gradients)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["a GEMM per expert", "grouped GEMM", "all experts"])
def test_every_way_is_the_equations(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = tiny_experts(dtype)
    expected = outputs_and_gradients(experts, lambda *args: one_by_one(experts, *args))
    if way == "grouped GEMM":  # the CUDA path, run on the CPU
        monkeypatch.setattr(modeling_mixmoe, "_can_use_grouped_mm", lambda *tensors: True)
    results = outputs_and_gradients(experts, experts._dense_forward if way == "all experts" else experts)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        torch.testing.assert_close(result, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "can"),
    [
        ((8, 0), torch.bfloat16, 32, False),  # raises, or copies offsets to the host
        ((9, 0), torch.bfloat16, 32, True),
        ((9, 0), torch.bfloat16, 36, False),
        ((9, 0), torch.float16, 32, False),
        ((10, 0), torch.bfloat16, 32, False),  # wrong gradients of experts without tokens
        ((12, 0), torch.bfloat16, 32, False),
    ],
)
def test_devices_of_the_grouped_gemm(
    capability: tuple[int, int], dtype: torch.dtype, width: int, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tensor = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(4, width), device="cuda")
    assert modeling_mixmoe._can_use_grouped_mm(tensor, tensor) is can
    assert not modeling_mixmoe._can_use_grouped_mm(torch.zeros(4, 32, dtype=torch.bfloat16)), "a CPU"


def test_autocast_casts_the_experts_and_not_the_router() -> None:
    config = tiny_mixmoe_config()
    config._experts_implementation = "eager"
    block, hidden_states = MixMoEBlock(config), torch.randn(2, 5, 32)
    randomize(block)
    seen = []
    block.experts.register_forward_hook(lambda module, inputs, output: seen.append(inputs[2]))
    expected = block(hidden_states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = block(hidden_states)
    assert torch.equal(*seen)  # the routing weights
    torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    assert not torch.equal(output, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model(dtype: torch.dtype) -> None:
    model, ids = tiny_mixmoe(), torch.randint(3, 512, (2, 7))
    expected = model(ids).logits
    half = model.to(dtype)
    logits = half(ids).logits
    assert logits.dtype == dtype
    assert half.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > 7
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
