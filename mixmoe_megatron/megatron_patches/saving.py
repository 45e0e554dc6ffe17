"""Saving that survives a kill, a full disk and Ctrl-C at any moment.

What Megatron 0.19.2 does and what is changed here:

- It writes over an iteration that is there already: files of two saves would lie side by side under one `.metadata`.
  The old one is removed first, and the tracker never names it meanwhile.
- It truncates the tracker file, then writes it: here it is replaced in one step.
- It starts a helper process for the results even of synchronous saves; a killed rank leaves it running for ever.
  A queue inside the process serves as well, and a run starts seconds sooner.
- A failed write ends in tracebacks that lack the reason: here in one sentence.

Source: `megatron.training.training.save_checkpoint` and `maybe_finalize_async_save`, `megatron.training.checkpointing`,
`megatron.core.dist_checkpointing.strategies.filesystem_async`; found by killing runs with megatron-core 0.19.2.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import queue
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.training import checkpointing, get_args, training
from torch.distributed.checkpoint.api import CheckpointException

from mixmoe_megatron.checkpoint.megatron_checkpoint import TRACKER_FILE, iteration_directory
from mixmoe_megatron.cli import whole_file
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.megatron_patches.wrapping import wrap

logger = logging.getLogger(__name__)


def secure_saving(after_save: Callable[[int], None]) -> None:
    """Change Megatron's saving as told at the top of this module. Call it before `pretrain`.

    Args:
        after_save: called on all ranks with the number of each iteration that has been saved.
    """
    wrap(training, "save_checkpoint", functools.partial(_save, after_save))
    if MultiStorageClientFeature.is_enabled():
        return  # object stores have no partial files
    wrap(training, "maybe_finalize_async_save", _finalize)
    wrap(filesystem_async, "get_write_results_queue", _results_queue)
    if not isinstance(checkpointing.maybe_msc, _Files):
        checkpointing.maybe_msc = _Files(checkpointing.maybe_msc)


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


def _save(
    after_save: Callable[[int], None], save_checkpoint: Callable[..., None], iteration: int, *rest: Any, **kwargs: Any
) -> None:
    """Save over nothing, and tell a failure in one sentence; then do what is to be done after each save."""
    is_temporary = kwargs.get("non_persistent_ckpt")
    if MultiStorageClientFeature.is_enabled():
        save_checkpoint(iteration, *rest, **kwargs)
    else:
        with _told_failures():
            if is_temporary or _make_room(iteration):
                save_checkpoint(iteration, *rest, **kwargs)
    if not is_temporary:
        after_save(iteration)


def _finalize(finalize: Callable[..., None], *rest: Any, **kwargs: Any) -> None:
    with _told_failures():
        finalize(*rest, **kwargs)


def _results_queue(get_queue: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
    return get_queue(*rest, **kwargs) if get_args().async_save else _queue_in_this_process()


@functools.cache
def _queue_in_this_process() -> queue.SimpleQueue[Any]:
    return queue.SimpleQueue()


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


def _make_room(iteration: int) -> bool:
    """Remove what is left of an iteration that is to be saved. False: it is what this run has loaded, and stays."""
    args = get_args()
    loaded = checkpointing.get_loaded_iteration() if args.load == args.save else None
    if iteration == loaded:
        return False
    if torch.distributed.get_rank() == 0:
        _remove_iteration(Path(args.save), iteration, loaded)
    torch.distributed.barrier()
    return True


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


@contextmanager
def _told_failures() -> Iterator[None]:
    """Turn what goes wrong while a checkpoint is written into a MixMoEError."""
    reason, log = _LastError(), logging.getLogger(filesystem_async.__name__)
    log.addHandler(reason)
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        raise MixMoEError(_failure(error, reason.text, get_args().save)) from error
    finally:
        log.removeHandler(reason)


def _failure(error: BaseException, logged: str, save: str) -> str:
    elsewhere = isinstance(error, CheckpointException)
    why = logged.rpartition("error: ")[2] or ("another rank tells why" if elsewhere else str(error))
    free = shutil.disk_usage(save).free / 1e6
    full = os.strerror(errno.ENOSPC)
    if free < 1 and full not in why:
        why = f"{full} ({why})"  # torch's writer tells another error than the system's when its end fails too
    return f"saving to {save} failed: {why} ({free:,.1f} MB are free there); {where_to_go_on(save)}."
