"""What a training run is refused for, in one sentence each: by this project, and by Megatron.

- `check_layout`, `check_loggers`: arguments that this project does not support, before anything is built. What concerns
  the model alone is refused by `config.check_transformer_config`, for users of Megatron's classes too. All other
  layouts of tensor, sequence, expert, expert tensor, pipeline (virtual stages too), context and data parallelism work;
  tests/distributed holds them to one process.
- `one_sentence`: what Megatron itself raises while it checks, builds and loads, with the flag's name where it is known.
  An error anywhere else is a defect and keeps its traceback; with MIXMOE_TRACEBACK=1 a sentence shows its own too
  (`cli.run_command`).
- `not_finite`: the end of a run whose loss is not a number.
"""

from __future__ import annotations

import importlib.util
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import megatron.core
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.nvrx import has_nvrx_async_support

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.machine import Machine, this_machine
from mixmoe_megatron.megatron_patches.saving import where_to_go_on
from mixmoe_megatron.model.config import Requirements, check_settings
from mixmoe_megatron.training.datasets import has_variable_lengths
from mixmoe_megatron.training.megatron_args import MegatronArgs

_OWN_DDP = "frozen groups and their checkpoints rest on Megatron's own DDP and distributed optimizer"
_OWN_MODEL = "the model is the one that the checkpoint's metadata describes"
_OWN_ORDER = "each validation takes the next --eval-iters batches of one stream of documents"
_OWN_DATA = "the data are what tools/preprocess_data.py made"

#: Megatron argument -> values that are supported, and why the others are not
_REQUIREMENTS: Requirements = {
    "use_megatron_fsdp": ((False,), _OWN_DDP),
    "use_torch_fsdp2": ((False,), _OWN_DDP),
    "optimizer": (("adam", "sgd"), "Muon and its kin expect matrices, the experts are one stacked weight"),
    "ckpt_format": (("torch_dist",), "every command of this project reads and writes torch_dist checkpoints"),
    "freeze_all_layers": ((False,), "the stage decides what is frozen"),
    "moe_use_upcycling": ((False,), "checkpoints_conversion/hf_to_mixmoe.py upcycles, mixed dense and MoE layers too"),
    "spec": ((None,), "the layers come from mixmoe_megatron.model.layer_specs"),
    "yaml_cfg": ((None,), "the checkpoint's metadata complete the command line"),
    "multi_latent_attention": ((False,), _OWN_MODEL),
    "hybrid_layer_pattern": ((None,), _OWN_MODEL),
    "heterogeneous_layers_config_path": ((None,), _OWN_MODEL),
    "heterogeneous_layers_config_encoded_json": ((None,), _OWN_MODEL),
    "hybrid_context_parallel": ((False,), "a sequence is split evenly over the context-parallel ranks"),
    "reset_attention_mask": ((False,), "attention is causal over the whole sequence, no mask is built"),
    "reset_position_ids": ((False,), "rotary positions count from the start of the sequence"),
    "sft": ((False,), _OWN_DATA),
    "fim_data": ((False,), _OWN_DATA),
    "mock_data": ((False,), _OWN_DATA),
    "full_validation": ((False,), _OWN_ORDER),
    "multiple_validation_sets": ((False,), _OWN_ORDER),
    "phase_transition_iterations": ((None,), "each phase would begin the documents anew"),
    "perform_rl_step": ((False,), "the loss is the cross-entropy of the paper"),
}


#: pattern of the code or the message that objects -> the sentence
_KNOWN = {
    r"assert args\.encoder_seq_length is not None$": "--seq-length is missing",
    r"assert args\.(\w+) is not None$": r"--\1 is missing",
    r"self\.lr_warmup_steps < self\.lr_decay_steps": (
        "the learning rate's warm-up must end before its schedule does: take fewer --lr-warmup-iters (or -samples, or "
        "a smaller --lr-warmup-fraction), or more steps (--train-iters, --lr-decay-iters)"
    ),
    r"self\.init_lr <= self\.max_lr": "--lr-warmup-init must not be greater than --lr",
    r"either train-iters or train-samples": "--train-iters is missing (or --train-samples)",
    r"eval_global_batch_size \((\d+)\) must be divisible by eval_micro_batch_size \((\d+)\).*\((\d+)\)": (
        r"--global-batch-size \1 must be a multiple of --micro-batch-size \2 times \3, the data-parallel processes (or "
        "so the sizes of --eval-global-batch-size and --eval-micro-batch-size)"
    ),
    r"world_size \((\d+)\) is not divisible by expert_tensor_model_pipeline_parallel size \((\d+)\)": (
        r"\1 processes are no multiple of \2, --expert-model-parallel-size times --expert-tensor-parallel-size times "
        "--pipeline-model-parallel-size"
    ),
    r"Failed to write dataset materials": "the order of the documents cannot be written to --data-cache-path",
}
_MEGATRON, _OURS = Path(megatron.core.__file__).parents[1], Path(__file__).parents[1]
_OBJECTIONS = (AssertionError, ValueError, RuntimeError, KeyError, ZeroDivisionError, CheckpointingException)


