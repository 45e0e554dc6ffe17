"""The empty objects that Megatron looks for in a checkpoint beside the tensors of the mapping tables."""

from __future__ import annotations

import itertools
from typing import Literal

from mixmoe_megatron.model.mapping import Scope, Sizes

_M = "decoder.layers.{i}."

# Modules whose `_extra_state` (empty without fp8) Megatron asks for on loading: (module, scope). Both Megatron's own
# linear layers and Transformer Engine's are covered; a model ignores the entries of modules it lacks.
EXTRA_STATE_MODULES: tuple[tuple[str, Scope | Literal["expert", "shared"]], ...] = (
    (_M + "self_attention.linear_qkv", "layer"),
    (_M + "self_attention.linear_proj", "layer"),
    (_M + "self_attention.core_attention", "layer"),
    (_M + "mlp.linear_fc1", "dense"),
    (_M + "mlp.linear_fc2", "dense"),
    (_M + "pre_mlp_layernorm", "moe"),
    (_M + "mlp.experts.{block}.experts.linear_fc1", "expert"),
    (_M + "mlp.experts.{block}.experts.linear_fc2", "expert"),
    (_M + "mlp.shared_experts.linear_fc1", "shared"),
    (_M + "mlp.shared_experts.linear_fc2", "shared"),
    ("decoder.final_layernorm", "model"),
)


def extra_state_keys(sizes: Sizes) -> list[str]:
    """Return the keys under which a torch_dist checkpoint of this model stores its empty `_extra_state` objects.

    A key ends in the object's place among its like: `shard_2_4` is layer 2 of 4 stacked ones, or expert 2 of 4.
    """
    keys = []
    for module, scope in EXTRA_STATE_MODULES:
        if scope == "model":
            keys.append(f"{module}._extra_state/shard_0_1")
        elif scope == "expert":
            for i, (block, count) in itertools.product(sizes.moe_layers, sizes.blocks().items()):
                name = module.replace("{i}", str(i)).replace("{block}", block)
                keys += [f"{name}._extra_state/shard_{expert}_{count}" for expert in range(count)]
        elif scope == "shared":
            layers = sizes.moe_layers if sizes.shared_experts else ()
            keys += [f"{module.replace('{i}', str(i))}._extra_state/shard_0_1" for i in layers]
        elif not sizes.is_stacked:
            keys += [f"{module.replace('{i}', str(i))}._extra_state/shard_0_1" for i in sizes.layers(scope)]
        else:
            name, count = module.replace("{i}.", ""), sizes.num_layers
            keys += [f"{name}._extra_state/shard_{i}_{count}" for i in sizes.layers(scope)]
    return keys
