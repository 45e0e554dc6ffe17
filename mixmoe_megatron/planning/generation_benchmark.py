"""Tokens a second of greedy generation: exported Mix-MoE models of both stages beside their dense base, random weights.

The models take turns (`turns.py`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from mixmoe_megatron.hf import MixMoEConfig, MixMoEForCausalLM
from mixmoe_megatron.model.options import MixMoEOptions, resolve_moe_layers
from mixmoe_megatron.planning.turns import fastest_turns


def build_models(hf_dir: str | Path, dtype: torch.dtype) -> dict[str, Any]:
    """Return the dense base, and Mix-MoE models of it in stages 1 and 2 with the recommended options, by name.

    Args:
        hf_dir: holds config.json of the dense base.
        dtype: of the weights; routers are float32.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    base, options = AutoConfig.from_pretrained(hf_dir), MixMoEOptions()
    same = ("num_experts_per_group", "topk_per_group", "group_combine", "router_prob_scaling", "router_bias")
    models = {"dense": AutoModelForCausalLM.from_config(base, dtype=dtype)}
    for stage in (1, 2):
        config = MixMoEConfig.from_base_config(
            base.to_dict(),
            moe_layers=resolve_moe_layers(options, base.num_hidden_layers),
            stage=stage,
            expert_scale=options.resolved_expert_scale,
            **{name: getattr(options, name) for name in same},
        )
        models[f"stage {stage}"] = MixMoEForCausalLM._from_config(config, dtype=dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: model.to(device).eval() for name, model in models.items()}


def measure_generation(
    models: dict[str, Any], batch_size: int, prompt_length: int, new_tokens: int, turns: int
) -> dict[str, float]:
    """Return the new tokens a second of each model.

    Args:
        models: as `build_models` returns them.
        batch_size: sequences at a time.
        prompt_length: tokens of each prompt.
        new_tokens: generated for each.
        turns: measured turns, after one that does not count.
    """
    device = next(iter(models.values())).device
    generator = torch.Generator().manual_seed(0)
    vocab_size = min(model.config.vocab_size for model in models.values())
    prompt = torch.randint(vocab_size, (batch_size, prompt_length), generator=generator).to(device)
    mask = torch.ones_like(prompt)
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    calls = {name: partial(model.generate, prompt, attention_mask=mask, **settings) for name, model in models.items()}
    seconds = fastest_turns(calls, turns, warmup=1)
    return {name: batch_size * new_tokens / fastest for name, fastest in seconds.items()}
