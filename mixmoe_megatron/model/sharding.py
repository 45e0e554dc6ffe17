"""Distributed-checkpoint entries of a stacked expert weight, under the keys of Megatron's own expert modules.

TEGroupedMLP and SequentialMLP store a group as tensors with an expert axis in front: `experts.linear_fc1.weight` of
global shape [n, 2F, H], gate and up halves sharded each on their own, and `experts.linear_fc2.weight` [n, H, F]. Here
the same global tensors are described from one stacked weight, so that the backends load each other's checkpoints and
any expert-parallel or expert-tensor-parallel size loads any other's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint

if TYPE_CHECKING:
    from mixmoe_megatron.model.experts import GroupedLinear


@dataclass
class StackedWeight:
    """A group's stacked weight on this rank, [n, out, in], and how it lies in the global tensor.

    Args:
        layer: the linear layers that the weight is of; it knows which of the group's experts this rank holds.
        offsets: offsets of axes that the caller puts in front (layers of a homogeneous model).
        own_keys: each expert (and half) under a key of its own (Megatron's `singleton_local_shards`).
    """

    layer: GroupedLinear
    offsets: tuple
    own_keys: bool

    def __post_init__(self) -> None:
        self.experts, self.num_experts = self.layer.experts, self.layer.num_experts

    def sharded_state_dict(self, prefix: str) -> ShardedStateDict:
        """Return `{prefix}{name}.weight`, and the empty `_extra_state` entries that Transformer Engine looks for.

        Args:
            prefix: prefix of the group module, ending in a dot.
        """
        name = self.layer.name
        key, replica_id = f"{prefix}experts.{name}.weight", (0, 0, self.layer.dp_rank)
        weight = ShardedTensorFactory(key, self.layer.weight, self._shards, self._merge, replica_id)
        result: ShardedStateDict = {f"{prefix}{name}.weight": weight}
        for index, expert in enumerate(self.experts):
            result[f"{prefix}{name}._extra_state{index or ''}"] = make_sharded_object_for_checkpoint(
                None,
                self._key(f"{prefix}experts.{name}._extra_state", expert),
                (*self.offsets, *self._place(expert)),
                replica_id=(0, self.layer.tp_rank, self.layer.dp_rank),
            )
        return result

    def _key(self, key: str, expert: int) -> str:
        """Return the key under which an expert is stored: the group's, or its own."""
        name = self.layer.name
        return key.replace(f"experts.{name}.", f"experts.{expert}.{name}.") if self.own_keys else key

    def _place(self, expert: int) -> tuple[tuple[int, int, int], ...]:
        """Return the expert's offset on the axis of experts, which a key of its own does not have."""
        return () if self.own_keys else ((len(self.offsets), expert, self.num_experts),)

    def _shards(
        self, key: str, tensor: torch.Tensor, replica_id: Any, flattened_range: slice | None = None
    ) -> list[ShardedTensor]:
        """Cut a tensor like the weight (the weight, or its optimizer state) into the pieces that are stored.

        Each is contiguous, as `--ckpt-fully-parallel-load` broadcasts them: an expert's matrix, or its gate and its up
        half. Under one key the halves lie one after the other, under own keys each is a whole.
        """
        stride, parallel_axis = self.layer.stride, self.layer.parallel_axis
        tp_rank, tp_size, result = self.layer.tp_rank, self.layer.tp_size, []
        for expert, matrix in zip(self.experts, tensor if self.own_keys else tensor.split(1), strict=True):
            offsets = (*self.offsets, *self._place(expert))
            for half, block in enumerate(matrix.chunk(stride, dim=parallel_axis - 2)):
                suffix, position, parts = "", half * tp_size + tp_rank, stride * tp_size
                if self.own_keys and stride == 2:
                    suffix, position, parts = ("_w", "_v")[half], tp_rank, tp_size
                result.append(
                    ShardedTensor.from_rank_offsets(
                        self._key(key, expert) + suffix,
                        block,
                        *offsets,
                        (len(offsets) + parallel_axis, position, parts),
                        replica_id=replica_id,
                        prepend_axis_num=len(self.offsets),
                    )
                )
        return result

    def _merge(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """Put loaded pieces together again: the inverse of `_shards`."""
        stride, axis = self.layer.stride, self.layer.parallel_axis - 2
        matrices = [torch.cat(pieces[i : i + stride], dim=axis) for i in range(0, len(pieces), stride)]
        return torch.stack(matrices) if self.own_keys else torch.cat(matrices)
