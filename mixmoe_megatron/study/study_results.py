"""The figures of a study's tables, from the evaluations that its jobs have left.

Two endpoints, fixed beforehand: chrF++ (the mean over sentences, so that segments can be resampled; corpus scores stand
beside it) and the change of bits a byte of monolingual text against the untouched base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sacrebleu.metrics import CHRF

from mixmoe_megatron.evaluation.provenance import read_json
from mixmoe_megatron.study.footprint import Footprint, read_footprint
from mixmoe_megatron.study.grid import BASE_SYSTEM, EVALUATED, Grid
from mixmoe_megatron.study.jobs import Job
from mixmoe_megatron.study.statistics import Block, Contrast, Estimate, compare_systems, hierarchical_bootstrap
from mixmoe_megatron.study.training_log import read_training_log

TRANSLATION, RETENTION = "translation", "retention"


class Load(NamedTuple):
    """How the tokens of the test translations spread over a group's experts, mean over layers, directions and seeds.

    Attributes:
        load_max: The largest share of an expert times the number of experts: 1 is balanced.
        entropy: Of the shares, over that of equal shares: 1 is balanced, 0 is one expert for all.
    """

    load_max: float
    entropy: float


class SystemScores(NamedTuple):
    """What a system got, trained once a seed.

    Attributes:
        corpus: Direction to metric to its mean over seeds.
        translation: Of each direction chrF++ of each sentence, [seeds, segments].
        retention: Of each language what each text adds to the change of bits a byte in percent, [seeds, texts]; their
            mean is the change, above 0: worse.
        loads: Name of an expert group to its load; empty where no router was measured.
    """

    corpus: dict[str, dict[str, float]]
    translation: list[Block]
    retention: list[Block]
    loads: dict[str, Load]

    @property
    def estimates(self) -> tuple[Estimate, Estimate]:
        """The change of bits a byte in percent, and chrF++."""
        return hierarchical_bootstrap(self.retention), hierarchical_bootstrap(self.translation)


class TableResults(NamedTuple):
    """A table of the study.

    Attributes:
        systems: By name, the base first.
        footprints: What each of them is and costs.
        curves: System to the mean over seeds of its loss on parallel text, (step, nats a token); of those that read it.
        claims: (first, second, endpoint) to what can be said of "first is better than second" by it.
    """

    systems: dict[str, SystemScores]
    footprints: dict[str, Footprint]
    curves: dict[str, list[tuple[int, float]]]
    claims: dict[tuple[str, str, str], Contrast]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def sentence_scores(folder: Path, direction: str) -> Block:
    """Return chrF++ of each sentence of an evaluation's hypotheses, [segments]."""
    chrf = CHRF(word_order=2)
    pairs = zip(*(_lines(folder / f"{direction}.{name}.txt") for name in (EVALUATED, "reference")), strict=True)
    return np.array([chrf.sentence_score(hypothesis, [reference]).score for hypothesis, reference in pairs])


def _loads(evaluations: list[dict[str, Any]]) -> dict[str, Load]:
    found: dict[str, list[Load]] = {}
    for evaluation in evaluations:
        for direction in evaluation["routing_of_directions"].get(EVALUATED, {}).values():
            for groups in direction["layers"].values():
                for name, group in groups.items():
                    share = np.array(group["share"])
                    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum() / np.log(len(share))
                    found.setdefault(name, []).append(Load(share.max() * len(share), entropy))
    return {name: Load(*map(float, np.mean(loads, axis=0))) for name, loads in found.items()}


def _curve(grid: Grid, name: str, root: Path) -> list[tuple[int, float]]:
    """Return the mean over seeds of the loss on parallel text; empty where the system does not read any."""
    curves = [
        read_training_log(training.job.directory(root) / "tensorboard")["lm_loss"]
        for seed in range(1, grid.settings.seeds + 1)
        for training in grid.trainings(name, seed)
        if training.kind == "parallel"
    ]
    return [(rows[0][0], float(np.mean([loss for _, loss in rows]))) for rows in zip(*curves, strict=True)]


def read_scores(folders: list[Path], base: dict[str, Any]) -> SystemScores:
    """Read a system's evaluations.

    Args:
        folders: One a seed, as `evaluate` writes them.
        base: Content of the untouched base's evaluation.json, on the same text.
    """
    evaluations = [read_json(folder / "evaluation.json") for folder in folders]
    directions, languages = list(base["directions"]), list(base["perplexity"])
    corpus = {
        direction: {
            metric: float(np.mean([found["directions"][direction][EVALUATED][metric] for found in evaluations]))
            for metric in base["directions"][direction][EVALUATED]
        }
        for direction in directions
    }
    retention = []
    for language in languages:
        before = np.array(base["perplexity"][language][EVALUATED]["text_bits"])
        after = np.array([found["perplexity"][language][EVALUATED]["text_bits"] for found in evaluations])
        retention.append(100.0 * (after - before) / before.mean())
    translation = [
        np.stack([sentence_scores(folder / "hypotheses", direction) for folder in folders]) for direction in directions
    ]
    return SystemScores(corpus, translation, retention, _loads(evaluations))


def read_results(grid: Grid, table: str, root: Path) -> TableResults:
    """Return a table's figures; its jobs have run.

    Args:
        grid: The study.
        table: One of its tables.
        root: Directory of all jobs.
    """

    def folders(jobs: list[Job]) -> list[Path]:
        return [job.directory(root) / "evaluation" for job in jobs]

    evaluations = grid.evaluations(table)
    base = read_json(folders(evaluations[BASE_SYSTEM])[0] / "evaluation.json")
    ordered = sorted(evaluations, key=lambda name: name != BASE_SYSTEM)
    systems = {name: read_scores(folders(evaluations[name]), base) for name in ordered}
    claims, blocks = [], []
    for first, second in grid.claims_of(table):
        one, other = systems[first], systems[second]
        claims += [(first, second, TRANSLATION), (first, second, RETENTION)]
        blocks.append([a - b for a, b in zip(one.translation, other.translation, strict=True)])
        blocks.append([b - a for a, b in zip(one.retention, other.retention, strict=True)])
    footprints = {name: read_footprint(grid, name, root) for name in systems}
    curves = {name: curve for name in systems if (curve := _curve(grid, name, root))}
    return TableResults(systems, footprints, curves, dict(zip(claims, compare_systems(blocks), strict=True)))
