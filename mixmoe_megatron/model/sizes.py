"""One description of a model, read once and handed on; from it follow the sizes that the mapping tables need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from mixmoe_megatron.methods.base import Phase
from mixmoe_megatron.methods.lora import LoRAOptions
from mixmoe_megatron.model.graph_start import GraphStart, graph_start
from mixmoe_megatron.model.mapping import Sizes
from mixmoe_megatron.model.options import MixMoEOptions, mixmoe_megatron_args, resolve_moe_layers, router_weight_std
from mixmoe_megatron.model.upcycling import expert_ffn_hidden_size


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """Return the vocabulary rounded up to a multiple."""
    return -(-vocab_size // multiple) * multiple


def model_sizes(
    megatron_args: dict[str, Any],
    options: MixMoEOptions | None,
    stage: int,
    padded_vocab: int | None = None,
    new_layers: Sequence[int] = (),
    lora_rank: int = 0,
) -> Sizes:
    """Return the sizes of a model.

    Args:
        megatron_args: of the dense architecture (hf_config.megatron_args_from_hf).
        options: the Mix-MoE options; not used in stage 0.
        stage: 0 (dense), 1 or 2, see `methods.Phase.stage`.
        padded_vocab: rows of the embedding in a checkpoint; default: as Megatron pads without tensor parallelism.
        new_layers: 0-based numbers of the layers that the base has not.
        lora_rank: r of the low-rank matrices; 0: there are none.

    Raises:
        MixMoEError: the options do not fit the architecture.
    """
    args = megatron_args
    moe: dict[str, Any] = {}
    if stage:
        assert options is not None, "experts have options"
        moe = {
            "moe_layers": tuple(resolve_moe_layers(options, args["num_layers"])),
            "num_groups": stage,
            "num_experts_per_group": options.num_experts_per_group,
            "moe_ffn_hidden_size": expert_ffn_hidden_size(
                args["ffn_hidden_size"], options.num_experts_per_group, options.expert_init, options.shared_experts
            ),
            "base_expert": options.base_expert,
            "shared_experts": options.shared_experts,
            "router_bias": options.router_bias,
            "spectral": options.spectral_transform != "none",
            "expert_init": options.expert_init,
            "init_std": router_weight_std(options, args["hidden_size"], args["init_method_std"]),
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
        new_layers=tuple(new_layers),
        lora_rank=lora_rank,
        **moe,
    )


@dataclass(frozen=True)
class ModelDescription:
    """What a model is: read once, from config.json or from a checkpoint's metadata, and handed on.

    Attributes:
        hf_config: config.json of the dense base.
        megatron_args: of the dense architecture, by their names in Megatron's args namespace.
        options: the Mix-MoE options; None for a dense model.
        phase: what it has been trained to be, which tells its expert groups.
        embedding_rows: of a checkpoint, padding included; None: as Megatron pads without tensor parallelism.
        new_layers: 0-based numbers of the layers that the base has not.
        lora: LoRA's options, where the model has adapters.
    """

    hf_config: dict[str, Any]
    megatron_args: dict[str, Any]
    options: MixMoEOptions | None
    phase: Phase
    embedding_rows: int | None = None
    new_layers: tuple[int, ...] = ()
    lora: LoRAOptions | None = None

    @cached_property
    def sizes(self) -> Sizes:
        """The sizes of the model.

        Raises:
            MixMoEError: the options do not fit the architecture.
        """
        return self._sizes(self.embedding_rows)

    def sizes_under(self, tensor_parallel: int) -> Sizes:
        """Return the sizes, the vocabulary padded as Megatron pads it under this tensor-parallel size.

        Raises:
            MixMoEError: the options do not fit the architecture.
        """
        args = self.megatron_args
        multiple = args["make_vocab_size_divisible_by"] * tensor_parallel
        return self._sizes(padded_vocab_size(args["vocab_size"], multiple))

    def _sizes(self, embedding_rows: int | None) -> Sizes:
        rank = self.lora.lora_rank if self.lora else 0
        return model_sizes(self.megatron_args, self.options, self.phase.stage, embedding_rows, self.new_layers, rank)

    @property
    def topk_per_group(self) -> int:
        """k, the experts that a token meets in each group; 0 in a dense model."""
        return self.options.topk_per_group if self.options else 0

    def is_trained(self, parameter: str) -> bool:
        """Whether a parameter trains in the phase, by its name in a GPTModel."""
        return self.phase.is_trained(parameter, self.new_layers)

    @cached_property
    def graph_start(self) -> GraphStart | None:
        """Where the phase's autograd graph begins; None where the embedding trains."""
        return graph_start(self.phase, self.sizes.num_layers, self.sizes.moe_layers, self.new_layers)

    def recorded_options(self) -> dict[str, Any] | None:
        """Return what metadata record beside the architecture: options, or which layers are new."""
        if self.options is not None:
            return self.options.to_dict()
        if self.lora is not None:
            return asdict(self.lora)
        return {"new_layers": list(self.new_layers)} if self.phase.has_new_layers else None

    def checkpoint_args(self) -> dict[str, Any]:
        """Return the arguments that Megatron keeps in a checkpoint of this model.

        Raises:
            MixMoEError: the options do not fit the architecture.
        """
        args = dict(self.megatron_args)
        if self.options is not None:
            width = args["ffn_hidden_size"]
            args |= mixmoe_megatron_args(self.options, self.phase.stage, args["num_layers"], width)
        return {**args, "padded_vocab_size": self.sizes.padded_vocab_size}
