"""Whether and how a run can go on from its checkpoint: what is left of it, and its learning-rate schedule.

All is asked before anything is built or written. Megatron would assert it after the weights are loaded, or end in the
middle of the last steps.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.core import dist_checkpointing
from megatron.training import training
from megatron.training.global_vars import set_args

from mixmoe_megatron.checkpoint.megatron_checkpoint import RELEASE, iteration_directory
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.training.arguments import has_checkpoint
from mixmoe_megatron.training.refusals import one_sentence

#: a field of the schedule -> the flags that it comes from
_FLAGS = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "--lr-warmup-iters, -samples, -fraction",
    "lr_decay_steps": "--train-iters, --train-samples, --lr-decay-iters",
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "--weight-decay, --start-weight-decay",
    "end_wd": "--weight-decay, --end-weight-decay",
    "wd_incr_steps": "--train-iters, --train-samples",
    "wd_incr_style": "--weight-decay-incr-style",
}


def saved_run(args: Any) -> dict[str, Any] | None:
    """Return what the checkpoint that this run goes on from says of it; None for a run that begins.

    Args:
        args: Megatron's validated namespace.

    Returns:
        Among others: args (the namespace then, with consumed_train_samples), iteration, opt_param_scheduler.

    Raises:
        MixMoEError: it cannot be read.
    """
    if args.load is None or args.finetune or not has_checkpoint(Path(args.load)):
        return None
    directory = iteration_directory(args.load, args.ckpt_step)
    if directory.name == RELEASE:
        return None
    with one_sentence(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: that it reads in one process
        return dist_checkpointing.load_common_state_dict(str(directory))


def is_finished(args: Any, saved: dict[str, Any]) -> bool:
    """Whether the run has all its steps or samples, so that nothing is left to train.

    Args:
        args: Megatron's validated namespace.
        saved: see `saved_run`.
    """
    if args.skip_train or args.dry_run:
        return False
    if args.train_samples:
        return args.train_samples - saved["args"].consumed_train_samples < args.global_batch_size
    return bool(args.train_iters) and saved["iteration"] >= args.train_iters


def check_schedule(args: Any, saved: dict[str, Any] | None) -> None:
    """Refuse a learning-rate schedule that cannot be, or that is not the one that the run was begun with.

    Args:
        args: Megatron's validated namespace, which is its global one too.
        saved: see `saved_run`.

    Raises:
        MixMoEError: names the flags that differ, and those that say which schedule to take.
    """
    if args.skip_train or args.dry_run:
        return
    if args.lr is None:
        raise MixMoEError("--lr is missing: give the learning rate.")
    set_args(copy.copy(args))  # Megatron completes it on the way, and would complete it otherwise the second time
    try:
        with one_sentence(), contextlib.redirect_stdout(io.StringIO()):
            schedule = training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[])).state_dict()
    finally:
        set_args(args)
    keep_saved_rates(args, saved)
    before = _saved_schedule(args, saved)
    if saved is None or before is None or args.use_checkpoint_opt_param_scheduler or args.override_opt_param_scheduler:
        return
    differ = [name for name in _FLAGS if schedule[name] != before[name]]
    if differ:
        raise MixMoEError(_another_schedule(args, saved["args"].global_batch_size, schedule, before, differ))


def keep_saved_rates(args: Any, saved: dict[str, Any] | None) -> None:
    """With --use-checkpoint-opt_param-scheduler take the saved learning rates: the parameter groups hold them too.

    Args:
        args: Megatron's validated namespace; lr and min_lr are set.
        saved: see `saved_run`.
    """
    before = _saved_schedule(args, saved)
    if before is not None and args.use_checkpoint_opt_param_scheduler:
        args.lr, args.min_lr = before["max_lr"], before["min_lr"]


def _saved_schedule(args: Any, saved: dict[str, Any] | None) -> dict[str, Any] | None:
    """The learning-rate schedule that the run would go on with; None where it takes none from the checkpoint."""
    return None if saved is None or args.no_load_optim else saved.get("opt_param_scheduler")


def _another_schedule(
    args: Any, batch_size: int, schedule: dict[str, Any], before: dict[str, Any], differ: list[str]
) -> str:
    """Say what differs. A change of the batch size alone stretches all that is counted in samples."""
    told = [f"{before[name]} {name} there, {schedule[name]} here ({_FLAGS[name]})" for name in differ]
    batch = ""
    if batch_size != args.global_batch_size:
        batch = (
            f" It ran with --global-batch-size {batch_size}, this one has {args.global_batch_size} (if not given: the "
            "micro-batch size times the data-parallel processes)."
        )
    return (
        f"--load {args.load} holds a run with another learning-rate schedule, in samples: {'; '.join(told)}.{batch} "
        "Give what it had, or add --override-opt-param-scheduler to take the schedule of now, or "
        "--use-checkpoint-opt_param-scheduler to keep that of then."
    )
