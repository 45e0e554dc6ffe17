"""Run the real training command on a tiny model and tiny text, and read what it logged and saved."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.helpers.forked import run_job
from tests.helpers.tiny_hf import SENTENCES, save_tiny_dense

ROOT = Path(__file__).resolve().parents[2]
_LOSS = re.compile(r"iteration +(\d+)/.*?lm loss: ([0-9.E+-]+)")
_GRAD_NORM = re.compile(r"iteration +(\d+)/.*?grad norm: ([0-9.E+-]+)")

#: Flags of every run: small steps that still move the weights, one log line a step.
TINY_RUN = (
    "--seq-length 32 --micro-batch-size 4 --global-batch-size 8 --lr 1e-3 --log-interval 1 --eval-iters 0 "
    "--split 100,0,0 --num-workers 0 --seed 7"
)


def run_command(*words: str | Path, processes: int = 0, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script of this repository in a process of its own, or under torchrun.

    Args:
        words: the script, relative to the repository, and its arguments.
        processes: 0: plain Python; else torchrun with so many processes.
        check: fail the test, with the output, when the command fails.
    """
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launcher, *map(str, words)], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=280
    )
    assert not check or done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done


def make_tiny_world(directory: Path, tokenizer: str = "sentencepiece", **options: str) -> None:
    """Write base/, upcycled/, and the token files mono and pairs below `directory`.

    Args:
        directory: an empty directory.
        tokenizer: kind of tokenizer, see `tiny_hf.tiny_tokenizer`.
        options: flags of hf_to_mixmoe.py, underscores for dashes.
    """
    save_tiny_dense(directory / "base", "qwen2", tokenizer=tokenizer)
    flags = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), value)]
    _prepare(
        "checkpoints_conversion/hf_to_mixmoe.py", "--hf-dir", directory / "base", "--output-dir",
        directory / "upcycled", "--moe-every", "2", *flags,
    )  # fmt: skip
    make_tiny_data(directory, directory / "upcycled" / "tokenizer")


def make_tiny_data(directory: Path, tokenizer: Path) -> None:
    """Write the token files `mono` and `pairs` (de-en, both directions) from the test sentences."""
    make_monolingual(directory / "mono", SENTENCES, tokenizer)
    rows = [f"{a}\t{b} {n}" for n, (a, b) in enumerate(zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], strict=True))]
    pairs = directory / "pairs.tsv"
    pairs.write_text("de\ten\n" + "\n".join(row.replace("\n", " ") for row in rows * 1) + "\n", "utf-8")
    common = ["--tokenizer", tokenizer]
    script = "tools/preprocess_data.py"
    _prepare(
        script, "parallel", "--input", pairs, *common, "--output-prefix", directory / "pairs", "--both-directions",
        "--source-language", "de", "--target-language", "en",
    )  # fmt: skip


def make_monolingual(prefix: Path, sentences: Sequence[str], tokenizer: Path) -> None:
    """Write a monolingual token file, each sentence 20 times with a number."""
    text = prefix.with_name("text.txt")
    text.write_text("\n".join(f"{line} {number}" for number in range(20) for line in sentences) + "\n", "utf-8")
    words = ["--input", text, "--tokenizer", tokenizer, "--output-prefix", prefix, "--min-tokens", "1"]
    _prepare("tools/preprocess_data.py", "mono", *words)


def _prepare(*words: str | Path) -> None:
    with tempfile.TemporaryDirectory() as logs:
        run_job(list(map(str, words)), 1, Path(logs))


def train_words(
    stage: int | str, parent: Path, data: Path, save: Path | None, steps: int, extra: str = ""
) -> list[str]:
    """The command line of a tiny run of a stage or of a phase by its name; `extra` comes last and wins."""
    which = "--phase" if isinstance(stage, str) else "--mixmoe-stage"
    words = ["tools/pretrain_mixmoe.py", which, str(stage), "--init-from", str(parent)]
    words += ["--data-path", str(data), *TINY_RUN.split(), "--train-iters", str(steps)]
    words += ["--data-cache-path", str(parent.parent / "cache")]
    if save is not None:
        words += ["--save", str(save), "--load", str(save), "--save-interval", "1000"]
    if stage in (2, "stage2"):
        words += ["--seq-length", "160"]
    return words + extra.split()


def train(
    stage: int | str,
    parent: Path,
    data: Path,
    save: Path | None,
    steps: int,
    extra: str = "",
    processes: int = 1,
    prelude: Callable[[], None] | None = None,
) -> tuple[list[float], list[float]]:
    """Train `steps` steps and return the losses (nats a token) and gradient norms of all steps."""
    with tempfile.TemporaryDirectory() as logs:
        job = run_job(train_words(stage, parent, data, save, steps, extra), processes, Path(logs), prelude=prelude)
        return logged(job.stdout(processes - 1))


def logged(output: str) -> tuple[list[float], list[float]]:
    """Return the losses (nats a token) and gradient norms of all steps in Megatron's log, written by the last rank."""
    losses = [float(value) for _, value in _LOSS.findall(output)]
    norms = [float(value) for _, value in _GRAD_NORM.findall(output)]
    assert len(losses) == len(norms), output
    return losses, norms


def checkpoint_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return the model tensors of the newest iteration of a checkpoint, by their names in the model."""
    from mixmoe_megatron.checkpoint.megatron_checkpoint import TorchDistReader, iteration_directory
    from tests.helpers.mappings import read_tensor

    reader = TorchDistReader(iteration_directory(directory))
    return {name: read_tensor(reader, name) for name in reader.names()}


def bytes_read() -> int:
    """What this process has read so far, by any system call."""
    return int(Path("/proc/self/io").read_text("ascii").split()[1])


def saved_objects(directory: Path) -> dict[str, Any]:
    """Return all that the newest iteration of a checkpoint holds, the optimizer's tensors and plain objects too."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    from mixmoe_megatron.checkpoint.megatron_checkpoint import iteration_directory

    state: dict[str, Any] = {}
    reader = FileSystemReader(iteration_directory(directory))
    _load_state_dict(state, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return state
