"""Which learning rates a study uses: each method is trained at the same three multiples and tested on the valid files.

The multiple with the highest chrF++ (the study's first endpoint) is a method's `rate_factors` in the grid. What it
keeps of other text decides nothing here, and no table reads the valid files or the seed of these trainings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mixmoe_megatron.cli import write_text
from mixmoe_megatron.evaluation.provenance import read_json
from mixmoe_megatron.study.grid import TRIAL_FACTORS, Grid
from mixmoe_megatron.study.study_results import sentence_scores
from mixmoe_megatron.study.tables import csv_text

COLUMNS = ("method", "factor", "monolingual", "parallel", "chrF++ on valid files", "chosen", "commit")


class Trial(NamedTuple):
    """A method at a multiple of its learning rates.

    Attributes:
        method: Of the grid.
        factor: One of `TRIAL_FACTORS`.
        score: Mean chrF++ of the sentences of the valid files, mean over directions.
        commit: With which it was trained and tested.
    """

    method: str
    factor: float
    score: float
    commit: str | None


def read_trials(grid: Grid, tables: Sequence[str], root: Path) -> list[Trial]:
    """Return the trials of the methods of some tables; their jobs have run.

    Args:
        grid: The study.
        tables: Of the grid.
        root: Directory of all jobs.
    """
    found = []
    for (method, factor), job in grid.trials(tables).items():
        folder = job.directory(root) / "evaluation"
        directions = read_json(folder / "evaluation.json")["directions"]
        scores = [sentence_scores(folder / "hypotheses", direction).mean() for direction in directions]
        commit = read_json(job.directory(root) / "done.json")["commit"]
        found.append(Trial(method, factor, float(sum(scores) / len(scores)), commit))
    return found


def chosen_factors(trials: Sequence[Trial]) -> dict[str, float]:
    """Return each method's factor of the highest score; the smaller one of equal scores."""
    ordered = sorted(trials, key=lambda trial: (trial.score, -trial.factor))
    return {trial.method: trial.factor for trial in ordered}


def trials_csv(grid: Grid, trials: Sequence[Trial]) -> str:
    """Return all trials as a CSV file's text."""
    chosen = chosen_factors(trials)
    rows = [
        [trial.method, f"{trial.factor:.3g}", *(grid.rate(trial.method, kind, trial.factor) for kind in COLUMNS[2:4]),
         trial.score, "yes" if chosen[trial.method] == trial.factor else "", trial.commit]
        for trial in trials
    ]  # fmt: skip
    return csv_text(COLUMNS, rows)


def trial_sentences(trials: Sequence[Trial]) -> list[str]:
    """Say what was chosen, and the line that the grid's size needs for it."""
    chosen = chosen_factors(trials)
    sentences = []
    for method, factor in chosen.items():
        scores = ", ".join(f"{trial.score:.2f} at {trial.factor:.2g}" for trial in trials if trial.method == method)
        edge = "" if factor == TRIAL_FACTORS[1] else ", an end of the three: the best may lie beyond"
        sentences.append(f"{method}: {factor:.2g} times its learning rates (chrF++ {scores}{edge}).")
    factors = ", ".join(f"{method}: {factor:.3g}" for method, factor in chosen.items())
    return [*sentences, f"Put it into the grid: rate_factors: {{{factors}}}"]


def write_rates(grid: Grid, tables: Sequence[str], output_dir: Path, root: Path) -> list[str]:
    """Write rates.csv.

    Args:
        grid: The study.
        tables: Whose methods were tried; all jobs have run.
        output_dir: Must exist.
        root: Directory of all jobs.

    Returns:
        What was chosen, in sentences.
    """
    trials = read_trials(grid, tables, root)
    write_text(output_dir / "rates.csv", trials_csv(grid, trials))
    return trial_sentences(trials)
