"""Table I, the report, fingerprints; and the frozen layers below the first MoE layer, run ahead without a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.base import part_of
from mixmoe_megatron.methods.registry import phase_of_stage
from mixmoe_megatron.model.freezing import freeze_for_phase, parameter_report
from mixmoe_megatron.model.frozen_prefix import set_frozen_prefix
from mixmoe_megatron.model.graph_start import GraphStart
from tests.helpers.megatron import (
    fingerprint,
    gradients,
    initialize_megatron,
    make_config,
    make_model,
    make_options,
    model_loss,
)

OPTIONS = make_options(moe_layer_placement="2,3", num_experts_per_group=4)
FULL = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective"}
RECOMPUTATION: dict[str, dict[str, Any]] = {
    "none": {},
    "uniform 1": {**FULL, "recompute_method": "uniform", "recompute_num_layers": 1},
    "uniform 2": {**FULL, "recompute_method": "uniform", "recompute_num_layers": 2},
    "uniform 4": {**FULL, "recompute_method": "uniform", "recompute_num_layers": 4},
    "block 1": {**FULL, "recompute_method": "block", "recompute_num_layers": 1},
    "block 3": {**FULL, "recompute_method": "block", "recompute_num_layers": 3},
    "core attention": {**SELECTIVE, "recompute_modules": ["core_attn"]},
    "moe": {**SELECTIVE, "recompute_modules": ["moe"]},
    "activation and dense": {**SELECTIVE, "recompute_modules": ["moe_act", "mlp"]},
}


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    initialize_megatron()


def model_of(stage: int, coeff: float = 0.1, **settings: Any) -> Any:
    return make_model(make_config(OPTIONS, stage, moe_aux_loss_coeff=coeff, **settings))


@pytest.mark.parametrize(("stage", "group"), [(1, "lm"), (2, "mt")])
def test_table_one(stage: int, group: str) -> None:
    model = freeze_for_phase(model_of(stage), phase_of_stage(stage))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {
        f"decoder.layers.{layer}.mlp.{name}"
        for layer in (2, 3)
        for name in (
            *(f"router.{group}.{kind}" for kind in ("weight", "spectral_weight", "bias")),
            *(f"experts.{group}_experts.linear_fc{i}.weight" for i in (1, 2)),
        )
    }
    assert trained == expected


def test_stage_0_trains_all_and_unfreezes() -> None:
    model = freeze_for_phase(freeze_for_phase(model_of(1), phase_of_stage(1)), phase_of_stage(0))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {layer.mode for layer in model.decoder.layers} == {"normal"} and not model.decoder._mixmoe_hooks


def test_mistakes() -> None:
    with pytest.raises(MixMoEError, match=r"nothing that the phase stage2 trains \(MT experts and MT routers\)"):
        freeze_for_phase(model_of(1), phase_of_stage(2))
    with pytest.raises(MixMoEError, match="stage must be 0"):
        phase_of_stage(3)


def test_parts_by_name() -> None:
    layer = "decoder.layers.0."
    assert part_of(layer + "self_attention.linear_qkv.layer_norm_weight") == "norms"
    assert part_of(layer + "mlp.experts.lm_experts.linear_fc1.weight3") == "LM experts", "Transformer Engine's name"
    assert part_of("embedding.word_embeddings.weight") == "embedding"
    assert part_of(layer + "mlp.linear_fc1.weight") == "dense FFNs"
    assert part_of("something.else") == "other"


def test_report_counts_everything_once() -> None:
    model = freeze_for_phase(model_of(2), phase_of_stage(2))
    report = parameter_report([model], phase_of_stage(2))
    assert report.count(True) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.count(True) + report.count(False) == sum(p.numel() for p in model.parameters())
    assert {part.name for part in report.parts if part.trained} == {"MT experts", "MT routers"}
    assert "MT experts    trained" in report.table() and "other" not in report.table()


def test_fingerprint_sees_a_single_bit() -> None:
    model = model_of(1).bfloat16()
    before = fingerprint([model])
    assert fingerprint([model]) == before
    with torch.no_grad():
        model.decoder.final_layernorm.weight[3] += 2**-7
    after = fingerprint([model])
    assert [name for name in before if before[name] != after[name]] == ["0/decoder.final_layernorm.weight"]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("recomputation", RECOMPUTATION)
def test_gradients_are_those_of_the_whole_graph(recomputation: str, stage: int) -> None:
    """Neither running ahead nor recomputation changes a trained gradient; frozen tensors get none."""
    whole = model_of(stage)
    expected = gradients(whole, lambda: model_loss(whole))
    model = freeze_for_phase(model_of(stage, **RECOMPUTATION[recomputation]), phase_of_stage(stage))
    actual = gradients(model, lambda: model_loss(model))
    assert set(actual) == {name for name in expected if phase_of_stage(stage).is_trained(name)}
    for name, gradient in actual.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("recomputation", RECOMPUTATION)
def test_frozen_layers_run_once(recomputation: str) -> None:
    model = freeze_for_phase(model_of(1, **RECOMPUTATION[recomputation]), phase_of_stage(1))
    runs = [0] * 4
    for index, layer in enumerate(model.decoder.layers):

        def count(module: Any, args: Any, index: int = index) -> None:
            runs[index] += 1

        layer.self_attention.register_forward_pre_hook(count)
    loss = model_loss(model)
    loss.backward()
    assert runs[:2] == [1, 1], "the frozen layers are not recomputed"
    with torch.no_grad():
        torch.testing.assert_close(model_loss(model), loss.detach())


def test_nothing_below_the_first_moe_layer_is_in_the_graph() -> None:
    model = freeze_for_phase(model_of(1), phase_of_stage(1))
    inputs: dict[int, bool] = {}
    for index, layer in enumerate(model.decoder.layers):

        def record(module: Any, args: Any, kwargs: Any, index: int = index) -> None:
            inputs[index] = (args[0] if args else kwargs["hidden_states"]).requires_grad

        layer.mlp.register_forward_pre_hook(record, with_kwargs=True)
    model_loss(model).backward()
    assert inputs == {0: False, 1: False, 2: False, 3: True}


def saved_bytes(model: Any) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model_loss(model)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_layers_below_the_first_moe_layer_keep_nothing(stage: int) -> None:
    """However many there are; a graph through them, which full recomputation or a pipeline asks for, keeps more."""

    def model_with_below(layers: int) -> Any:
        options = make_options(moe_layer_placement=str(layers))
        return freeze_for_phase(make_model(make_config(options, stage, num_layers=layers + 1)), phase_of_stage(stage))

    one, five = model_with_below(1), model_with_below(5)
    kept = saved_bytes(one)
    assert saved_bytes(five) == kept > 0
    set_frozen_prefix(five.decoder, None)
    five.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    assert saved_bytes(five) > 2 * kept


def test_the_lm_aux_loss_of_stage_2_trains_mt_experts_of_earlier_layers_only() -> None:
    model = freeze_for_phase(model_of(2, coeff=1.0), phase_of_stage(2))
    # Of the losses only the LM aux losses are left: no cross-entropy, and the MT routers' aux losses off.
    for layer in model.decoder.layers[2:]:
        router = layer.mlp.router
        slopes_of = router._aux_loss_slopes
        router._aux_loss_slopes = lambda *args, slopes_of=slopes_of: (
            slopes_of(*args)[0] * torch.tensor([[1.0], [0.0]]), slopes_of(*args)[1],
        )  # fmt: skip
    result = gradients(model, lambda: 0.0 * model_loss(model))
    first, second = ("decoder.layers.2.mlp.experts.mt_experts", "decoder.layers.3.mlp.experts.mt_experts")
    for name, gradient in result.items():
        if name.startswith(first):
            assert gradient.abs().max() > 0, name
        elif name.startswith(second):
            assert gradient.abs().max() == 0, name
    assert not any(".lm" in name for name in result)


@pytest.mark.parametrize("recomputation", ["none", "uniform 1", "uniform 4", "block 1"])
@pytest.mark.parametrize(("moe_layers", "first_trained_layer"), [("0,3", 0), ("2,3", 2), ("2,3", 9)])
def test_a_later_pipeline_stage_sends_zeros_back(recomputation: str, moe_layers: str, first_trained_layer: int) -> None:
    """The stage holds frozen layers below the first MoE layer: its input's gradient is zero, but it is there."""
    config = make_config(make_options(moe_layer_placement=moe_layers), 1, **RECOMPUTATION[recomputation])
    model = freeze_for_phase(make_model(config, pre_process=False, post_process=False), phase_of_stage(1))
    set_frozen_prefix(model.decoder, GraphStart(first_trained_layer))  # 9: on a stage after this one
    received = torch.randn(8, 2, 24, requires_grad=True)
    model.set_input_tensor(received)
    positions = torch.arange(8).expand(2, 8)
    output = model(None, positions, None)
    assert output.requires_grad and output._base is None, "the pipeline schedule frees the output's data"
    result = gradients(model, lambda: output.square().sum())
    assert torch.equal(received.grad, torch.zeros_like(received))
    assert any("layers.3" in name for name in result) == (first_trained_layer < 4)


def test_layers_above_the_first_moe_layer_pass_gradients_on() -> None:
    """A later pipeline stage without the first MoE layer is untouched: the stage before it trains too."""
    config = make_config(OPTIONS, 1, **RECOMPUTATION["uniform 1"])
    model = freeze_for_phase(make_model(config, pre_process=False, post_process=False), phase_of_stage(1))
    set_frozen_prefix(model.decoder, GraphStart(-1))
    received = torch.randn(8, 2, 24, requires_grad=True)
    model.set_input_tensor(received)
    model(None, torch.arange(8).expand(2, 8), None).square().sum().backward()
    assert received.grad.abs().max() > 0


def test_a_model_from_other_specs_is_refused() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    config = make_config(OPTIONS, 0)
    model = make_model(config, spec=get_gpt_layer_local_spec(normalization="RMSNorm"))
    with pytest.raises(MixMoEError, match=r"do not come from mixmoe_megatron.model.layer_specs"):
        freeze_for_phase(model, phase_of_stage(0))
