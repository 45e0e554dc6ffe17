"""torch.compile and torch.export of the Hugging Face Mix-MoE model: whole graphs, also where the routing varies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.export import Dim

from mixmoe_megatron.hf import MixMoEForCausalLM, modeling_mixmoe
from mixmoe_megatron.hf.modeling_mixmoe import MixMoEBlock
from tests.helpers import tiny_hf
from tests.helpers.tiny_hf import randomize, tiny_mixmoe_config

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5  # 4.57's attention masks fix a program's shapes


def tiny_mixmoe(family: str = "llama", stage: int = 2, **fields: Any) -> MixMoEForCausalLM:
    """Return a random model of two layers, the second with experts."""
    return tiny_hf.tiny_mixmoe(family, stage, num_hidden_layers=2, layer_types=None, moe_layers=[1], **fields)


def tiny_block() -> MixMoEBlock:
    block = MixMoEBlock(tiny_mixmoe_config(experts_implementation="eager"))
    randomize(block)
    return block


def token_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 512, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.1}


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("qwen2", torch.bfloat16)])
def test_one_graph_for_every_routing(family: str, dtype: torch.dtype) -> None:
    """No graph break, and no second compilation when other tokens go to other experts."""
    model = tiny_mixmoe(family, experts_implementation="eager").to(dtype)  # read by transformers 5.x only
    graphs: list[Any] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True)
    for seed in range(3):
        ids = token_ids(2, 9, seed=seed)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, **tolerance(dtype))
    assert len(graphs) == 1


def test_compiled_training_step_has_the_same_gradients() -> None:
    block = tiny_block()
    gradients = []
    for forward in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        block.zero_grad()
        forward(torch.linspace(-1, 1, 10 * 32).view(2, 5, 32)).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in block.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow  # a C++ compiler works for about a minute
def test_inductor() -> None:
    model, ids = tiny_mixmoe(), token_ids(2, 9)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_generation_with_a_compiled_forward() -> None:
    model = tiny_mixmoe()
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    ids = token_ids(2, 5)
    expected = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(model.generate(ids, **options), expected)


class LogitsOf(torch.nn.Module):
    """What is exported: token ids and mask in, logits out."""

    def __init__(self, model: MixMoEForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.parametrize(("family", "stage"), [("llama", 2), ("qwen2", 1)])
def test_export(family: str, stage: int) -> None:
    """The exported program takes other routings, and other shapes where a dense Llama's does."""
    model = tiny_mixmoe(family, stage)
    dynamic = {0: Dim("batch", max=8), 1: Dim("length", min=2, max=64)} if TRANSFORMERS_5 else {}
    with torch.no_grad():
        program = torch.export.export(
            LogitsOf(model), (token_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)), dynamic_shapes=(dynamic, dynamic)
        )
    for shape in ((2, 9), (3, 17) if TRANSFORMERS_5 else (2, 9)):
        ids, mask = token_ids(*shape, seed=5), torch.ones(shape, dtype=torch.int64)
        mask[0, :2] = 0
        torch.testing.assert_close(
            program.module()(ids, mask), model(ids, attention_mask=mask).logits, rtol=1e-4, atol=1e-4
        )


def test_export_of_a_block_takes_any_number_of_tokens() -> None:
    block = tiny_block()
    program = torch.export.export(block, (torch.randn(2, 5, 32),), dynamic_shapes=({1: Dim("length", min=1, max=64)},))
    for length in (1, 5, 33):
        hidden_states = torch.randn(2, length, 32)
        torch.testing.assert_close(program.module()(hidden_states), block(hidden_states), rtol=1e-4, atol=1e-4)


def test_the_grouped_gemm_is_one_node_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA path, captured on the CPU: two grouped GEMMs, and no graph break where the experts' shares vary."""
    block = tiny_block().to(torch.bfloat16)
    hidden_states = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    expected = block(hidden_states)
    monkeypatch.setattr(modeling_mixmoe, "_can_use_grouped_mm", lambda *tensors: True)
    program = torch.export.export(block, (hidden_states,))
    assert sum("grouped_mm" in str(node.target) for node in program.graph.nodes) == 2
    torch.testing.assert_close(program.module()(hidden_states), expected, rtol=0.05, atol=0.05)
