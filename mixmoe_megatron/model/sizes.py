"""From Megatron arguments and Mix-MoE options to the sizes that the mapping tables need."""

from __future__ import annotations

from typing import Any

from mixmoe_megatron.model.mapping import Sizes
from mixmoe_megatron.model.options import MixMoEOptions, resolve_moe_layers
from mixmoe_megatron.model.upcycling import expert_ffn_hidden_size

STAGE_NUMBERS = {"dense": 0, "upcycled": 1, "stage1": 1, "stage2": 2}


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """Return the vocabulary rounded up to a multiple."""
    return -(-vocab_size // multiple) * multiple


def model_sizes(
    megatron_args: dict[str, Any], options: MixMoEOptions | None, stage: str, padded_vocab: int | None = None
) -> Sizes:
    """Return the sizes of a model.

    Args:
        megatron_args: of the dense architecture (hf_config.megatron_args_from_hf).
        options: None for a dense model.
        stage: one of `metadata.STAGES`.
        padded_vocab: rows of the embedding in a checkpoint; default: as Megatron pads without tensor parallelism.

    Raises:
        MixMoEError: the options do not fit the architecture.
    """
    args = megatron_args
    moe: dict[str, Any] = {}
    if options is not None:
        moe = {
            "moe_layers": tuple(resolve_moe_layers(options, args["num_layers"])),
            "num_groups": STAGE_NUMBERS[stage],
            "num_experts_per_group": options.num_experts_per_group,
            "moe_ffn_hidden_size": expert_ffn_hidden_size(
                args["ffn_hidden_size"], options.num_experts_per_group, options.expert_init
            ),
            "router_bias": options.router_bias,
            "spectral": options.spectral_transform != "none",
            "expert_init": options.expert_init,
            "init_std": args["init_method_std"],
        }
    return Sizes(
        num_layers=args["num_layers"],
        hidden_size=args["hidden_size"],
        ffn_hidden_size=args["ffn_hidden_size"],
        num_attention_heads=args["num_attention_heads"],
        num_query_groups=args["num_query_groups"],
        kv_channels=args["kv_channels"],
        vocab_size=args["vocab_size"],
        padded_vocab_size=padded_vocab or padded_vocab_size(args["vocab_size"], args["make_vocab_size_divisible_by"]),
        tied=not args["untie_embeddings_and_output_weights"],
        qkv_bias=args["add_qkv_bias"],
        **moe,
    )
