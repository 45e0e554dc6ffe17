"""Build the model, DDP and optimizer of some ranks of a cluster in one process, on Megatron's fake process group.

    python tests/helpers/fake_cluster.py WORLD_SIZE RANK,RANK,... FLAGS_OF_pretrain_mixmoe.py

The training command runs as it is, real parser and validation included, up to where its config is built; from there
each rank's model, DDP wrapper and distributed optimizer are built by Megatron, on the meta device: no memory at any
size. Prints a line of JSON for each rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

import torch


class ConfigBuilt(BaseException):
    """Ends the training command once its arguments are checked and its config is built."""


def built_config(words: list[str]) -> tuple[Any, Any]:
    """Return Megatron's arguments and config container of a training command line."""
    from mixmoe_megatron.training import pretrain, run

    build_config, built = run.build_config, []

    def stop_after(args: Any) -> None:
        built.extend([args, build_config(args)])
        raise ConfigBuilt

    run.build_config = stop_after
    sys.argv[1:] = [*words, "--fake-process-group"]
    with contextlib.suppress(ConfigBuilt):
        pretrain.main()
    args, container = built
    return args, container


def stay_on_meta() -> None:
    """Let all that would go to the GPU go to the meta device."""
    from megatron.training.models import dist_utils

    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment,return-value]
    dist_utils.to_empty_if_meta_device = lambda module, device: module.to("meta")
    tensor_type = torch.Tensor.type

    def type_of_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        return result.replace("torch.cuda.meta.", "torch.cuda.") if isinstance(result, str) else result

    torch.Tensor.type = type_of_cuda  # type: ignore[method-assign,assignment]


def build_rank(args: Any, container: Any, rank: int) -> tuple[list[Any], Any]:
    """Return the model chunks and the optimizer of a rank."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import initialize, training

    from mixmoe_megatron.methods.registry import phase_of_stage
    from mixmoe_megatron.model.freezing import freeze_for_phase

    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    args.rank = rank
    initialize._initialize_distributed(None, None, None)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    transformer = container.model.transformer
    transformer.use_cpu_initialization = transformer.perform_initialization = False
    transformer.init_model_with_meta_device = True
    container.model.pre_wrap_hooks[:] = [lambda chunks: freeze_for_phase(chunks, phase_of_stage(args.mixmoe_stage))]
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model, optimizer, _ = training.setup_model_and_optimizer(None, cfg_container=container, pg_collection=groups)
    return model, optimizer


def describe(model: list[Any], optimizer: Any) -> dict[str, Any]:
    """Return what a rank holds: parameters, the shards of its checkpoint, bytes of weights, gradients and optimizer."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    parameters = {
        name.replace("module.", ""): (tuple(parameter.shape), parameter.requires_grad)
        for chunk in model
        for name, parameter in chunk.named_parameters()
    }
    shards = []
    for chunk in model:
        state = chunk.sharded_state_dict()
        apply_factories(state)
        shards += [
            (shard.key, shard.global_shape, shard.global_offset, shard.local_shape, shard.replica_id)
            for shard in nested_values(state)
            if isinstance(shard, ShardedTensor)
        ]
    return {"parameters": parameters, "shards": shards, "memory": measured_memory(model, optimizer)}


def measured_memory(model: list[Any], optimizer: Any) -> dict[str, int]:
    """Return the bytes that the weights, the gradient buffers and the optimizer's tensors hold.

    Before the first step Adam has no state; it will have two averages for each of its parameters.
    """
    frozen = sum(p.nbytes for chunk in model for p in chunk.parameters() if not p.requires_grad)
    buffers = [buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    state = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:  # nothing trains on this rank
            continue
        main = [p for group in part.shard_fp32_from_float16_groups for p in group]
        state += sum(p.nbytes for p in main)
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                tensors = part.optimizer.state.get(parameter) or {}
                averages = [value for value in tensors.values() if torch.is_tensor(value) and value.dim()]
                state += sum(average.nbytes for average in averages) if averages else 2 * parameter.nbytes
    return {
        "weights": frozen + sum(buffer.param_data.nbytes for buffer in buffers),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": state,
    }


def main() -> None:
    """Build each rank and describe it."""
    world_size, ranks, words = int(sys.argv[1]), [int(rank) for rank in sys.argv[2].split(",")], sys.argv[3:]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE="8")
    args, container = built_config(words)
    from megatron.training.global_vars import set_global_variables

    args.load = args.save = args.tensorboard_dir = None  # nothing is read or written
    set_global_variables(args, build_tokenizer=False)
    stay_on_meta()
    for rank in ranks:
        sys.stdout.write("RANK " + json.dumps({"rank": rank, **describe(*build_rank(args, container, rank))}) + "\n")


if __name__ == "__main__":
    main()
