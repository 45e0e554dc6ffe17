"""Mix-MoE in an unmodified Megatron-LM script: `--spec mixmoe_megatron.integrations.stock_megatron stage1`.

Megatron's model builder calls the object that --spec names as `spec(model_config, vp_stage=...)`, before it runs the
model's pre-wrap hooks, builds the optimizer and loads a checkpoint. That call is where the script becomes a Mix-MoE
run: the options come from the checkpoint's metadata, and the hooks that load the parent and freeze are put in place.

- `--pretrained-checkpoint DIR`: the parent, upcycled for stage 1, stage 1 for stage 2 (its MT group starts as the LM
  group). Loaded under any parallel layout.
- `--load DIR`: a run of the same stage to go on with; Megatron loads it. While it holds none, the parent is loaded.

`stock_flags` gives the flags of the model and the machine; data, loss and logging intervals remain the script's own.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training import get_args

from mixmoe_megatron.data.tokenizers import check_number_of_ids, count_ids
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.machine import check_megatron_version, this_machine
from mixmoe_megatron.megatron_patches.install import install
from mixmoe_megatron.methods.registry import STAGES
from mixmoe_megatron.model.config import check_transformer_config
from mixmoe_megatron.model.layer_specs import mixmoe_decoder_block_spec
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.training.arguments import (
    apply_options,
    has_checkpoint,
    model_arguments,
    set_phase,
    source_checkpoint,
)
from mixmoe_megatron.training.going_on import keep_saved_rates, saved_run
from mixmoe_megatron.training.run import add_hooks
from mixmoe_megatron.training.startup import prepare_save_directory


def stage1(model_config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the decoder of stage 1, and make the script that builds it a run of stage 1.

    Args:
        model_config: Megatron's GPTModelConfig.
        vp_stage: virtual pipeline stage.

    Raises:
        MixMoEError: no checkpoint to start from, one of the wrong stage, or flags that contradict its options.
    """
    return _decoder(model_config, 1, vp_stage)


def stage2(model_config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the decoder of stage 2, and make the script that builds it a run of stage 2; see `stage1`."""
    return _decoder(model_config, 2, vp_stage)


def stock_flags(stage: int, words: list[str]) -> list[str]:
    """Return the flags of the model, its tokenizer and this machine's GPU, which a stock script needs beside its own.

    Args:
        stage: 1 or 2.
        words: the user's flags; of them --pretrained-checkpoint, --load and --tensor-model-parallel-size matter.

    Raises:
        MixMoEError: as `stage1`.
    """
    own = ["--init-from" if word == "--pretrained-checkpoint" else word for word in words]
    model, _ = model_arguments(["--mixmoe-stage", str(stage), *own])
    machine = this_machine()
    return model if machine.gpu is None else machine.flags() + model


def _decoder(model_config: Any, stage: int, vp_stage: int | None) -> TransformerBlockSubmodules:
    if not hasattr(model_config.transformer, "mixmoe_stage"):  # the first model chunk
        _become_mixmoe_run(model_config, stage)
    return mixmoe_decoder_block_spec(model_config, vp_stage=vp_stage)


def _become_mixmoe_run(model_config: Any, stage: int) -> None:
    check_megatron_version()
    args = get_args()
    parent = args.pretrained_checkpoint
    if parent is None and not has_checkpoint(args.load):
        raise MixMoEError(
            f"stage {stage} needs --pretrained-checkpoint DIR, the checkpoint to start from, or --load DIR, a run of "
            "this stage to go on with."
        )
    if args.finetune:
        raise MixMoEError("--finetune would start from --load: give that checkpoint as --pretrained-checkpoint.")
    source, metadata = source_checkpoint(args.load, parent, STAGES[stage])
    # What `arguments.add_mixmoe_args` would have parsed.
    set_phase(args, STAGES[stage])
    vars(args).update(init_from=parent, experts_backend="auto", dry_run=False, upcycle_options=None, lpr_coeff=0.0)
    args.vocab_size = metadata.megatron_args["vocab_size"] if args.vocab_size is None else args.vocab_size
    apply_options(args, metadata)
    ids = count_ids(args.tokenizer_model) if args.tokenizer_model else None
    if ids is not None:
        check_number_of_ids(f"The tokenizer in {args.tokenizer_model}", ids, metadata.megatron_args["vocab_size"])
    config, options = model_config.transformer, MixMoEOptions.from_dict(metadata.options or {})
    # In place: Megatron's wrappers hold this very object already.
    vars(config).update(
        options.to_dict(), mixmoe_stage=stage, experts_backend="auto", moe_grouped_gemm=True, lpr_coeff=0.0,
        lpr_impl="paper",
    )  # fmt: skip
    config.seed = args.seed
    check_transformer_config(config)
    add_hooks(model_config, args)
    args.pretrained_checkpoint = None  # a hook loads it; Megatron knows neither MT := LM nor other stages' keys
    if args.rank == 0:
        prepare_save_directory(args.save, source, metadata, STAGES[stage])
    if args.use_checkpoint_opt_param_scheduler:
        keep_saved_rates(args, saved_run(args))
    install(args, saving=False)
