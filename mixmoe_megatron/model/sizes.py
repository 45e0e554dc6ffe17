"""One description of a model, read once and handed on; from it follow the sizes that the mapping tables need."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mixmoe_megatron.model.mapping import Sizes
from mixmoe_megatron.model.options import MixMoEOptions, mixmoe_megatron_args, resolve_moe_layers
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


@dataclass(frozen=True)
class ModelDescription:
    """What a model is: read once, from config.json or from a checkpoint's metadata, and handed on.

    Attributes:
        hf_config: config.json of the dense base.
        megatron_args: of the dense architecture, by their names in Megatron's args namespace.
        options: the Mix-MoE options; None for a dense model.
        stage: one of `metadata.STAGES`.
        embedding_rows: of a checkpoint, padding included; None: as Megatron pads without tensor parallelism.
    """

    hf_config: dict[str, Any]
    megatron_args: dict[str, Any]
    options: MixMoEOptions | None
    stage: str
    embedding_rows: int | None = None

    @property
    def stage_number(self) -> int:
        """0 (dense), 1 or 2, the number of expert groups."""
        return STAGE_NUMBERS[self.stage]

    @cached_property
    def sizes(self) -> Sizes:
        """The sizes of the model.

        Raises:
            MixMoEError: the options do not fit the architecture.
        """
        return model_sizes(self.megatron_args, self.options, self.stage, self.embedding_rows)

    def checkpoint_args(self) -> dict[str, Any]:
        """Return the arguments that Megatron keeps in a checkpoint of this model.

        Raises:
            MixMoEError: the options do not fit the architecture.
        """
        args = dict(self.megatron_args)
        if self.options is not None:
            width = args["ffn_hidden_size"]
            args |= mixmoe_megatron_args(self.options, self.stage_number, args["num_layers"], width)
        return {**args, "padded_vocab_size": self.sizes.padded_vocab_size}
