"""Megatron's column- and row-parallel linear layers, its own and Transformer Engine's, with LoRA beside them.

Megatron stacks linear layers of the base: q, k and v, and gate and up. Each of them has its own A and B here, as in
PEFT. Under tensor parallelism (always with sequence parallelism) no rank sees more than its part of anything large:

- column-parallel: A is whole on each rank and works on the rank's part of the sequence; the r columns that come out are
  gathered, and the rank's rows of B make its part of the output;
- row-parallel: the rank's columns of A work on its part of the input; the r columns are summed and scattered over the
  sequence, and B, whole on each rank, makes the rank's part of the sequence.

What is whole on each rank sees a part of the sequence there, so its gradients are summed over the ranks, which Megatron
does for parameters marked `sequence_parallel`.

Shape legend: S sequence, B batch, r rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import utils
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region as _gather
from megatron.core.tensor_parallel import reduce_scatter_to_sequence_parallel_region as _scatter
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn import functional


class LoRA(torch.nn.Module):
    """A and B of the linear layers that one of Megatron's stands for.

    Args:
        config: the Transformer configuration, with `lora_rank` and `lora_alpha`.
        tp_group: the tensor-parallel ranks.
        device: where the layer's weight is.
        input_size: of this rank's A.
        output_sizes: of this rank's B, by name of the base's layer ("q", "gate", ...).
        is_column: B is cut over the tensor-parallel ranks; else A is.

    Attributes:
        {name}_a: [r, input_size]. {name}_b: [output size, r], zero at the start. Both params_dtype.
    """

    def __init__(
        self, config: Any, tp_group: Any, device: torch.device, input_size: int, output_sizes: dict[str, int],
        is_column: bool,
    ):  # fmt: skip
        super().__init__()
        self.config, self.tp_group = config, tp_group
        self.names, self.is_column = list(output_sizes), is_column
        rank, like = config.lora_rank, {"dtype": config.params_dtype, "device": device}
        for name, size in output_sizes.items():
            a, b = torch.empty(rank, input_size, **like), torch.zeros(size, rank, **like)
            if self.config.perform_initialization:
                torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            for kind, values, is_cut in (("a", a, not is_column), ("b", b, is_column)):
                parameter = torch.nn.Parameter(values)
                if is_cut:
                    set_tensor_model_parallel_attributes(parameter, True, 0 if kind == "b" else 1, 1)
                else:
                    parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
                self.register_parameter(f"{name}_{kind}", parameter)

    def forward(self, input_: torch.Tensor) -> list[torch.Tensor]:
        """Return what is added to each layer's output, [S, B, in] -> [S, B, out] each, in the order of the names.

        Column-parallel the input is this rank's part of the sequence and the outputs are of all of it; row-parallel it
        is the other way round.
        """
        a, b = ([getattr(self, f"{name}_{kind}") for name in self.names] for kind in "ab")
        low = functional.linear(input_, torch.cat(a)) * (self.config.lora_alpha / self.config.lora_rank)
        if utils.get_pg_size(self.tp_group) > 1:
            low = (_gather if self.is_column else _scatter)(low, group=self.tp_group)
        return [functional.linear(x, matrix) for x, matrix in zip(low.chunk(len(b), -1), b, strict=True)]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the parameters as Megatron's checkpoints take them.

        Args:
            prefix: of the names.
            sharded_offsets: of the layer among its like.
            metadata: Megatron's; has the process group of replicas.
        """
        kind, axis = ("b", 0) if self.is_column else ("a", 1)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {f"{name}_{kind}": axis for name in self.names},
            sharded_offsets, tp_group=self.tp_group, dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )  # fmt: skip


class _WithLoRA:
    """What both kinds of linear layer share."""

    lora: LoRA
    weight: torch.Tensor

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the layer's parameters, and LoRA's, as Megatron's checkpoints take them; see `LoRA`."""
        whole = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        own = {name: part for name, part in whole.items() if not name.startswith(f"{prefix}lora.")}
        return own | self.lora.sharded_state_dict(f"{prefix}lora.", sharded_offsets, metadata)


class _Column(_WithLoRA):
    def __init__(self, input_size: int, output_size: int, *, config: Any, tp_comm_buffer_name: str, **kwargs: Any):
        words = {"config": config, "tp_comm_buffer_name": tp_comm_buffer_name, **kwargs}
        super().__init__(input_size, output_size, **words)  # type: ignore[call-arg]
        tp_group = utils.get_tensor_model_parallel_group_if_none(kwargs.get("tp_group"))
        size = output_size // utils.get_pg_size(tp_group)
        self.groups = config.num_query_groups // config.tensor_model_parallel_size
        key = self.groups * config.kv_channels
        sizes = {"gate": size // 2, "up": size // 2}
        if tp_comm_buffer_name == "qkv":
            sizes = {"q": size - 2 * key, "k": key, "v": key}
        self.lora = LoRA(config, tp_group, self.weight.device, input_size, sizes, is_column=True)

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return Megatron's output plus LoRA's, [S, B, this rank's part], and the bias that is not added."""
        output, bias = super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        parts = self.lora(input_)
        if len(parts) == 3:  # a query group's query heads, its key head, its value head; then the next group's
            parts = [part.unflatten(-1, (self.groups, -1)) for part in parts]
            return output + torch.cat(parts, -1).flatten(-2), bias
        return output + torch.cat(parts, -1), bias


class _Row(_WithLoRA):
    def __init__(self, input_size: int, output_size: int, *, config: Any, tp_comm_buffer_name: str, **kwargs: Any):
        words = {"config": config, "tp_comm_buffer_name": tp_comm_buffer_name, **kwargs}
        super().__init__(input_size, output_size, **words)  # type: ignore[call-arg]
        tp_group = utils.get_tensor_model_parallel_group_if_none(kwargs.get("tp_group"))
        name, rows = ("o" if tp_comm_buffer_name == "proj" else "down"), input_size // utils.get_pg_size(tp_group)
        self.lora = LoRA(config, tp_group, self.weight.device, rows, {name: output_size}, is_column=False)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return Megatron's output plus LoRA's, [this rank's part of S, B, H], and the bias that is not added."""
        output, bias = super().forward(input_)  # type: ignore[misc]
        return output + self.lora(input_)[0], bias


class LoRAColumnParallelLinear(_Column, ColumnParallelLinear):
    """Megatron's linear_qkv or linear_fc1 with LoRA; the arguments are Megatron's."""


class LoRARowParallelLinear(_Row, RowParallelLinear):
    """Megatron's linear_proj or linear_fc2 with LoRA; the arguments are Megatron's."""


if HAVE_TE:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    class TELoRAColumnParallelLinear(_Column, TEColumnParallelLinear):
        """Transformer Engine's linear_qkv or linear_fc1, without the norm before it, with LoRA."""

    class TELoRARowParallelLinear(_Row, TERowParallelLinear):
        """Transformer Engine's linear_proj or linear_fc2 with LoRA."""
