"""The training program: complete the command line, build the Mix-MoE model config, call stock Megatron."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixmoe_megatron.checkpoint.metadata import Metadata
from mixmoe_megatron.machine import order_device_queues, prepare_megatron
from mixmoe_megatron.megatron_patches.cpu_mode import enable_cpu_mode
from mixmoe_megatron.methods.registry import STAGES

logger = logging.getLogger(__name__)


def main() -> None:
    """Run one stage of training; the command line is Megatron's plus `arguments.add_mixmoe_args`.

    Raises:
        MixMoEError: a wrong checkpoint, data file or option; one sentence.
    """
    stand_alone_environment()
    order_device_queues(sys.argv[1:])
    enable_cpu_mode()
    prepare_megatron()
    with warnings.catch_warnings():  # Megatron's optional packages, on import
        warnings.simplefilter("ignore")
        from megatron.training.arguments import parse_args
        from megatron.training.global_vars import set_global_variables

    from mixmoe_megatron.megatron_patches.saving import check_start
    from mixmoe_megatron.training.arguments import add_mixmoe_args, apply_options, complete_arguments
    from mixmoe_megatron.training.datasets import configure_data, tell_of_another_order
    from mixmoe_megatron.training.going_on import check_schedule, is_finished, saved_run
    from mixmoe_megatron.training.refusals import check_loggers, one_sentence
    from mixmoe_megatron.training.startup import check_save_directory

    if {"-h", "--help"} & set(sys.argv[1:]):
        parse_args(add_mixmoe_args)  # prints the flags and exits
    words, metadata = complete_arguments(sys.argv[1:])
    sys.argv[1:] = words
    args = parse_args(add_mixmoe_args)
    apply_options(args, metadata)
    if not args.dry_run:
        configure_data(args)
    config = checked_config(args)
    check_loggers(args)
    check_save_directory(args.save, args.mixmoe_stage)
    with one_sentence():
        set_global_variables(args, build_tokenizer=False)
    if args.rank == 0:
        check_start(args)
    saved = saved_run(args)
    if saved is not None and is_finished(args, saved):
        logger.info("--load %s holds iteration %d: nothing is left to train", args.load, saved["iteration"])
        return
    check_schedule(args, saved)
    if saved is not None and args.rank == 0:
        tell_of_another_order(metadata.data, STAGES[args.mixmoe_stage].name)
    _train(args, config, metadata)


def _train(args: Any, config: Any, metadata: Metadata) -> None:
    """Hand over to Megatron, with what this project changes in it."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    from mixmoe_megatron.megatron_patches.resume import mend_optimizers
    from mixmoe_megatron.megatron_patches.saving import not_finite, secure_saving, where_to_go_on
    from mixmoe_megatron.megatron_patches.throughput import install_metrics
    from mixmoe_megatron.training.arguments import has_checkpoint
    from mixmoe_megatron.training.datasets import datasets_provider, training_data
    from mixmoe_megatron.training.hf_directories import export_after_saves
    from mixmoe_megatron.training.refusals import one_sentence
    from mixmoe_megatron.training.startup import prepare_save_directory
    from mixmoe_megatron.training.step import forward_step

    source = Path(args.load if args.load and has_checkpoint(Path(args.load)) else args.init_from)
    data = [] if args.dry_run else training_data(args, STAGES[args.mixmoe_stage].name)

    def provide_datasets(num_samples: Sequence[int], vp_stage: int | None = None) -> Any:
        """Build the data, which is the last that may be refused; only then is anything written."""
        splits = datasets_provider(num_samples, vp_stage)
        if args.rank == 0:
            prepare_save_directory(args.save, source, metadata, args.mixmoe_stage, data)
        return splits

    provide_datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank calls it
    install_metrics(args)
    mend_optimizers()
    secure_saving(args)
    export_after_saves(args)
    try:
        with one_sentence(is_over=lambda: hasattr(args, "do_train")):
            pretrain(config, provide_datasets, ModelType.encoder_or_decoder, forward_step)
    except RuntimeError as error:
        if sentence := not_finite(error, args):
            raise sentence from error
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f": {where_to_go_on(args.save)}." if args.rank == 0 else "") from None


def stand_alone_environment() -> None:
    """Without torchrun (no RANK), be a job of one process on a free port of this machine."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))


def checked_config(args: Any) -> Any:
    """Have the arguments checked, by this project and by Megatron (which completes them), and build the config of them.

    Args:
        args: the parsed namespace, options applied.

    Returns:
        A PretrainConfigContainer.

    Raises:
        MixMoEError: an argument, or what several ask for together, is not supported; one sentence.
    """
    from megatron.training.arguments import validate_args

    from mixmoe_megatron.training.datasets import has_variable_lengths
    from mixmoe_megatron.training.layout_refusals import check_layout
    from mixmoe_megatron.training.refusals import one_sentence

    check_layout(args)
    with one_sentence():
        validate_args(args, {})
        args.variable_seq_lengths = args.pipeline_model_parallel_size > 1 and has_variable_lengths(args)
        return build_config(args)


def build_config(args: Any) -> Any:
    """Build Megatron's config container with the Mix-MoE model and its start-up hooks.

    Args:
        args: Megatron's validated namespace, options applied.

    Returns:
        A PretrainConfigContainer.

    Raises:
        MixMoEError: the options contradict each other or Megatron's settings.
    """
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import core_transformer_config_from_args

    from mixmoe_megatron.model.config import MixMoETransformerConfig
    from mixmoe_megatron.model.layer_specs import mixmoe_decoder_block_spec

    transformer = core_transformer_config_from_args(args, config_class=MixMoETransformerConfig)
    model = gpt_config_from_args(args, config=transformer)
    model.transformer_layer_spec = mixmoe_decoder_block_spec
    add_hooks(model, args)
    return pretrain_cfg_container_from_args(args, model)


def add_hooks(model_config: Any, args: Any) -> None:
    """Give Megatron's model config what must happen before the first step: load the parent, freeze, guard.

    Args:
        model_config: a GPTModelConfig with a MixMoETransformerConfig.
        args: Megatron's validated namespace, options applied.
    """
    from mixmoe_megatron.training.arguments import has_checkpoint
    from mixmoe_megatron.training.startup import (
        freeze_and_report,
        guard_first_gradient,
        leave_out_padding_rows,
        load_parent,
    )

    stage = args.mixmoe_stage
    model_config.transformer.finalize_model_grads_func = guard_first_gradient(stage)
    model_config.rope_scaling_factor = args.rope_scaling_factor
    model_config.rotary_base = args.rotary_base
    resumes = args.load is not None and has_checkpoint(Path(args.load))
    if not resumes:
        model_config.pre_wrap_hooks.append(load_parent(Path(args.init_from), stage))
    model_config.pre_wrap_hooks.append(leave_out_padding_rows(args.vocab_size))
    model_config.pre_wrap_hooks.append(freeze_and_report(stage, dry_run=args.dry_run))
