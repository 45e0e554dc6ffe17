"""Mix-MoE for Megatron-Bridge: importing this module makes its `AutoBridge` know exported Mix-MoE models.

Optional: nothing in this package imports it, and it needs `megatron-bridge`, which in turn needs Transformer Engine.
Names, shapes and layouts come from `model/mapping.py`. Where a row is one that Megatron-Bridge knows (a plain tensor,
QKV, gate and up projection), its own mapping carries it; what the expert groups share (routers, experts)
`GroupMapping` does.

Shape legend: n experts per group, m experts of a group on this rank, E experts of all groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mixmoe_megatron import hf
from mixmoe_megatron.checkpoint.bits import from_torch, to_torch
from mixmoe_megatron.conversion.exported import options_from_hf
from mixmoe_megatron.conversion.hf_config import megatron_args_from_hf
from mixmoe_megatron.conversion.parity import transformer_fields
from mixmoe_megatron.methods.registry import STAGES
from mixmoe_megatron.model.config import MixMoETransformerConfig, check_transformer_config
from mixmoe_megatron.model.freezing import freeze_for_phase
from mixmoe_megatron.model.layer_specs import mixmoe_decoder_block_spec
from mixmoe_megatron.model.mapping import GATE_UP, QKV, ROUTER, SAME, TABLES, VOCAB, Row, Sizes
from mixmoe_megatron.model.router_rows import folded_router
from mixmoe_megatron.model.sizes import model_sizes


@dataclass
class MixMoEProvider(GPTModelProvider, MixMoETransformerConfig):
    """The configuration that Megatron-Bridge builds a Mix-MoE GPTModel from.

    Its fields may be changed (parallel sizes, dispatcher, ...) until `finalize`, which checks them.
    """

    def finalize(self) -> None:
        """Compute the derived fields and check what Mix-MoE asks of them.

        Raises:
            MixMoEError: a setting does not go with Mix-MoE; one sentence says which.
        """
        super().finalize()
        check_transformer_config(self)


class GroupMapping(MegatronParamMapping[Tensor]):
    """One Megatron tensor of a row whose Hugging Face tensor holds all groups: a router's, or some experts'.

    To Megatron each rank takes its part from the whole tensor. To Hugging Face it gives pieces, [experts, ...] keyed by
    (position in the row, first expert); `MixMoEBridge` puts them together when the row is complete.

    Args:
        megatron_param: the parameter's name, `*` for the layer.
        hf_param: the Hugging Face tensor's name, likewise.
        row: of the mapping table.
        position: of the tensor among those of the row that exist.
        sizes: of the model.
        expert: number on the rank of the one expert that the parameter holds; None: it holds all of the rank.
    """

    def __init__(
        self, megatron_param: str, hf_param: str, row: Row, position: int, sizes: Sizes, expert: int | None
    ) -> None:
        super().__init__(megatron_param, hf_param)
        self.row, self.position, self.sizes, self.expert = row, position, sizes, expert

    @property
    def is_expert(self) -> bool:
        """Whether expert parallelism splits the parameter (a router is on every rank)."""
        return ".experts." in self.megatron_param

    @property
    def split_axis(self) -> int:
        """Axis of [experts, out, in] that expert tensor parallelism splits."""
        return 1 if ".linear_fc1." in self.megatron_param else 2

    def resolve(self, captures: tuple[str, ...]) -> GroupMapping:
        """Return this mapping for one layer."""
        megatron_param, hf_param = self._resolve_names(captures)
        return GroupMapping(megatron_param, hf_param, self.row, self.position, self.sizes, self.expert)

    def hf_to_megatron(self, hf_weights: Tensor, megatron_module: torch.nn.Module) -> Tensor:
        """Return this rank's part of [E, ...]: a whole router, [m, ...], or one expert's matrix."""
        assert self.row.crossing.to_megatron is not None
        bits = self.row.crossing.to_megatron([from_torch(hf_weights.cpu())], self.sizes)[self.position]
        whole = to_torch(bits, str(hf_weights.dtype).removeprefix("torch.")).to(hf_weights.device)
        if not self.is_expert:
            return whole
        experts = whole.chunk(self.ep_size)[self.ep_rank]
        if self.expert is not None:
            experts = experts[self.expert : self.expert + 1]
        halves = experts.chunk(3 - self.split_axis, dim=1)  # gate and up are split each on its own
        part = torch.cat([half.chunk(self.tp_size, dim=self.split_axis)[self.tp_rank] for half in halves], dim=1)
        return part if self.expert is None else part[0]

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[Any, Tensor]:
        """Return the pieces of all ranks: {(position, first expert): [experts, ...]}."""
        weights = self.broadcast_from_pp_rank(megatron_weights, cache_key=self.megatron_param)
        assert weights is not None
        if not self.is_expert:
            return {(self.position, 0): weights}
        shards = [shard.reshape(-1, *weights.shape[-2:]) for shard in self.gather_from_tp_ranks(weights)]
        halves = zip(*(shard.chunk(3 - self.split_axis, dim=1) for shard in shards), strict=True)
        experts = torch.cat([torch.cat(half, dim=self.split_axis) for half in halves], dim=1)
        gathered = [experts]
        if self.ep_size > 1:
            gathered = [torch.empty_like(experts) for _ in range(self.ep_size)]
            torch.distributed.all_gather(gathered, experts, group=self.ep_group)
        per_rank = self.sizes.num_experts_per_group // self.ep_size
        return {(self.position, rank * per_rank + (self.expert or 0)): piece for rank, piece in enumerate(gathered)}


@MegatronModelBridge.register_bridge(source=hf.MixMoEForCausalLM.__name__, target=GPTModel, model_type="mixmoe")
class MixMoEBridge(MegatronModelBridge):
    """Exported Mix-MoE models <-> a Megatron GPTModel whose experts and routers are this package's."""

    hf_config: Any

    def __init__(self) -> None:
        super().__init__()
        self._pieces: dict[str, dict[Any, Tensor]] = {}

    def provider_bridge(self, hf_pretrained: Any) -> MixMoEProvider:
        """Return the configuration of the model, which freezes what its stage does not train.

        Args:
            hf_pretrained: Megatron-Bridge's wrapper of the Hugging Face model.

        Raises:
            MixMoEError: config.json is not that of a supported Mix-MoE model.
        """
        config = hf_pretrained.config.to_dict()
        args, options = megatron_args_from_hf(config), options_from_hf(config)
        dtype = self.dtype_from_hf(hf_pretrained.config, default=torch.float32)
        fields = {
            **transformer_fields(args),
            "params_dtype": dtype,
            "fp16": dtype is torch.float16,
            "bf16": dtype is torch.bfloat16,
            "moe_grouped_gemm": True,
            "transformer_layer_spec": mixmoe_decoder_block_spec,
            "vocab_size": args["vocab_size"],
            "make_vocab_size_divisible_by": args["make_vocab_size_divisible_by"],
            "should_pad_vocab": True,
            "seq_length": args["max_position_embeddings"],
            "position_embedding_type": args["position_embedding_type"],
            "rotary_base": args["rotary_base"],
            "rotary_percent": args["rotary_percent"],
            "rope_scaling": args["use_rope_scaling"],
            "rope_scaling_factor": args["rope_scaling_factor"],
            "share_embeddings_and_output_weights": not args["untie_embeddings_and_output_weights"],
        }
        provider = MixMoEProvider.build(options, config["stage"], **fields)
        provider.register_pre_wrap_hook(partial(freeze_for_phase, phase=STAGES[config["stage"]]))
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return the mapping tables in Megatron-Bridge's terms, for the model of `hf_config`."""
        sizes = self._sizes()
        rows = [row for row in TABLES["same"] if row.when(sizes)]
        return MegatronMappingRegistry(*(mapping for row in rows for mapping in _mappings(row, sizes)))

    def maybe_modify_converted_hf_weight(
        self, task: Any, converted_weights_dict: dict[Any, Tensor], hf_state_dict: Any
    ) -> dict[str, Tensor]:
        """Return what a task gives to the Hugging Face side: nothing yet while a row of groups is incomplete."""
        mapping = task.mapping
        if not isinstance(mapping, GroupMapping):
            vocab_size = self._sizes().vocab_size
            is_vocab = mapping.megatron_param in _VOCAB_TENSORS
            return {name: w[:vocab_size] if is_vocab else w for name, w in converted_weights_dict.items()}
        name, sizes = str(mapping.hf_param), mapping.sizes
        pieces = self._pieces.setdefault(name, {})
        pieces.update(converted_weights_dict)
        positions = range(len(mapping.row.keys("megatron", sizes)))
        if sum(len(piece) for piece in pieces.values()) < len(positions) * sizes.num_experts_per_group:
            return {}
        del self._pieces[name]
        tensors = [torch.cat([pieces[key] for key in sorted(pieces) if key[0] == place]) for place in positions]
        if mapping.row.crossing is ROUTER:
            weights = [tensor.float().cpu().numpy() for tensor in tensors]
            folded = folded_router(weights, options_from_hf(self.hf_config.to_dict()))
            whole = torch.from_numpy(folded).to(tensors[0].device)
        else:
            whole = torch.cat(tensors).float() if mapping.row.is_router else torch.cat(tensors)
        return {name: whole}

    def _sizes(self) -> Sizes:
        config = self.hf_config.to_dict()
        return model_sizes(megatron_args_from_hf(config), options_from_hf(config), config["stage"])


_VOCAB_TENSORS = tuple(row.megatron[0].name for row in TABLES["same"] if row.crossing is VOCAB)


def _pattern(name: str) -> str:
    return name.replace("{i}", "*")


def _mappings(row: Row, sizes: Sizes) -> list[MegatronParamMapping]:
    """Return the mappings of a row, `*` for the layer."""
    name, names = _pattern(row.megatron[0].name), [_pattern(t.name) for t in row.hf]
    if row.crossing in (SAME, VOCAB):
        return [AutoMapping(name, names[0])]
    if row.crossing is QKV:
        return [QKVMapping(name, *names)]
    if row.crossing is GATE_UP:
        return [GatedMLPMapping(name, *names)]
    mappings = []
    for position, tensor in enumerate(row.keys("megatron", sizes)):
        # A group's modules lie one level higher in the model than their keys in a checkpoint.
        name = _pattern(tensor.name).replace("_experts.experts.", "_experts.")
        mappings.append(GroupMapping(name, names[0], row, position, sizes, None))
        if ".experts." in name:  # Transformer Engine keeps a parameter for each expert
            singles = range(sizes.num_experts_per_group)
            mappings += [GroupMapping(f"{name}{i}", names[0], row, position, sizes, i) for i in singles]
    return mappings
