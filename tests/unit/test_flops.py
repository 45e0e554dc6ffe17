"""The counted operations equal what torch's counter sees in a real forward and backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mixmoe_megatron.methods.registry import phase_of_stage
from mixmoe_megatron.model.flops import StepFlops, step_flops
from mixmoe_megatron.model.freezing import freeze_for_phase
from mixmoe_megatron.model.loss_rows import losses_of_rows
from mixmoe_megatron.model.mapping import Sizes
from mixmoe_megatron.model.sizes import model_sizes
from tests.helpers.megatron import VOCAB_SIZE, initialize_megatron, make_config, make_model, make_options, model_loss

BATCH, LENGTH = 3, 8
STAGES = (0, 1, 2)
#: A Llama-3.2-1B.
LLAMA_1B: dict[str, Any] = {
    "num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32, "num_query_groups": 8,
    "kv_channels": 64, "vocab_size": 128256, "make_vocab_size_divisible_by": 128, "init_method_std": 0.02,
    "untie_embeddings_and_output_weights": False, "add_qkv_bias": False,
}  # fmt: skip


def sizes_of(config: Any, stage: int, options: Any) -> Sizes:
    names = vars(config) | {"vocab_size": VOCAB_SIZE, "make_vocab_size_divisible_by": 1, "add_qkv_bias": False}
    names["untie_embeddings_and_output_weights"] = False
    return model_sizes(names, options, stage)


def unmasked_half(sizes: Sizes, tokens: int, length: int) -> StepFlops:
    """What the counter sees beyond ours: torch's plain attention multiplies the masked half too."""
    pairs = tokens * length - tokens * (length + 1) / 2
    layer = 4 * pairs * sizes.num_attention_heads * sizes.kv_channels
    first = sizes.moe_layers[0] if sizes.moe_layers else -1
    return StepFlops(sizes.num_layers * layer, 2 * (sizes.num_layers - 1 - first) * layer, 0)


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        (0, {}),
        (1, {"moe_every": 2}),
        (2, {"moe_every": 2}),
        (2, {"moe_layer_placement": "0,1,3", "topk_per_group": 2}),
        (2, {"moe_layer_placement": "3", "expert_init": "copy"}),
        (1, {"moe_every": 2, "shared_experts": 2}),
    ],
)
def test_counts_equal_torchs_counter_in_the_real_model(stage: int, overrides: dict[str, Any]) -> None:
    initialize_megatron()
    options = make_options(**overrides)
    config = make_config(options, stage, experts_backend="sequential", moe_aux_loss_coeff=0.01)
    model = freeze_for_phase(make_model(config), phase_of_stage(stage))
    sizes = sizes_of(config, stage, options)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model_loss(model, BATCH, LENGTH)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    ours = step_flops(sizes, phase_of_stage(stage), options.topk_per_group, BATCH * LENGTH, LENGTH)
    extra = unmasked_half(sizes, BATCH * LENGTH, LENGTH)
    assert forward.get_total_flops() == ours.forward + extra.forward
    assert backward.get_total_flops() == ours.backward_inputs + ours.backward_weights + extra.backward_inputs


def test_rows_without_loss_have_no_logits() -> None:
    initialize_megatron()
    options = make_options(moe_every=2)
    model = freeze_for_phase(make_model(make_config(options, 2, experts_backend="sequential")), phase_of_stage(2))
    rows = torch.tensor([3, 4, 11, 20, 21, 22])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model_loss(model, BATCH, LENGTH, output_processor=losses_of_rows, output_processor_context=rows).backward()
    sizes, tokens = sizes_of(model.config, 2, options), BATCH * LENGTH
    ours = step_flops(sizes, phase_of_stage(2), options.topk_per_group, tokens, LENGTH, loss_share=len(rows) / tokens)
    assert counter.get_total_flops() == ours.total + unmasked_half(sizes, tokens, LENGTH).total


def test_a_full_step_of_a_known_model_is_six_operations_a_parameter_and_attention() -> None:
    """The usual rule: 6 N a token for N parameters in matrices, and 6 L Q (S + 1) for causal attention."""
    parameters = 16 * (2048 * (2048 + 1024) + 2048 * 2048 + 3 * 2048 * 8192) + 2048 * 128256
    flops = step_flops(model_sizes(LLAMA_1B, None, 0), phase_of_stage(0), 1, 1000, 4096)
    assert flops.total == 1000 * (6 * parameters + 6 * 16 * 2048 * 4097)
    assert flops.forward == flops.total / 3


def test_stages_cost_less_than_full_fine_tuning_and_lengths_average() -> None:
    options = make_options()
    dense, stage1, stage2 = (
        step_flops(model_sizes(LLAMA_1B, options, stage), phase_of_stage(stage), 1, 1.0, 4096.0) for stage in STAGES
    )
    assert stage1.total < stage2.total < 0.75 * dense.total
    assert stage1.forward < stage2.forward < dense.forward
    sizes = model_sizes(LLAMA_1B, options, 2)
    lengths = [5, 7, 30]
    mean = sum(length**2 for length in lengths) / sum(lengths)
    apart = sum(step_flops(sizes, phase_of_stage(sizes.num_groups), 1, length, length).total for length in lengths)
    assert step_flops(sizes, phase_of_stage(sizes.num_groups), 1, sum(lengths), mean).total == pytest.approx(
        apart, rel=1e-12
    )
