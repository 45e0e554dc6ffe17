"""Expert groups on grouped GEMMs, and the container that gives each group its tokens.

Shape legend: T tokens of a group on this rank (a token counts once per chosen expert), H hidden_size, F
moe_ffn_hidden_size / expert tensor parallel size, n experts of a group on this rank, E = 2 n (stage 2) or n (stage 1).

A module for each part that is frozen on its own, because a grouped linear layer is frozen as a whole or not at all: the
LM group is frozen in stage 2, and MoE-LPR freezes the first LM expert (option `base_expert`), which lies on the first
expert-parallel rank, beside others. A frozen part computes no weight gradient: autograd asks its layers for the input
gradient only.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from megatron.core import utils
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.mixmoe import GROUPS
from mixmoe_megatron.model.backends import choose_experts_backend
from mixmoe_megatron.model.config import options_and_stage
from mixmoe_megatron.model.expert_ops import grouped_linear, looped_linear, weighted_swiglu
from mixmoe_megatron.model.metrics import recording_tracker
from mixmoe_megatron.model.recompute import recomputed
from mixmoe_megatron.model.sharding import StackedWeight


class GroupedLinear(torch.nn.Module):
    """One of the two layers of a group's experts: a bias-free linear layer per expert, in one stacked weight.

    "linear_fc1" is gate and up projection, [2 F, H], "linear_fc2" the down projection, [H, F]; y_e = x_e W_e^T. Expert
    tensor parallelism splits F: the output of the first, gate and up each on its own, and the input of the second.

    Args:
        name: "linear_fc1" or "linear_fc2".
        num_local_experts: n, experts of the group on this rank.
        config: a MixMoETransformerConfig.
        pg_collection: Megatron's process groups (ep, expt_tp, expt_dp).
        use_grouped_mm: one grouped GEMM instead of a GEMM per expert.
        num_experts: of the group on all ranks; None: each rank has as many.
        first: number in the group of this rank's first expert; None: each rank has as many.

    Attributes:
        experts: this rank's numbers in the group.
        num_experts: experts of the group on all ranks.
        weight: [n, output size, input size] params_dtype.
        parallel_axis: axis of [output size, input size] that expert tensor parallelism splits.
        stride: 2 when the output is a gate and an up projection, each split on its own, else 1.
        ep_rank, ep_size, tp_rank, tp_size, dp_rank: this rank among those that share out the experts, each expert's
            weight, and among those that hold the same.
    """

    def __init__(
        self,
        name: str,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        use_grouped_mm: bool,
        num_experts: int | None = None,
        first: int | None = None,
    ):
        super().__init__()
        self.name, self.use_grouped_mm = name, use_grouped_mm
        self.ep_rank, self.ep_size = utils.get_pg_rank(pg_collection.ep), utils.get_pg_size(pg_collection.ep)
        self.tp_rank, self.tp_size = utils.get_pg_rank(pg_collection.expt_tp), utils.get_pg_size(pg_collection.expt_tp)
        self.dp_rank = utils.get_pg_rank(pg_collection.expt_dp)
        self.num_experts = num_local_experts * self.ep_size if num_experts is None else num_experts
        first = num_local_experts * self.ep_rank if first is None else first
        self.experts = range(first, first + num_local_experts)
        hidden_size, ffn_size = config.hidden_size, config.moe_ffn_hidden_size
        assert ffn_size is not None
        if name == "linear_fc1":
            full_shape, init_method = [2 * ffn_size, hidden_size], config.init_method
            self.parallel_axis, self.stride = 0, 2
        else:
            full_shape, init_method = [hidden_size, ffn_size], config.output_layer_init_method
            self.parallel_axis, self.stride = 1, 1
        shape = list(full_shape)
        shape[self.parallel_axis] //= self.tp_size
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.empty(num_local_experts, *shape, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        set_tensor_model_parallel_attributes(self.weight, True, self.parallel_axis + 1, self.stride)
        if config.perform_initialization:
            self._initialize(init_method, full_shape, config)
        self.register_load_state_dict_pre_hook(_drop_extra_state)

    @torch.no_grad()
    def _initialize(self, init_method: Any, full_shape: list[int], config: TransformerConfig) -> None:
        if not config.use_cpu_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                for expert in self.weight:
                    init_method(expert)
            return
        # On the CPU every rank draws all experts, so that the model does not depend on the parallel sizes.
        for index in range(self.num_experts):
            full = torch.empty(full_shape, dtype=torch.float32, device="cpu")
            init_method(full)
            if index in self.experts:
                blocks = full.chunk(self.stride * self.tp_size, dim=self.parallel_axis)
                own = self.weight[index - self.experts.start]
                own.copy_(torch.cat(blocks[self.tp_rank :: self.tp_size], dim=self.parallel_axis))

    def forward(self, x: torch.Tensor, tokens_per_expert: list[int]) -> torch.Tensor:
        """Apply each expert's layer to its rows: [T, in] sorted by expert -> [T, out].

        Args:
            x: [T, in], the experts' tokens one after the other; params_dtype.
            tokens_per_expert: n counts, their sum T.
        """
        use_grouped_mm = self.use_grouped_mm and len(self.weight) > 1 and len(x) > 0
        return (grouped_linear if use_grouped_mm else looped_linear)(x, self.weight, tokens_per_expert)


def _drop_extra_state(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Drop Transformer Engine's `_extra_state` entries (empty without fp8), which this backend does not have."""
    for key in [key for key in state_dict if key.startswith(f"{prefix}_extra_state")]:
        del state_dict[key]


