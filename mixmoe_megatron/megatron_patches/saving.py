"""Saving that survives a kill, a full disk and Ctrl-C at any moment.

What Megatron 0.19.2 does and what is changed here:

- It writes over an iteration that is there already: files of two saves would lie side by side under one `.metadata`.
  The old one is removed first, and the tracker never names it meanwhile.
- It truncates the tracker file, then writes it: here it is replaced in one step.
- It starts a helper process for the results even of synchronous saves; a killed rank leaves it running for ever.
  A queue inside the process serves as well, and a run starts seconds sooner.
- A failed write ends in tracebacks that lack the reason: here in one sentence.

Source: none in the paper; found by killing runs with megatron-core 0.19.2.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import queue
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.training import checkpointing, training
from torch.distributed.checkpoint.api import CheckpointException

from mixmoe_megatron.checkpoint.health import whole_iteration
from mixmoe_megatron.checkpoint.megatron_checkpoint import RELEASE, TRACKER_FILE, iteration_directory
from mixmoe_megatron.cli import whole_file
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.training.hf_directories import is_hf_directory

logger = logging.getLogger(__name__)


def check_start(args: Any) -> None:
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


def _check_optimizer_state(args: Any, iteration: Path) -> None:
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


def secure_saving(args: Any) -> None:
    """Change Megatron's saving as told at the top of this module. Call once, before `pretrain`.

    Args:
        args: Megatron's validated namespace.
    """
    if MultiStorageClientFeature.is_enabled():
        return  # object stores have no partial files
    if not args.async_save:
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        filesystem_async.get_write_results_queue = lambda *_: results
    checkpointing.maybe_msc = _Files(checkpointing.maybe_msc)
    reason = _LastError()
    logging.getLogger(filesystem_async.__name__).addHandler(reason)
    training.save_checkpoint = _tell_failures(_save_over_nothing(training.save_checkpoint, args), args, reason)
    training.maybe_finalize_async_save = _tell_failures(training.maybe_finalize_async_save, args, reason)


def where_to_go_on(save: str | None) -> str:
    """Tell, for a run that has been stopped, what is saved.

    Args:
        save: --save.
    """
    try:
        newest = iteration_directory(save or "").name
    except MixMoEError:
        return "nothing has been saved"
    return f"{newest} in {save} is saved, and the same command goes on from there"


def not_finite(error: RuntimeError, args: Any) -> MixMoEError | None:
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


class _Files:
    """Megatron's file access, except that the tracker file is replaced in one step."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        if mode == "w" and Path(path).name == TRACKER_FILE:
            return whole_file(path)
        return self._original.open(path, mode, **kwargs)


class _LastError(logging.Handler):
    """Remembers the last error: Megatron logs why a file could not be written, and raises without it."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR and not self.text:
            self.text = record.getMessage()


def _save_over_nothing(save_checkpoint: Callable[..., None], args: Any) -> Callable[..., None]:
    @functools.wraps(save_checkpoint)
    def save(iteration: int, *rest: Any, **kwargs: Any) -> None:
        if not kwargs.get("non_persistent_ckpt"):
            loaded = checkpointing.get_loaded_iteration() if args.load == args.save else None
            if iteration == loaded:
                return
            if torch.distributed.get_rank() == 0:
                _remove_iteration(Path(args.save), iteration, loaded)
            torch.distributed.barrier()
        save_checkpoint(iteration, *rest, **kwargs)

    return save


def _remove_iteration(root: Path, iteration: int, previous: int | None) -> None:
    """Remove what is left of an iteration; a tracker that names it goes back to the one that this run came from."""
    directory = Path(checkpointing.get_checkpoint_name(root, iteration, return_base_dir=True))
    if not directory.exists():
        return
    tracker = root / TRACKER_FILE
    if tracker.is_file() and tracker.read_text(encoding="utf-8").strip() == str(iteration):
        if previous:
            with whole_file(tracker) as stream:
                stream.write(str(previous))
        else:
            tracker.unlink()
    logger.warning("%s is there already, from a run that was stopped or taken back: it is replaced", directory)
    shutil.rmtree(directory)


def _tell_failures(function: Callable[..., None], args: Any, reason: _LastError) -> Callable[..., None]:
    @functools.wraps(function)
    def told(*rest: Any, **kwargs: Any) -> None:
        try:
            function(*rest, **kwargs)
        except MixMoEError:
            raise
        except (OSError, RuntimeError, CheckpointException) as error:
            elsewhere = isinstance(error, CheckpointException)
            why = reason.text.rpartition("error: ")[2] or ("another rank tells why" if elsewhere else str(error))
            free = shutil.disk_usage(args.save).free / 1e6
            full = os.strerror(errno.ENOSPC)
            if free < 1 and full not in why:
                why = f"{full} ({why})"  # torch's writer tells another error than the system's when its end fails too
            raise MixMoEError(
                f"saving to {args.save} failed: {why} ({free:,.1f} MB are free there); {where_to_go_on(args.save)}."
            ) from error

    return told
