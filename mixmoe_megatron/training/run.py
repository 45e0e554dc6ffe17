"""One training run, from its command line to its last checkpoint, in the order in which it happens (`run`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
from megatron.training.global_vars import set_global_variables

from mixmoe_megatron.checkpoint.metadata import Metadata
from mixmoe_megatron.megatron_patches.install import install
from mixmoe_megatron.megatron_patches.saving import where_to_go_on
from mixmoe_megatron.model.config import MixMoETransformerConfig
from mixmoe_megatron.model.layer_specs import mixmoe_decoder_block_spec
from mixmoe_megatron.training import arguments, datasets, going_on, refusals, startup
from mixmoe_megatron.training.hf_directories import export_iteration
from mixmoe_megatron.training.lpr_step import LPRStep
from mixmoe_megatron.training.megatron_args import MegatronArgs
from mixmoe_megatron.training.retention import RetentionCurve
from mixmoe_megatron.training.step import forward_step

logger = logging.getLogger(__name__)


def run(words: list[str]) -> None:
    """Parse, check, look at what there is to go on from, change Megatron, train.

    Args:
        words: the command line, without the program's name.

    Raises:
        MixMoEError: a wrong checkpoint, data file or option; one sentence. Nothing is written before all is checked.
    """
    if {"-h", "--help"} & set(words):
        parse_args(arguments.add_mixmoe_args)  # prints the flags and exits
    args, metadata = arguments.parse_arguments(words)
    config = _check(args)
    if _is_work_left(args, metadata):
        curve = RetentionCurve(args) if args.eval_mono and not args.dry_run else None
        measurement = None if curve is None else (curve.measure, curve.interval)
        install(args, after_save=partial(_after_save, args), measurement=measurement)
        _train(args, config, metadata)


def _check(args: MegatronArgs) -> Any:
    """Check data, arguments and the directory to write to; give Megatron its arguments. Returns its config."""
    if not args.dry_run:
        datasets.configure_data(args)
    config = checked_config(args)
    refusals.check_loggers(args)
    startup.check_save_directory(args.save, arguments.phase_of_run(args))
    with refusals.one_sentence():
        set_global_variables(args, build_tokenizer=False)
    return config


def _is_work_left(args: MegatronArgs, metadata: Metadata) -> bool:
    """Check the checkpoint that the run begins with or goes on from; tell if it holds the last step already."""
    if args.rank == 0:
        going_on.check_start(args)
    saved = going_on.saved_run(args)
    if saved is not None and going_on.is_finished(args, saved):
        logger.info("--load %s holds iteration %d: nothing is left to train", args.load, saved["iteration"])
        return False
    going_on.check_schedule(args, saved)
    if saved is not None and args.rank == 0:
        datasets.tell_of_another_order(metadata.data, args.phase)
    return True


def _train(args: MegatronArgs, config: Any, metadata: Metadata) -> None:
    """Hand over to Megatron, and tell how training ended if it did not end well."""
    source = arguments.source_directory(args)
    data = [] if args.dry_run else datasets.training_data(args, args.phase)

    def provide_datasets(num_samples: Sequence[int], vp_stage: int | None = None) -> Any:
        """Build the data, which is the last that may be refused; only then is anything written."""
        splits = datasets.datasets_provider(num_samples, vp_stage)
        if args.rank == 0:
            startup.prepare_save_directory(args.save, source, metadata, arguments.phase_of_run(args), data)
        return splits

    provide_datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank calls it
    try:
        with refusals.one_sentence(is_over=lambda: hasattr(args, "do_train")):
            pretrain(
                config, provide_datasets, ModelType.encoder_or_decoder, LPRStep() if args.lpr_coeff else forward_step
            )
    except RuntimeError as error:
        if sentence := refusals.not_finite(error, args):
            raise sentence from error
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f": {where_to_go_on(args.save)}." if args.rank == 0 else "") from None


def _after_save(args: MegatronArgs, iteration: int) -> None:
    if args.hf_save is not None and args.save is not None:
        export_iteration(args.save, args.hf_save, iteration)


def checked_config(args: MegatronArgs) -> Any:
    """Have the arguments checked, by this project and by Megatron (which completes them), and build the config of them.

    Args:
        args: the parsed namespace, options applied.

    Returns:
        A PretrainConfigContainer.

    Raises:
        MixMoEError: an argument, or what several ask for together, is not supported; one sentence.
    """
    refusals.check_layout(args)
    with refusals.one_sentence():
        validate_args(args, {})
        args.variable_seq_lengths = args.pipeline_model_parallel_size > 1 and datasets.has_variable_lengths(args)
        return build_config(args)


def build_config(args: MegatronArgs) -> Any:
    """Build Megatron's config container with the Mix-MoE model and its start-up hooks.

    Args:
        args: Megatron's validated namespace, options applied.

    Returns:
        A PretrainConfigContainer.

    Raises:
        MixMoEError: the options contradict each other or Megatron's settings.
    """
    transformer = core_transformer_config_from_args(args, config_class=MixMoETransformerConfig)
    model = gpt_config_from_args(args, config=transformer)
    model.transformer_layer_spec = mixmoe_decoder_block_spec
    add_hooks(model, args)
    return pretrain_cfg_container_from_args(args, model)


def add_hooks(model_config: Any, args: MegatronArgs) -> None:
    """Give Megatron's model config what must happen before the first step: load the parent, freeze, guard.

    Args:
        model_config: a GPTModelConfig with a MixMoETransformerConfig.
        args: Megatron's validated namespace, options applied.
    """
    phase = arguments.phase_of_run(args)
    model_config.transformer.finalize_model_grads_func = startup.guard_first_gradient(phase)
    model_config.rope_scaling_factor = args.rope_scaling_factor
    model_config.rotary_base = args.rotary_base
    hooks = model_config.pre_wrap_hooks
    if not arguments.has_checkpoint(args.load):
        hooks.append(partial(startup.load_parent, directory=arguments.source_directory(args), phase=phase))
    hooks.append(partial(startup.leave_out_padding_rows, vocab_size=args.vocab_size))
    hooks.append(partial(startup.freeze_and_report, phase=phase, dry_run=args.dry_run))