class ExpertGroup(MegatronModule):
    """The experts of one group: y = p * down(act(gate(h)) * up(h)), each token with its expert.

    As in Megatron's own experts, p multiplies the activation before the second layer, which is the same (the layer is
    linear). Under expert tensor parallelism the result is this rank's summand; the token dispatcher adds them up.

    Source: Mix-MoE (arXiv:2605.24681) eq. 1-2. Deviates: D10 (model/README.md).

    Args:
        num_local_experts: n, experts of this group on this rank.
        config: a MixMoETransformerConfig.
        pg_collection: Megatron's process groups (ep, expt_tp, expt_dp).
        use_grouped_mm: one grouped GEMM per layer instead of a GEMM per expert.
        num_experts, first: see GroupedLinear; None: each rank has as many.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        use_grouped_mm: bool,
        num_experts: int | None = None,
        first: int | None = None,
    ):
        super().__init__(config=config)
        self.linear_fc1, self.linear_fc2 = (
            GroupedLinear(name, num_local_experts, config, pg_collection, use_grouped_mm, num_experts, first)
            for name in ("linear_fc1", "linear_fc2")
        )
        self.recompute_activation = config.recompute_granularity == "selective" and "moe_act" in (
            config.recompute_modules or []
        )

    def _activation(self, gate_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        """Return p * SiLU(gate) * up: [T, 2 F], [T] float32 -> [T, F] in gate_up's dtype."""
        return weighted_swiglu(gate_up, probs, fused=self.config.bias_activation_fusion)

    def forward(self, hidden_states: torch.Tensor, tokens_per_expert: list[int], probs: torch.Tensor) -> torch.Tensor:
        """Run the group.

        Args:
            hidden_states: [T, H] params_dtype, sorted by expert.
            tokens_per_expert: n counts of tokens, their sum T.
            probs: [T] float32, the factor of each token's output.

        Returns:
            [T, H] params_dtype.
        """
        gate_up = self.linear_fc1(hidden_states, tokens_per_expert)
        activation = partial(self._activation, gate_up, probs)
        fc2 = partial(self.linear_fc2, tokens_per_expert=tokens_per_expert)
        return recomputed(activation, fc2) if self.recompute_activation else fc2(activation())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Return the sharded weights under the keys of Megatron's TEGroupedMLP and SequentialMLP."""
        own_keys = bool((metadata or {}).get("singleton_local_shards", False))
        layers = (StackedWeight(layer, sharded_offsets, own_keys) for layer in (self.linear_fc1, self.linear_fc2))
        return {key: entry for layer in layers for key, entry in layer.sharded_state_dict(prefix).items()}


