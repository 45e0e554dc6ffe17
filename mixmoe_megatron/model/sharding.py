"""Distributed-checkpoint entries of a stacked expert weight, under the keys of Megatron's own expert modules.

TEGroupedMLP and SequentialMLP store a group as tensors with an expert axis in front: `experts.linear_fc1.weight` of
global shape [n, 2F, H], gate and up halves sharded each on their own, and `experts.linear_fc2.weight` [n, H, F]. Here
the same global tensors are described from one stacked weight, so that the backends load each other's checkpoints and
any expert-parallel or expert-tensor-parallel size loads any other's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import utils
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint


@dataclass
class StackedWeight:
    """A group's stacked weight on this rank, [n, out, in], and how it lies in the global tensor.

    Args:
        name: "linear_fc1" or "linear_fc2".
        weight: [n, out, in], this rank's part.
        parallel_axis: axis of [out, in] that expert tensor parallelism splits.
        stride: 2 when `out` is a gate and an up half, each sharded on its own, else 1.
        pg_collection: Megatron's process groups (ep, expt_tp, expt_dp).
        offsets: offsets of axes that the caller puts in front (layers of a homogeneous model).
        own_keys: each expert (and half) under a key of its own (Megatron's `singleton_local_shards`).
    """

    name: str
    weight: torch.Tensor
    parallel_axis: int
    stride: int
    pg_collection: ProcessGroupCollection
    offsets: tuple
    own_keys: bool

    def __post_init__(self) -> None:
        groups = self.pg_collection
        self.ep_rank, self.ep_size = utils.get_pg_rank(groups.ep), utils.get_pg_size(groups.ep)
        self.tp_rank, self.tp_size = utils.get_pg_rank(groups.expt_tp), utils.get_pg_size(groups.expt_tp)
        self.dp_rank = utils.get_pg_rank(groups.expt_dp)

    def sharded_state_dict(self, prefix: str) -> ShardedStateDict:
        """Return `{prefix}{name}.weight`, and the empty `_extra_state` entries that Transformer Engine looks for.

        Args:
            prefix: prefix of the group module, ending in a dot.
        """
        key, replica_id = f"{prefix}experts.{self.name}.weight", (0, 0, self.dp_rank)
        entry: Any = ShardedTensorFactory(key, self.weight, self._shards, self._merge, replica_id)
        if self.stride == 1 and not self.own_keys:
            (entry,) = self._shards(key, self.weight, replica_id)
        result: ShardedStateDict = {f"{prefix}{self.name}.weight": entry}
        n = len(self.weight)
        for index in range(n):
            expert = self.ep_rank * n + index
            result[f"{prefix}{self.name}._extra_state{index or ''}"] = make_sharded_object_for_checkpoint(
                None,
                f"{prefix}experts.{f'{expert}.' if self.own_keys else ''}{self.name}._extra_state",
                self.offsets if self.own_keys else (*self.offsets, (len(self.offsets), expert, n * self.ep_size)),
                replica_id=(0, self.tp_rank, self.dp_rank),
            )
        return result

    def _shards(
        self, key: str, tensor: torch.Tensor, replica_id: Any, flattened_range: slice | None = None
    ) -> list[ShardedTensor]:
        """Cut a tensor like the weight (the weight, or its optimizer state) into the pieces that are stored.

        Each is contiguous, as `--ckpt-fully-parallel-load` broadcasts them: halves are cut expert by expert.
        """
        if self.stride == 1 and not self.own_keys:
            return self._halves(key, tensor, ((len(self.offsets), self.ep_rank, self.ep_size),), replica_id)
        result = []
        for index in range(len(tensor)):
            expert = self.ep_rank * len(tensor) + index
            if self.own_keys:
                own_key = key.replace(f"experts.{self.name}.", f"experts.{expert}.{self.name}.")
                result += self._halves(own_key, tensor[index], (), replica_id)
            else:
                place = (len(self.offsets), expert, len(tensor) * self.ep_size)
                result += self._halves(key, tensor[index : index + 1], (place,), replica_id)
        return result

    def _halves(self, key: str, tensor: torch.Tensor, ep_offsets: tuple, replica_id: Any) -> list[ShardedTensor]:
        """Return a shard per half: under one key they lie one after the other, under own keys each is a whole."""
        axis = self.parallel_axis + len(ep_offsets)
        suffixes = ("_w", "_v") if self.own_keys and self.stride == 2 else ("",) * self.stride
        in_one = 1 if self.own_keys else self.stride
        result = []
        # The weight itself where it is one piece: the optimizer finds its parameters by identity.
        blocks = tensor.chunk(self.stride, dim=axis) if self.stride > 1 else (tensor,)
        for half, (suffix, block) in enumerate(zip(suffixes, blocks, strict=True)):
            position = self.tp_rank if self.own_keys else half * self.tp_size + self.tp_rank
            result.append(
                ShardedTensor.from_rank_offsets(
                    key + suffix,
                    block,
                    *self.offsets,
                    *ep_offsets,
                    (len(self.offsets) + axis, position, in_one * self.tp_size),
                    replica_id=replica_id,
                    prepend_axis_num=len(self.offsets),
                )
            )
        return result

    def _merge(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """Put loaded pieces together again: the inverse of `_shards`."""
        starts = range(0, len(pieces), self.stride)
        if self.own_keys:
            return torch.stack([torch.cat(pieces[i : i + self.stride], dim=self.parallel_axis) for i in starts])
        return torch.cat([torch.cat(pieces[i : i + self.stride], dim=1 + self.parallel_axis) for i in starts])