def check_layout(args: MegatronArgs) -> None:
    """Refuse what does not go with Mix-MoE in Megatron's arguments; call before Megatron completes them.

    Args:
        args: the parsed namespace.

    Raises:
        MixMoEError: one sentence with the reason.
    """
    check_settings(args, _REQUIREMENTS)
    if args.mixmoe_stage and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise MixMoEError(
            "--tensor-model-parallel-size > 1 needs --sequence-parallel: without it every tensor-parallel rank would "
            "send all tokens to the experts."
        )
    if args.hf_save is not None and (args.save is None or args.async_save):
        raise MixMoEError("--hf-save exports what --save has just written: it needs --save, and no --async-save.")
    if args.async_save and args.async_strategy == "nvrx" and not has_nvrx_async_support():
        raise MixMoEError(
            "--async-save uses nvidia-resiliency-ext, which is not installed here: install it, or add "
            "--async-strategy mcore --use-persistent-ckpt-worker."
        )
    _check_virtual_stages(args)
    _check_kernels(args, this_machine())


def _check_kernels(args: MegatronArgs, machine: Machine) -> None:
    """Refuse what the GPU and its libraries cannot do; they would say so in the first step, or nothing at all."""
    uses_te = machine.transformer_engine is not None and args.transformer_impl == "transformer_engine"
    if args.moe_permute_fusion and machine.transformer_engine is None:
        raise MixMoEError("--moe-permute-fusion needs a GPU and Transformer Engine: leave it out.")
    if args.pack and uses_te and machine.capability < (9, 0) and not machine.flash_attention:
        raise MixMoEError(
            "--pack: below compute capability 9.0 Transformer Engine attends to packed documents by flash-attn alone, "
            "which is not installed: install it, or add --transformer-impl local."
        )
    if args.tp_comm_overlap and has_variable_lengths(args):
        raise MixMoEError(
            "--tp-comm-overlap needs batches of one length, and those of parallel text vary: leave it out here."
        )


def _check_virtual_stages(args: MegatronArgs) -> None:
    """Megatron asserts it late, when the model is built, and without a word about the flags."""
    names = ("pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    uneven = any(getattr(args, name) is not None for name in names)
    uneven |= args.account_for_embedding_in_pipeline_split or args.account_for_loss_in_pipeline_split
    virtual, pipeline = args.num_virtual_stages_per_pipeline_rank, args.pipeline_model_parallel_size
    if virtual and not uneven and args.num_layers % (pipeline * virtual):
        raise MixMoEError(
            f"num_layers={args.num_layers} is not divisible by pipeline_model_parallel_size={pipeline} times "
            f"num_virtual_stages_per_pipeline_rank={virtual}: choose others, or say --pipeline-model-parallel-layout."
        )


def check_loggers(args: MegatronArgs) -> None:
    """Refuse Weights & Biases without what it needs: Megatron would fail when it opens it.

    Args:
        args: Megatron's namespace.

    Raises:
        MixMoEError: the package, or a directory to write to, is missing.
    """
    if not getattr(args, "wandb_project", None):
        return
    if not (args.wandb_save_dir or args.save):
        raise MixMoEError("--wandb-project needs a directory to write to: give --wandb-save-dir DIR, or --save.")
    if args.wandb_exp_name == "":
        raise MixMoEError("--wandb-project needs a name for the run: give --wandb-exp-name.")
    if importlib.util.find_spec("wandb") is None:
        raise MixMoEError(
            "--wandb-project needs the package wandb, which is not installed: install it, or leave it out."
        )


@contextmanager
def one_sentence(is_over: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn what Megatron objects to within the block into a MixMoEError.

    Args:
        is_over: asked when something is raised: whether the start-up is over, and errors are left as they are.

    Raises:
        MixMoEError: the sentence.
    """
    try:
        yield
    except MixMoEError:
        raise
    except Exception as error:
        if is_over() or not (isinstance(error, _OBJECTIONS) or type(error) is Exception) or not _is_megatrons(error):
            raise
        raise MixMoEError(_sentence(error)) from error


def _is_megatrons(error: Exception) -> bool:
    """Whether Megatron's code is the last that is not a library's."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    packages = [package for file in files for package in (_MEGATRON, _OURS) if file.is_relative_to(package)]
    return packages[-1:] == [_MEGATRON]


def _sentence(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line, message = frame.line or "", " ".join(str(error).split())
    for pattern, sentence in _KNOWN.items():
        if found := re.search(pattern, line) or re.search(pattern, message):
            return _as_flags(found.expand(sentence)) + "."
    if isinstance(error, AssertionError | ValueError) or type(error) is Exception:
        demand = _as_flags(re.sub(r"args\.(\w+)", r"--\1", line))
        reason = (message or f"it demands: {demand}").removesuffix(".")
        return f"Megatron refuses these arguments: {reason} (MIXMOE_TRACEBACK=1 shows where)."
    return (
        f"Megatron stopped before the first step ({type(error).__name__}: {message}); with MIXMOE_TRACEBACK=1 the same "
        "command shows where."
    )


def _as_flags(text: str) -> str:
    """Write the names of arguments as those of flags."""
    return re.sub(r"--\w+", lambda name: name.group().replace("_", "-"), text)


def not_finite(error: RuntimeError, args: MegatronArgs) -> MixMoEError | None:
    """Return the sentence for a loss or gradient that is not a finite number; None for another error.

    Args:
        error: raised while training.
        args: Megatron's namespace: save, and the steps done, curr_iteration.
    """
    found = re.search(r"Rank (\d+), .*: Unexpected result (\S+) \(message='(.*)'\)", str(error))
    if found is None:
        return None
    rank, value, what = found.groups()
    return MixMoEError(
        f"iteration {args.curr_iteration + 1} on rank {rank}: {what} ({value}). The learning rate may be too high "
        "(--lr, a longer --lr-warmup-iters, --clip-grad), or the weights that the run began with hold such values "
        f"(hf_to_mixmoe.py --check-finite tells); {where_to_go_on(args.save)}."
    )
