"""Options, presets, layer placements, derived Megatron arguments, and one clear sentence for each mistake."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from checkpoints_conversion.hf_to_mixmoe import build_parser
from mixmoe_megatron.conversion.import_arguments import options_from_arguments
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.mixmoe import MIXMOE
from mixmoe_megatron.model.config import MixMoETransformerConfig, options_and_stage
from mixmoe_megatron.model.moe_layer import MixMoELayer
from mixmoe_megatron.model.options import MixMoEOptions, mixmoe_megatron_args, resolve_moe_layers
from tests.helpers.megatron import make_config, make_options


def test_presets() -> None:
    recommended, paper = MixMoEOptions.from_preset("recommended"), MixMoEOptions.from_preset("paper")
    assert recommended == MixMoEOptions()
    assert (recommended.group_combine, recommended.spectral_norm, recommended.resolved_expert_scale) == (
        "mean", "ortho", 4.0,
    )  # fmt: skip
    assert (paper.group_combine, paper.spectral_norm, paper.resolved_expert_scale) == ("sum", "backward", 1.0)
    assert MixMoEOptions.from_preset("paper", expert_scale=2.0).resolved_expert_scale == 2.0


def test_dictionary_round_trip() -> None:
    options = MixMoEOptions.from_preset("paper", topk_per_group=2, moe_layer_placement="3,7")
    assert MixMoEOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"preset": "best"}, "preset must be one of recommended, paper"),
        ({"spectral_transform": "wavelet"}, "spectral_transform must be one of fft, dct, random, none"),
        ({"spectral_norm": "forward"}, "spectral_norm must be one of"),
        ({"group_combine": "max"}, "group_combine must be one of mean, sum"),
        ({"lb_reduction": "max"}, "lb_reduction must be one of"),
        ({"num_experts_per_group": 0}, "num_experts_per_group must be a positive integer"),
        ({"num_experts_per_group": 4.0}, "num_experts_per_group must be a positive integer"),
        ({"topk_per_group": 5}, "topk_per_group=5 exceeds num_experts_per_group=4"),
        ({"expert_scale": 0.0}, "expert_scale must be positive"),
        ({"expert_scale": float("inf")}, "expert_scale must be positive and finite"),
        ({"expert_scale": "wide"}, "expert_scale must be a number, got 'wide'"),
        ({"spectral_scale": float("nan")}, "spectral_scale must be finite"),
        ({"spectral_scale": "x"}, "spectral_scale must be a number, got 'x'"),
        ({"spectral_seed": 1.5}, "spectral_seed must be an integer, got 1.5"),
        ({"router_bias": "maybe"}, "router_bias must be true or false, got 'maybe'"),
        ({"router_prob_scaling": 0}, "router_prob_scaling must be true or false, got 0"),
        ({"topk_per_group": True}, "topk_per_group must be a positive integer, got True"),
        ({"moe_layer_placement": 3}, "moe_layer_placement must be text, got 3"),
        ({"moe_layer_placement": "middle"}, "moe_layer_placement must be one of last, uniform-first"),
        ({"moe_layer_placement": "3,3"}, "distinct layer indices"),
        ({"moe_layer_placement": "-1"}, "distinct layer indices"),
        ({"shared_experts": -1}, "shared_experts must not be negative, got -1"),
        ({"shared_experts": True}, "shared_experts must be an integer, got True"),
        ({"shared_experts": 1, "expert_init": "copy"}, "shared_experts needs expert_init=slice"),
        ({"typo": 1}, "unknown Mix-MoE option 'typo'"),
    ],
)
def test_bad_options(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MixMoEError, match=sentence):
        MixMoEOptions.from_dict(values)


def test_help_tells_meaning_values_and_default_of_each_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    lines = [line.strip() for line in build_parser().format_help().splitlines()]
    paper = MixMoEOptions.from_preset("paper")
    for field in dataclasses.fields(MixMoEOptions)[1:]:
        flag = "--" + field.name.replace("_", "-")
        (at,) = [at for at, line in enumerate(lines) if line.startswith(f"{flag} ")]
        value, meaning = " ".join(lines[at : at + 2]).removeprefix(flag).split(maxsplit=1)
        assert value in ("N", "X") or set(value[1:-1].split(",")) >= set(field.metadata["choices"])
        default = "left out" if field.default is None else str(field.default).lower()
        assert meaning.startswith(field.metadata["meaning"]) and f"(default: {default}" in meaning
        if (in_paper := getattr(paper, field.name)) != field.default:
            assert f"preset paper: {in_paper})" in meaning


def test_flags_are_read_as_their_options_are() -> None:
    words = "--hf-dir x --output-dir y --moe-layer-placement 3 --router-bias false --expert-scale 2 --topk-per-group 2"
    options = options_from_arguments(build_parser().parse_args(words.split()), MIXMOE, is_mixmoe=False)
    assert options == MixMoEOptions(moe_layer_placement="3", router_bias=False, expert_scale=2, topk_per_group=2)


def test_unknown_preset() -> None:
    with pytest.raises(MixMoEError, match="preset must be one of"):
        MixMoEOptions.from_preset("best")


@pytest.mark.parametrize(
    ("placement", "layers"),
    [
        ("last", [3, 7, 11, 15]),
        ("uniform-first", [0, 4, 8, 12]),
        ("bottom", [0, 1, 2, 3]),
        ("top", [12, 13, 14, 15]),
        ("dense_bottom", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("inner", [3, 7, 11]),
        ("7, 3", [3, 7]),
    ],
)
def test_placements_of_table_vi(placement: str, layers: list[int]) -> None:
    assert resolve_moe_layers(MixMoEOptions(moe_layer_placement=placement), 16) == layers


def test_placement_of_a_layer_count_that_is_no_multiple() -> None:
    assert resolve_moe_layers(MixMoEOptions(), 30) == [3, 7, 11, 15, 19, 23, 27]


def test_placements_without_a_layer() -> None:
    with pytest.raises(MixMoEError, match="no MoE layer in a model of 3 layers"):
        resolve_moe_layers(MixMoEOptions(), 3)
    with pytest.raises(MixMoEError, match="inner gives no MoE layer in a model of 2 layers"):
        resolve_moe_layers(MixMoEOptions(moe_layer_placement="inner", moe_every=1), 2)
    with pytest.raises(MixMoEError, match=r"names layer 16, the model has layers 0..15"):
        resolve_moe_layers(MixMoEOptions(moe_layer_placement="16"), 16)


def test_megatron_args() -> None:
    args = mixmoe_megatron_args(MixMoEOptions(topk_per_group=2), 2, 8, 64)
    assert (args["num_experts"], args["moe_router_topk"], args["moe_ffn_hidden_size"]) == (8, 4, 16)
    assert args["moe_layer_freq"] == [0, 0, 0, 1, 0, 0, 0, 1]
    assert mixmoe_megatron_args(MixMoEOptions(), 1, 8, 64)["num_experts"] == 4
    assert mixmoe_megatron_args(MixMoEOptions(expert_init="copy"), 1, 8, 64)["moe_ffn_hidden_size"] == 64
    assert mixmoe_megatron_args(MixMoEOptions(), 0, 8, 64)["num_experts"] is None
    shared = mixmoe_megatron_args(MixMoEOptions(num_experts_per_group=6, shared_experts=2), 1, 8, 64)
    assert (shared["moe_ffn_hidden_size"], shared["moe_shared_expert_intermediate_size"]) == (8, 16)


def test_megatron_args_mistakes() -> None:
    with pytest.raises(MixMoEError, match="ffn_hidden_size=66 is not divisible by num_experts_per_group=4"):
        mixmoe_megatron_args(MixMoEOptions(), 1, 8, 66)
    with pytest.raises(
        MixMoEError, match="by num_experts_per_group=4 plus shared_experts=1: choose numbers whose sum divides it"
    ):
        mixmoe_megatron_args(MixMoEOptions(shared_experts=1), 1, 8, 64)
    with pytest.raises(MixMoEError, match="shared_experts goes with one group of experts"):
        mixmoe_megatron_args(MixMoEOptions(shared_experts=4), 2, 8, 64)
    with pytest.raises(MixMoEError, match="mixmoe_stage must be 0"):
        mixmoe_megatron_args(MixMoEOptions(), 3, 8, 64)


def test_transformer_config_carries_the_options() -> None:
    options = make_options(preset="paper", moe_every=2, spectral_transform="dct")
    config = make_config(options, 2)
    assert config.options() == options
    assert (config.num_moe_experts, config.moe_router_topk, config.moe_layer_freq) == (8, 2, [0, 1, 0, 1])


def test_a_dense_config() -> None:
    config = make_config(make_options(moe_every=2), 0)
    assert config.num_moe_experts is None
    with pytest.raises(MixMoEError, match="mixmoe_stage=0 is the dense model"):
        make_config(make_options(moe_every=2), 0, num_moe_experts=4)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"moe_router_fusion": True}, "the fused router knows no expert groups"),
        ({"moe_router_num_groups": 2}, "moe_router_num_groups=2 does not go with Mix-MoE"),
        ({"moe_router_enable_expert_bias": True}, "balance is kept by the aux loss"),
        ({"moe_expert_capacity_factor": 1.5}, "Mix-MoE drops no token"),
        ({"moe_z_loss_coeff": 0.1}, "the paper has no z-loss"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "one aux loss per group"),
        ({"moe_shared_expert_intermediate_size": 8}, "=8 contradicts the Mix-MoE options, which give None"),
        ({"moe_shared_expert_gate": True}, "a shared expert has the weight 1"),
        ({"moe_router_pre_softmax": False}, "--moe-router-pre-softmax"),
        ({"add_bias_linear": True}, "--disable-bias-linear"),
        ({"gated_linear_unit": False}, "--swiglu"),
        ({"experts_backend": "cutlass"}, "experts_backend must be one of auto, torch, te, sequential"),
        ({"expert_model_parallel_size": 3}, "num_experts_per_group=4 is not divisible by expert_model_parallel_size=3"),
        ({"expert_tensor_parallel_size": 5}, "moe_ffn_hidden_size=12 is not divisible by expert_tensor_parallel_size"),
        ({"num_moe_experts": 6}, "num_moe_experts=6 contradicts the Mix-MoE options, which give 8"),
        ({"moe_router_topk": 1}, "moe_router_topk=1 contradicts"),
        ({"moe_layer_freq": [1, 0, 0, 1]}, "moe_layer_freq=.* contradicts"),
        ({"moe_aux_loss_coeff": [0.1, 0.1]}, "moe_aux_loss_coeff must be one number"),
        ({"mixmoe_stage": 7}, "mixmoe_stage must be 0"),
    ],
)
def test_settings_that_do_not_go_with_mixmoe(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MixMoEError, match=sentence) as error:
        make_config(make_options(moe_every=2), 2, **settings)
    assert str(error.value).count(". ") == 0, "one sentence"


def test_a_shared_expert_is_split_evenly() -> None:
    options = make_options(num_experts_per_group=3, shared_experts=1)
    with pytest.raises(MixMoEError, match="width 3 is not divisible by tensor_model_parallel_size=2"):
        make_config(options, 1, ffn_hidden_size=12, tensor_model_parallel_size=2, sequence_parallel=True)


def test_config_from_an_args_namespace() -> None:
    """`core_transformer_config_from_args` copies the fields that the namespace has."""
    options = make_options(moe_every=2, topk_per_group=2)
    args = SimpleNamespace(**make_config(options, 1).to_dict())
    fields = {name: getattr(args, name) for name in MixMoETransformerConfig.__dataclass_fields__ if hasattr(args, name)}
    rebuilt = MixMoETransformerConfig(**fields)
    assert (rebuilt.options(), rebuilt.mixmoe_stage) == (options, 1)


def test_modules_refuse_a_plain_config() -> None:
    config = TransformerConfig(num_layers=2, hidden_size=24, num_attention_heads=4, use_cpu_initialization=True)
    with pytest.raises(MixMoEError, match="build a MixMoETransformerConfig"):
        MixMoELayer(config)
    assert options_and_stage(make_config(make_options(), 2)) == (make_options(), 2)
