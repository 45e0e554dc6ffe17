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

from mixmoe_megatron.checkpoint.health import whole_iteration
from mixmoe_megatron.checkpoint.megatron_checkpoint import RELEASE, TRACKER_FILE, iteration_directory
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.training.arguments import has_checkpoint
from mixmoe_megatron.training.hf_directories import is_hf_directory
from mixmoe_megatron.training.megatron_args import MegatronArgs
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


def check_start(args: MegatronArgs) -> None:
    """Refuse a damaged checkpoint before anything is built or written (one rank is enough).

    Args:
        args: Megatron's namespace: load, ckpt_step, and ours: init_from.

    Raises:
        MixMoEError: names the damaged file and how to take the newest iteration that is whole; or the optimizer's
            state is one that this run cannot take.
    """
    if args.load is not None and (Path(args.load) / TRACKER_FILE).exists():
        _check_optimizer_state(args, whole_iteration(args.load, args.ckpt_step, flag="--ckpt-step"))
    elif args.init_from is not None and not is_hf_directory(args.init_from):
        whole_iteration(args.init_from)


def _check_optimizer_state(args: MegatronArgs, iteration: Path) -> None:
    """Refuse a state of the other kind of optimizer: Megatron would fail in its middle, far from the reason."""
    if args.no_load_optim or args.finetune or iteration.name == RELEASE:
        return
    stored_as = dist_checkpointing.load_content_metadata(str(iteration)) or {}
    distributed = "distrib_optim_sharding_type" in stored_as
    if distributed != args.use_distributed_optimizer:
        with_or_without, other = ("with", "add") if distributed else ("without", "drop")
        raise MixMoEError(
            f"{iteration} was saved {with_or_without} --use-distributed-optimizer, which stores the optimizer's state "
            f"in another form: {other} this flag, or start with a fresh optimizer by --no-load-optim."
        )


def saved_run(args: MegatronArgs) -> dict[str, Any] | None:
    """Return what the checkpoint that this run goes on from says of it; None for a run that begins.

    Args:
        args: Megatron's validated namespace.

    Returns:
        Among others: args (the namespace then, with consumed_train_samples), iteration, opt_param_scheduler.

    Raises:
        MixMoEError: it cannot be read.
    """
    if args.load is None or args.finetune or not has_checkpoint(args.load):
        return None
    directory = iteration_directory(args.load, args.ckpt_step)
    if directory.name == RELEASE:
        return None
    with one_sentence(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: that it reads in one process
        return dist_checkpointing.load_common_state_dict(str(directory))


def is_finished(args: MegatronArgs, saved: dict[str, Any]) -> bool:
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


def check_schedule(args: MegatronArgs, saved: dict[str, Any] | None) -> None:
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


def keep_saved_rates(args: MegatronArgs, saved: dict[str, Any] | None) -> None:
    """With --use-checkpoint-opt_param-scheduler take the saved learning rates: the parameter groups hold them too.

    Args:
        args: Megatron's validated namespace; lr and min_lr are set.
        saved: see `saved_run`.
    """
    before = _saved_schedule(args, saved)
    if before is not None and args.use_checkpoint_opt_param_scheduler:
        args.lr, args.min_lr = before["max_lr"], before["min_lr"]


def _saved_schedule(args: MegatronArgs, saved: dict[str, Any] | None) -> dict[str, Any] | None:
    """The learning-rate schedule that the run would go on with; None where it takes none from the checkpoint."""
    return None if saved is None or args.no_load_optim else saved.get("opt_param_scheduler")


def _another_schedule(
    args: MegatronArgs, batch_size: int, schedule: dict[str, Any], before: dict[str, Any], differ: list[str]
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
