"""One training step of the engine outside `pretrain`: no checkpoint, no data files, several models in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import global_vars, initialize, training
from megatron.training.arguments import validate_args

from mixmoe_megatron.checkpoint.metadata import Metadata, write_metadata
from mixmoe_megatron.conversion.starts import describe_start
from mixmoe_megatron.megatron_patches.install import install
from mixmoe_megatron.methods.base import Phase
from mixmoe_megatron.methods.registry import PHASES
from mixmoe_megatron.model.frozen_prefix import set_frozen_prefix
from mixmoe_megatron.training.arguments import parse_arguments
from mixmoe_megatron.training.megatron_args import MegatronArgs
from mixmoe_megatron.training.pretrain import stand_alone_environment
from mixmoe_megatron.training.run import build_config
from mixmoe_megatron.training.startup import freeze_and_report
from mixmoe_megatron.training.step import forward_step


def random_batch(vocab_size: int, batch_size: int, seq_length: int, loss_share: float = 1.0) -> dict[str, torch.Tensor]:
    """Return a batch of random tokens, as a data iterator gives it; [B, S] each.

    Args:
        vocab_size: of the tokens.
        batch_size: B.
        seq_length: S.
        loss_share: of each sequence's tokens, its last ones, those that count in the loss.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (batch_size, seq_length + 1), generator=generator)
    positions = torch.arange(seq_length).expand(batch_size, seq_length)
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": (positions >= round(seq_length * (1 - loss_share))).float(),
        "position_ids": positions,
    }


def engine_step(
    hf_config: dict[str, Any],
    batch: dict[str, torch.Tensor],
    phase: Phase,
    flags: str = "",
    frozen_prefix: bool = True,
) -> Callable[[], None]:
    """Build a randomly initialised model as the training command does and return Megatron's `train_step` of it.

    Call `prepare_megatron` first. The returned step is forward, backward, gradient clipping at 1 and AdamW. The models
    of one process share Megatron's process groups; each step puts its own arguments in place.

    Args:
        hf_config: config.json of the dense base.
        batch: what `step.get_batch` reads of a data iterator; tensors [B, S].
        phase: to train.
        flags: more flags of the training command.
        frozen_prefix: False: build a graph from the embedding upwards, as trainers of frozen models usually do.

    Raises:
        MixMoEError: the config is not of a supported dense model.
    """
    stand_alone_environment()
    args = _arguments(hf_config, batch["tokens"].shape, phase, flags)
    _start_megatron(args)
    install(args, saving=False)
    container = build_config(args)
    container.model.pre_wrap_hooks[:] = [partial(freeze_and_report, phase=phase, dry_run=False)]  # no parent to load
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model, optimizer, scheduler = training.setup_model_and_optimizer(
        None, cfg_container=container, pg_collection=groups
    )
    config = training.get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    model[0].train()
    if not frozen_prefix:
        _build_graph_from_the_bottom(get_attr_wrapped_model(model[0], "decoder", return_model_obj=True))

    def step() -> None:
        global_vars.set_args(args)
        data, schedule = RerunDataIterator(iter([batch])), get_forward_backward_func()
        training.train_step(forward_step, data, model, optimizer, scheduler, config, schedule, iteration=1)

    return step


def _start_megatron(args: MegatronArgs) -> None:
    """Start Megatron in this process with these arguments; a second time, only put them in place."""
    if torch.distributed.is_initialized():
        global_vars.set_args(args)
        return
    global_vars.set_global_variables(args, build_tokenizer=False)
    initialize.initialize_megatron(allow_no_cuda=True)


def _build_graph_from_the_bottom(model: Any) -> None:
    """Undo `frozen_prefix.py` and make the embedding's output require grad."""
    set_frozen_prefix(model.decoder, None)
    model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


def _arguments(hf_config: dict[str, Any], shape: torch.Size, phase: Phase, flags: str) -> MegatronArgs:
    """Megatron's validated arguments, completed from the metadata of a parent that holds nothing else."""
    model = describe_start(hf_config, PHASES[phase.starts_from[0]])
    with tempfile.TemporaryDirectory() as parent:
        write_metadata(parent, Metadata(model.phase, model.recorded_options(), model.megatron_args, model.hf_config))
        line = f"--phase {phase.name} --init-from {parent} --seq-length {shape[1]} --micro-batch-size {shape[0]} "
        line += f"--global-batch-size {shape[0]} --lr 1e-4 --clip-grad 1.0 --train-iters 100000 {flags}"
        args, _ = parse_arguments(line.split())
    validate_args(args, {})
    return args