class MixMoEExperts(MegatronModule):
    """The LM group and, in stage 2, the MT group on this rank; with a base expert, that beside the other LM experts.

    Args:
        num_local_experts: E, experts of both groups on this rank.
        config: a MixMoETransformerConfig.
        pg_collection: Megatron's process groups.
        name: instance name, for Transformer Engine's modules.

    Attributes:
        layer_number: 1-based, for the log; set by the layer.
        block_sizes: names of the modules that hold this rank's experts, in their order, and how many each holds.

    Raises:
        MixMoEError: the backend asked for is not there or does not support the config.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ):
        super().__init__(config=config)
        if pg_collection is None:
            raise MixMoEError("MixMoEExperts needs Megatron's process groups (pg_collection).")
        options, self.stage = options_and_stage(config)
        n = num_local_experts // self.stage
        self.layer_number: int | None = None
        self.tp_group = pg_collection.expt_tp
        self.backend = choose_experts_backend(config, n)
        self.block_sizes: dict[str, int] = {}
        if options.base_expert:
            rank = utils.get_pg_rank(pg_collection.ep)
            is_first, others = rank == 0, options.num_experts_per_group - 1
            self._add_block("base_expert", int(is_first), pg_collection, name, 1, 0)
            self._add_block("lm_experts", n - is_first, pg_collection, name, others, max(0, n * rank - 1))
        else:
            for group in GROUPS[: self.stage]:
                self._add_block(f"{group}_experts", n, pg_collection, name)

    def _add_block(
        self,
        block: str,
        count: int,
        pg_collection: ProcessGroupCollection,
        name: str | None,
        num_experts: int | None = None,
        first: int | None = None,
    ) -> None:
        """Build the module of `count` experts, unless it would be empty: an empty parameter has no place anywhere."""
        if count == 0:
            return
        group: MegatronModule
        if self.backend == "te":
            from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

            build = TESpecProvider().grouped_mlp_modules(True)
            full_name = f"{name}.{block}" if name else None
            group = build(count, self.config, pg_collection=pg_collection, name=full_name)
        else:
            use_grouped_mm = self.backend == "torch"
            group = ExpertGroup(count, self.config, pg_collection, use_grouped_mm, num_experts, first)
        for weight in group.parameters():
            # Experts belong to Megatron's expert process groups under every layout, also where these equal the dense
            # ones: the optimizer then has the same parts, and its checkpoint loads under any layout.
            weight.allreduce = False
        self.block_sizes[block] = count
        self.add_module(block, group)

    def groups(self) -> list[MegatronModule]:
        """Return the modules that hold the experts, in the order of the experts on this rank."""
        return [getattr(self, block) for block in self.block_sizes]

    def forward(
        self, hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Split the tokens once into the modules' parts, run each, put the outputs back together.

        Args:
            hidden_states: [T, H] params_dtype, sorted by expert: LM tokens, then MT tokens.
            tokens_per_expert: [E] integer counts; on the CPU they cost no synchronisation.
            probs: [T] float32.

        Returns:
            output: [T, H]. bias: None.
        """
        counts = iter(tokens_per_expert.tolist())
        group_counts = [list(itertools.islice(counts, size)) for size in self.block_sizes.values()]
        sizes = [sum(group) for group in group_counts]
        outputs = [
            self._run_group(*work)
            for work in zip(self.groups(), hidden_states.split(sizes), group_counts, probs.split(sizes), strict=True)
        ]
        if (tracker := recording_tracker(self)) and self.layer_number is not None:
            for block, output in zip(self.block_sizes, outputs, strict=True):
                tracker.record_output(self.layer_number, int(block == "mt_experts"), output, self.tp_group)
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0]), None

    def _run_group(
        self, group: MegatronModule, hidden_states: torch.Tensor, counts: list[int], probs: torch.Tensor
    ) -> torch.Tensor:
        if self.backend == "te":
            return group(hidden_states, torch.tensor(counts), probs)[0]
        return group(hidden_states, counts, probs)

    def backward_dw(self) -> None:
        """Compute delayed weight gradients (Transformer Engine only; the other backends delay none)."""
        for group in self.groups() if self.backend == "te" else []:
            if any(parameter.requires_grad for parameter in group.parameters()):
                group.backward_dw()
