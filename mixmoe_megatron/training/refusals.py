"""What Megatron objects to before the first step, as one sentence that names the flag where it is known.

Only what Megatron itself raises while it checks, builds and loads is turned into a sentence. An error anywhere else is
a defect and keeps its traceback; with MIXMOE_TRACEBACK=1 a sentence shows its own too (`cli.run_command`).
"""

from __future__ import annotations

import importlib.util
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import megatron.core
from megatron.core.dist_checkpointing.core import CheckpointingException

from mixmoe_megatron.errors import MixMoEError

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


def check_loggers(args: Any) -> None:
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
