"""The Hugging Face Mix-MoE model: its maths against the equations read token by token, saving, loading, training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mixmoe_megatron.hf import (
    MixMoEConfig,
    MixMoEForCausalLM,
    MixMoEModel,
    code_files,
    copy_code,
    register_auto_classes,
    router_aux_loss,
)
from mixmoe_megatron.hf.modeling_mixmoe import MixMoEBlock
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


def test_gradients_reach_router_and_chosen_experts_only() -> None:
    block = tiny_block(stage=2)
    with torch.no_grad():
        block.router.bias.copy_(torch.tensor([50.0, 0, 0, 0, 0, 40.0, 40.0, 0]))  # LM: always 0; MT: 5 or 6
    block(torch.randn(2, 8, 32)).square().sum().backward()
    used = block.experts.down_proj.grad.flatten(1).norm(dim=1) > 0
    assert used.tolist() == [True, False, False, False, False, True, True, False]
    assert block.experts.gate_up_proj.grad.flatten(1).norm(dim=1).gt(0).equal(used)
    assert block.router.weight.grad[4:].norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_gemm_equals_the_loop(dtype: torch.dtype) -> None:
    """The CUDA path, run on the CPU; experts 1 and 6 get no token."""
    experts = tiny_block(stage=2).experts.to(dtype)
    index = torch.tensor([0, 2, 3])[torch.randint(0, 3, (9,))].unsqueeze(1)
    index = torch.cat([index, torch.tensor([4, 5, 7])[torch.randint(0, 3, (9, 1))]], dim=1)
    results = []
    for forward in (experts.forward, experts._grouped_forward):
        hidden_states = torch.linspace(-1, 1, 9 * 32).view(9, 32).to(dtype).requires_grad_()
        top_k_weights = torch.linspace(0.1, 2, 18).view(9, 2).requires_grad_()
        experts.zero_grad()
        output = forward(hidden_states, index, top_k_weights)
        output.float().square().sum().backward()
        gradients = (experts.gate_up_proj.grad.clone(), experts.down_proj.grad.clone())
        results.append((output.detach(), hidden_states.grad, top_k_weights.grad, *gradients))
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    for looped, grouped in zip(*results, strict=True):
        assert looped.dtype == grouped.dtype
        torch.testing.assert_close(looped, grouped, rtol=tolerance, atol=tolerance * looped.abs().max().item())


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


@pytest.mark.parametrize("top_k", [1, 2])
def test_aux_loss_is_1_when_balanced_and_n_at_collapse(top_k: int) -> None:
    """Group 0 balanced: each expert is chosen equally often. Group 1: all tokens choose the same top_k experts."""
    balanced = torch.stack([torch.eye(4).roll(shift, dims=0) for shift in range(top_k)]).sum(dim=0) * 50
    collapsed = torch.zeros(4, 4)
    collapsed[:, :top_k] = 50
    layer = torch.cat([balanced, collapsed], dim=1)
    expected = torch.tensor([1.0, 4.0 / top_k])
    torch.testing.assert_close(router_aux_loss((layer, layer), num_groups=2, top_k=top_k), expected)


def test_aux_loss_leaves_padding_out() -> None:
    logits = (torch.randn(6, 8), torch.randn(6, 8))
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    kept = mask.flatten().bool()
    expected = router_aux_loss(tuple(layer[kept] for layer in logits), 2, 1)
    torch.testing.assert_close(router_aux_loss(logits, 2, 1, mask), expected)


def test_aux_loss_joins_the_training_loss_only() -> None:
    model = tiny_mixmoe(mixmoe_aux_loss_coef=0.5)
    ids, mask = token_ids(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    plain = model(ids, attention_mask=mask, labels=ids)
    assert plain.aux_loss is None
    assert plain.router_logits is None
    reported = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    assert torch.equal(reported.loss, plain.loss)
    assert torch.equal(reported.aux_loss, router_aux_loss(reported.router_logits, 2, 1, mask).sum())
    trained = model.train()(ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(trained.loss, plain.loss + 0.5 * reported.aux_loss)
    with pytest.raises(ValueError, match="attention_mask of shape"):
        model(ids, attention_mask=torch.zeros(2, 1, 8, 8), labels=ids)


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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family: str, tied: bool) -> None:
    model = tiny_mixmoe(family, mixmoe_aux_loss_coef=0.1, tie_word_embeddings=tied).train()
    ids = token_ids(2, 8)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(gradient.norm() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_reentrant_checkpointing_with_aux_loss_is_refused() -> None:
    model, ids = tiny_mixmoe(mixmoe_aux_loss_coef=0.1).train(), token_ids(2, 8)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(ids, labels=ids)


@pytest.mark.parametrize(("family", "stage", "tied"), [("llama", 1, True), ("llama", 2, False), ("qwen2", 2, True)])
def test_save_and_load(tmp_path: Path, family: str, stage: int, tied: bool) -> None:
    model = tiny_mixmoe(family, stage, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded, info = MixMoEForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(loaded_state[name], value) for name, value in state.items())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    torch.testing.assert_close(loaded.eval()(token_ids(2, 7)).logits, model(token_ids(2, 7)).logits)


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


LOAD_WITHOUT_THE_PACKAGE = """
import sys

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mixmoe_megatron":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoPackage())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

directory = sys.argv[1]
config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
base = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
ids = torch.load(f"{directory}/ids.pt")
logits = model(ids).logits
generated = model.generate(ids, max_new_tokens=4, do_sample=False, num_beams=2)
assert config.stage == 2 and type(base).__name__ == "MixMoEModel"
model.save_pretrained(f"{directory}/again")
torch.save([logits, base(ids).last_hidden_state, generated], f"{directory}/results.pt")
"""


def test_loads_where_the_package_is_absent(tmp_path: Path, repo_root: Path) -> None:
    model, ids = tiny_mixmoe(), token_ids(2, 9)
    model.save_pretrained(tmp_path)
    torch.save(ids, tmp_path / "ids.pt")
    search_path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry != str(repo_root)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search_path),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE, str(tmp_path)]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    logits, hidden_states, generated = torch.load(tmp_path / "results.pt")
    torch.testing.assert_close(logits, model(ids).logits)
    torch.testing.assert_close(hidden_states, model.model(ids).last_hidden_state)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=4, do_sample=False, num_beams=2))
    for directory in (tmp_path, tmp_path / "again"):  # also what the shipped code saves is complete
        auto_map = json.loads((directory / "config.json").read_text())["auto_map"]
        assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
        for source in code_files():
            assert (directory / source.name).read_text() == source.read_text()


def test_registered_auto_classes_need_no_trust(tmp_path: Path) -> None:
    register_auto_classes()
    register_auto_classes()
    tiny_mixmoe().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MixMoEConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), MixMoEModel)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), MixMoEForCausalLM)


def test_copy_code(tmp_path: Path) -> None:
    copy_code(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["configuration_mixmoe.py", "modeling_mixmoe.py"]


@pytest.mark.parametrize("tied", [False, True])
def test_resize_token_embeddings(tied: bool) -> None:
    model, ids = tiny_mixmoe(tie_word_embeddings=tied), token_ids(2, 5)
    before = model(ids).logits
    model.resize_token_embeddings(520, mean_resizing=False)
    after = model(ids, labels=ids)
    assert after.logits.shape[-1] == model.config.vocab_size == 520
    torch.testing.assert_close(after.logits[..., :512], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
