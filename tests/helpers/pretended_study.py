"""What the jobs of a study leave, made up: the study's tables without a training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from mixmoe_megatron.checkpoint.metadata import Metadata, write_metadata
from mixmoe_megatron.conversion.hf_config import read_hf_config
from mixmoe_megatron.conversion.starts import describe_start
from mixmoe_megatron.data.storage import TokenFileWriter
from mixmoe_megatron.methods.lora import LoRAOptions
from mixmoe_megatron.methods.registry import method_of
from mixmoe_megatron.model.sizes import ModelDescription
from mixmoe_megatron.study.grid import CHECKPOINT, EVALUATED, TOKENS, Grid, Training
from mixmoe_megatron.study.jobs import Job, with_parents

SHARES = [0.5, 0.25, 0.25, 0.0]
LENGTH = 20  # tokens of each document


def finish(job: Job, root: Path) -> Path:
    """Mark a job as done after 1.5 seconds."""
    directory = job.directory(root)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "done.json").write_text('{"seconds": 1.5, "commit": "abc"}')
    return directory


def described(grid: Grid, training: Training) -> ModelDescription:
    """The model of the start that a training's first command makes, by the options of the grid's methods."""
    words = training.start.words
    given = {flag: words[place + 1] for place, flag in enumerate(words) if flag in ("--lora-rank", "--new-blocks")}
    start = method_of(training.phase).phases[0]
    return describe_start(
        read_hf_config(grid.base),
        start,
        new_blocks=int(given["--new-blocks"]) if "--new-blocks" in given else None,
        lora=LoRAOptions(int(given["--lora-rank"])) if "--lora-rank" in given else None,
    )


def pretend_training(grid: Grid, training: Training, root: Path) -> None:
    """Leave the start's metadata, token files and two steps of a log."""
    model, directory = described(grid, training), finish(training.job, root)
    start = finish(training.start, root) / CHECKPOINT
    start.mkdir(exist_ok=True)
    write_metadata(start, Metadata(model.phase, model.recorded_options(), model.megatron_args, model.hf_config))
    if not (directory / "tensorboard").exists():
        with SummaryWriter(str(directory / "tensorboard")) as writer:
            for step in (1, 2):
                writer.add_scalar("lm loss", 4.0 / step, step)
    for job in training.data:
        with TokenFileWriter(finish(job, root) / TOKENS, 8192, with_modes=training.is_pairs) as tokens:
            for _ in range(2):
                tokens.add([[1] * (LENGTH // 2)] * 2 if training.is_pairs else [[1] * LENGTH])
            tokens.commit({"kind": "parallel" if training.is_pairs else "monolingual"})


def pretend_evaluation(job: Job, root: Path, system: str) -> None:
    """Leave an evaluation: mixmoe translates as sft does, and forgets 10 %, the others nothing; base says nothing."""
    folder = finish(job, root) / "evaluation" / "hypotheses"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["the same words", "other words <b>here</b>"]
    (folder / "de-en.reference.txt").write_text("".join(f"{line}\n" for line in lines))
    said = lines if system != "base" else ["", "none"]
    (folder / f"de-en.{EVALUATED}.txt").write_text("".join(f"{line}\n" for line in said))
    bits = np.array([100.0, 300.0]) * (1.1 if system == "mixmoe" else 1.0)
    routing = {"de-en": {"layers": {"3": {name: {"share": SHARES} for name in ("lm", "mt")}}}}
    content = {
        "directions": {"de-en": {EVALUATED: {"bleu": 10.0, "chrf": 20.0, "chrf_plus_plus": 30.0}}},
        "perplexity": {"de": {EVALUATED: {"text_bits": bits.tolist()}}},
        "routing_of_directions": {EVALUATED: routing} if system == "mixmoe" else {},
        "num_test_segments": {"de-en": 2},
        "seconds": {EVALUATED: {"translate de-en": 3.0, "perplexity de": 9.0}},
    }
    (folder.parent / "evaluation.json").write_text(json.dumps(content))


def pretend_table(grid: Grid, table: str, root: Path) -> None:
    """Leave what all jobs of a table would."""
    for system, jobs in grid.evaluations(table).items():
        for job in with_parents(jobs):
            finish(job, root)
        for seed, job in enumerate(jobs, start=1):
            for training in grid.trainings(system, seed):
                pretend_training(grid, training, root)
            pretend_evaluation(job, root, system)
