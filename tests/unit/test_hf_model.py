"""The Hugging Face Mix-MoE model: its maths against the equations read token by token, saving, loading, training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from mixmoe_megatron.hf import (
    MixMoEConfig,
    MixMoEForCausalLM,
)
from mixmoe_megatron.hf.modeling_mixmoe import MixMoEBlock, router_aux_loss
from tests.helpers.tiny_hf import randomize, tiny_dense, tiny_mixmoe, tiny_mixmoe_config

FAMILIES = ("llama", "qwen2")


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 512, shape, generator=torch.Generator().manual_seed(1))


def tiny_block(**fields: object) -> MixMoEBlock:
    config = tiny_mixmoe_config(**fields)
    config._experts_implementation = "eager"  # read by transformers 5.x only
    block = MixMoEBlock(config)
    randomize(block)
    return block


def block_token_by_token(block: MixMoEBlock, config: MixMoEConfig, hidden_states: torch.Tensor) -> torch.Tensor:
    """Equations 1-7 of the paper, one token and one expert at a time."""
    n = config.num_experts_per_group
    outputs = []
    for h in hidden_states.flatten(0, 1):
        groups = []
        for group in range(config.stage):
            rows = slice(group * n, (group + 1) * n)
            logits = block.router.weight[rows] @ h
            if config.router_bias:
                logits = logits + block.router.bias[rows]
            probs = torch.softmax(logits, dim=0)
            y = torch.zeros_like(h)
            for i in torch.argsort(probs, descending=True)[: config.topk_per_group].tolist():
                gate, up = (block.experts.gate_up_proj[group * n + i] @ h).split(config.moe_intermediate_size)
                expert_output = block.experts.down_proj[group * n + i] @ (functional.silu(gate) * up)
                y = y + (config.expert_scale * probs[i] if config.router_prob_scaling else 1.0) * expert_output
            groups.append(y)
        outputs.append(sum(groups) / (len(groups) if config.group_combine == "mean" else 1))
    return torch.stack(outputs).view_as(hidden_states)


@pytest.mark.parametrize(
    "fields",
    [
        {"stage": 1},
        {"stage": 2},
        {"stage": 2, "group_combine": "sum", "expert_scale": 1.0},
        {"stage": 1, "topk_per_group": 2},
        {"stage": 2, "topk_per_group": 3, "router_bias": False},
        {"stage": 2, "router_prob_scaling": False},
        {"stage": 2, "num_experts_per_group": 3, "moe_intermediate_size": 24},
    ],
    ids=str,
)
def test_block_is_the_equations(fields: dict) -> None:
    block = tiny_block(**fields)
    hidden_states = torch.randn(2, 5, 32)
    expected = block_token_by_token(block, tiny_mixmoe_config(**fields), hidden_states)
    torch.testing.assert_close(block(hidden_states), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "k"), [(4, 2), (8, 4)])
def test_saturated_routers_choose_by_their_logits(n: int, k: int) -> None:
    """All probabilities but one may underflow to 0, as with the unnormalised FFT of the paper at H 5120."""
    fields = {"stage": 2, "num_experts_per_group": n, "moe_intermediate_size": 8, "topk_per_group": k}
    block = tiny_block(**fields)
    hidden_states = 3000 * torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    logits, _, chosen = block.router(hidden_states)
    oracle = hidden_states.double() @ block.router.weight.double().T + block.router.bias.double()
    expected = oracle.view(500, 2, n).topk(k).indices + torch.tensor([[0], [n]])
    assert (logits.view(500, 2, n).softmax(-1) == 0).float().mean() > 0.1, "the case that is meant"
    assert torch.equal(chosen.view(500, 2, k), expected)
    routed = functional.one_hot(expected, 2 * n).sum((0, 1, 2)).view(2, n) / (500 * k)
    mean_prob = oracle.view(500, 2, n).softmax(-1).mean(0)
    torch.testing.assert_close(
        router_aux_loss((logits,), 2, k), n * (routed * mean_prob).sum(-1).float(), rtol=1e-4, atol=1e-5
    )


def test_gradients_reach_router_and_chosen_experts_only() -> None:
    block = tiny_block(stage=2)
    with torch.no_grad():
        block.router.bias.copy_(torch.tensor([50.0, 0, 0, 0, 0, 40.0, 40.0, 0]))  # LM: always 0; MT: 5 or 6
    block(torch.randn(2, 8, 32)).square().sum().backward()
    used = block.experts.down_proj.grad.flatten(1).norm(dim=1) > 0
    assert used.tolist() == [True, False, False, False, False, True, True, False]
    assert block.experts.gate_up_proj.grad.flatten(1).norm(dim=1).gt(0).equal(used)
    assert block.router.weight.grad[4:].norm() > 0


def upcycle_by_hand(dense: torch.nn.Module, model: MixMoEForCausalLM) -> None:
    """Fill `model` with `dense`, its FFNs sliced into experts, both groups alike."""
    source, n = dict(dense.named_parameters()), model.config.num_experts_per_group
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight") or name.endswith("router.bias"):
                parameter.zero_()
            elif name.endswith("experts.gate_up_proj"):
                base = name.removesuffix("experts.gate_up_proj")
                gate, up = (source[f"{base}{part}_proj.weight"].chunk(n) for part in ("gate", "up"))
                experts = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
                parameter.copy_(torch.stack(experts * model.config.stage))
            elif name.endswith("experts.down_proj"):
                down = source[name.replace("experts.down_proj", "down_proj.weight")].chunk(n, dim=1)
                parameter.copy_(torch.stack(down * model.config.stage))
            else:
                parameter.copy_(source[name])


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("family", "base_fields"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "head_dim": 16}),
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    ],
)
def test_slices_of_an_ffn_add_up_to_the_dense_model(family: str, base_fields: dict, stage: int) -> None:
    """With all experts chosen at uniform probability and s = n, y is the sum of the slices: the dense FFN."""
    dense = tiny_dense(family, **base_fields)
    config = MixMoEConfig.from_base_config(dense.config, moe_layers=[0, 3], stage=stage, topk_per_group=4)
    model = MixMoEForCausalLM(config).eval()
    upcycle_by_hand(dense, model)
    ids = token_ids(2, 12)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_stage_2_begins_exactly_where_stage_1_ended() -> None:
    stage_1, stage_2 = tiny_mixmoe(stage=1), tiny_mixmoe(stage=2)
    state = stage_1.state_dict()
    for name, value in state.items():
        if ".router." in name or ".experts." in name:
            state[name] = torch.cat([value, value])  # MT rows copy the LM rows
    stage_2.load_state_dict(state)
    ids = token_ids(2, 12)
    assert torch.equal(stage_1(ids).logits, stage_2(ids).logits)


def test_router_stays_in_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    tiny_mixmoe().to(torch.bfloat16).save_pretrained(tmp_path)
    model = MixMoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    dtypes = {name.rpartition(".mlp.")[2]: p.dtype for name, p in model.named_parameters() if "layers.1.mlp" in name}
    assert dtypes == {
        "router.weight": torch.float32,
        "router.bias": torch.float32,
        "experts.gate_up_proj": torch.bfloat16,
        "experts.down_proj": torch.bfloat16,
    }
    output = model(token_ids(2, 6), output_router_logits=True)
    assert output.logits.dtype == torch.bfloat16
    assert [layer.dtype for layer in output.router_logits] == [torch.float32] * 2


def test_recorded_outputs() -> None:
    model = tiny_mixmoe(output_router_logits=True)
    model.set_attn_implementation("eager")
    output = model(token_ids(2, 7), output_hidden_states=True, output_attentions=True)
    assert [layer.shape for layer in output.router_logits] == [(14, 8), (14, 8)]
    assert len(output.hidden_states) == 5
    assert [layer.shape for layer in output.attentions] == [(2, 4, 7, 7)] * 4
    first = model.model.layers[1].mlp.router(torch.zeros(1, 32))[0]
    assert torch.equal(first[0], model.model.layers[1].mlp.router.bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_equals_sdpa(family: str) -> None:
    model, ids = tiny_mixmoe(family), token_ids(2, 9)
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_parameter_names_and_shapes() -> None:
    """What the converter relies on: Llama's names, and these in a Mix-MoE layer."""
    model, dense = tiny_mixmoe("qwen2", stage=2), tiny_dense("qwen2")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    moe = {name.removeprefix("model.layers.3.mlp."): shape for name, shape in shapes.items() if "layers.3.mlp." in name}
    assert moe == {
        "router.weight": (8, 32),
        "router.bias": (8,),
        "experts.gate_up_proj": (8, 32, 32),
        "experts.down_proj": (8, 32, 16),
    }
    rest = {name: shape for name, shape in shapes.items() if ".router." not in name and ".experts." not in name}
    assert rest.items() <= {name: tuple(p.shape) for name, p in dense.named_parameters()}.items()
