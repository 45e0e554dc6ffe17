"""The MoE layer in Megatron's frame: construction, one dispatch, upcycled start, recomputation, specs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe import token_dispatcher

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model.attention import TorchCoreAttention, TorchRMSNorm
from mixmoe_megatron.model.layer_specs import mixmoe_decoder_block_spec
from mixmoe_megatron.model.moe_layer import MixMoELayer
from tests.helpers.megatron import (
    gradients,
    initialize_megatron,
    make_config,
    make_layer,
    make_model,
    make_options,
    model_loss,
    process_groups,
)


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    initialize_megatron()


def test_megatrons_calling_conventions() -> None:
    config = make_config(make_options(moe_every=2), 2)
    MixMoELayer(config)
    layer = MixMoELayer(config, pg_collection=process_groups(), is_mtp_layer=False, name="decoder.layers.1.mlp")
    layer.set_layer_number(2)
    assert layer.router.layer_number == 2
    output, bias = layer(torch.randn(3, 2, 24), padding_mask=torch.zeros(2, 3, dtype=torch.bool))
    assert output.shape == (3, 2, 24) and bias is None
    layer.backward_dw()


def test_expert_parallel_size_must_divide_a_group() -> None:
    with pytest.raises(MixMoEError, match="num_experts_per_group=4 is not divisible by expert_model_parallel_size=8"):
        make_config(make_options(moe_every=2), 2, expert_model_parallel_size=8)


def test_one_dispatch_serves_both_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(make_config(make_options(moe_every=2), 2))
    calls = []
    dispatch = layer.token_dispatcher.token_dispatch
    monkeypatch.setattr(
        layer.token_dispatcher, "token_dispatch", lambda *args: (calls.append(len(args[0])), dispatch(*args))[1]
    )
    layer(torch.randn(5, 2, 24))
    assert calls == [2 * 10], "each token goes to one LM and one MT expert"


@pytest.mark.parametrize("stage", [1, 2])
def test_one_rank_sorts_its_tokens_once(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    """Megatron's second permutation would copy all of them again, and again for each gradient."""
    layer = make_layer(make_config(make_options(moe_every=2), stage))
    monkeypatch.setattr(token_dispatcher, "sort_chunks_by_idxs", lambda *_, **__: pytest.fail("permuted again"))
    layer(torch.randn(5, 2, 24))[0].sum().backward()


def test_stage_2_starts_where_stage_1_ended() -> None:
    """With MT a copy of LM, router too, the mean of the groups is the LM group's output."""
    one = make_layer(make_config(make_options(moe_every=2), 1))
    two = make_layer(make_config(make_options(moe_every=2), 2))
    two.load_state_dict(one.state_dict(), strict=False)
    two.initialize_mt_from_lm()
    hidden = torch.randn(6, 3, 24)
    torch.testing.assert_close(two(hidden)[0], one(hidden)[0], rtol=1e-6, atol=1e-7)


def test_state_dict_names() -> None:
    names = set(make_layer(make_config(make_options(moe_every=2), 2)).state_dict())
    router = {f"router.{group}.{name}" for group in ("lm", "mt") for name in ("weight", "spectral_weight", "bias")}
    experts = {f"experts.{group}_experts.linear_fc{i}.weight" for group in ("lm", "mt") for i in (1, 2)}
    assert names == router | experts


@pytest.mark.parametrize("modules", [["moe"], ["moe_act"], ["moe", "core_attn"]])
def test_selective_recomputation_changes_nothing(modules: list[str]) -> None:
    hidden = torch.randn(5, 2, 24, requires_grad=True)
    results = []
    for settings in ({}, {"recompute_granularity": "selective", "recompute_modules": modules}):
        layer = make_layer(make_config(make_options(moe_every=2), 2, moe_aux_loss_coeff=0.1, **settings))
        results.append(gradients(layer, lambda layer=layer: layer(hidden)[0].square().sum()))
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name])


def test_block_spec_leaves_megatrons_specs_alone() -> None:
    config = make_config(make_options(moe_every=2), 2)
    before = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    block = mixmoe_decoder_block_spec(SimpleNamespace(transformer=config), vp_stage=None)
    after = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    for one, other in zip(before.layer_specs, after.layer_specs, strict=True):
        assert one.module is other.module
        assert one.submodules.self_attention.submodules == other.submodules.self_attention.submodules
        assert one.submodules.input_layernorm is other.submodules.input_layernorm is not TorchRMSNorm
    submodules = block.layer_specs[1].submodules
    assert submodules.self_attention.submodules.core_attention is TorchCoreAttention
    assert submodules.mlp is MixMoELayer and issubclass(block.layer_norm, TorchRMSNorm)
    assert block.layer_specs[0].submodules.mlp.func is not MixMoELayer


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_model_of_each_stage_trains(stage: int) -> None:
    model = make_model(make_config(make_options(moe_every=2), stage, sequence_parallel=False))
    moe_layers = [i for i, layer in enumerate(model.decoder.layers) if isinstance(layer.mlp, MixMoELayer)]
    assert moe_layers == ([1, 3] if stage else [])
    result = gradients(model, lambda: model_loss(model))
    assert set(result) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("query_groups", [1, 2, 4])
def test_attention_equals_megatrons(query_groups: int) -> None:
    losses = []
    for core in (None, "megatron"):
        config = make_config(make_options(moe_every=2), 1, num_query_groups=query_groups)
        spec = mixmoe_decoder_block_spec(config)
        if core:
            from megatron.core.transformer.dot_product_attention import DotProductAttention

            for layer in spec.layer_specs:
                layer.submodules.self_attention.submodules.core_attention = DotProductAttention
        model = make_model(config, spec=spec)
        tokens = torch.arange(8).view(1, 8)
        mask = torch.triu(torch.ones(8, 8, dtype=torch.bool), 1)[None, None]
        losses.append(model(tokens, tokens, mask, labels=tokens))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_norm_marks_its_weight_for_sequence_parallelism() -> None:
    config = make_config(make_options(moe_every=2), 1, tensor_model_parallel_size=2, sequence_parallel=True)
    assert TorchRMSNorm(config=config, hidden_size=24, eps=1e-5).weight.sequence_parallel
    config.normalization = "LayerNorm"
    with pytest.raises(MixMoEError, match="RMSNorm"):
        TorchRMSNorm(config=config, hidden_size=24)


def test_norms_store_what_transformer_engine_looks_for() -> None:
    """An `_extra_state` where it keeps the norm as a module, none where it fuses the norm into the next layer."""
    model = make_model(make_config(make_options(moe_every=2), 1))
    keys = {entry.key for entry in model.sharded_state_dict().values()}
    norms = {key for key in keys if key.endswith("norm._extra_state")}
    assert norms == {f"decoder.{name}._extra_state" for name in (
        "final_layernorm", "layers.1.pre_mlp_layernorm", "layers.3.pre_mlp_layernorm"
    )}  # fmt: skip
    model.load_state_dict(model.state_dict())
