"""The study's grid: a YAML file of sizes, methods, systems and tables becomes jobs, one for each command.

A system with a seed is a chain: the start from the base, a training for each text, an export, an evaluation. Chains
share what they have in common, because equal commands are one job (`jobs.py`).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors import safe_open

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.base import Phase
from mixmoe_megatron.methods.registry import METHODS, PHASES, phase_of_stage
from mixmoe_megatron.study.jobs import OWN, Job

BASE_SYSTEM = "base"
EVALUATED = "model"  # what an evaluation calls its one system: so it does not depend on what the grid calls it
TRIAL_FACTORS = (1 / 3, 1.0, 3.0)  # of a method's learning rates: the same three for each
TRIAL_SEED = 1000  # of the trainings that choose among them; tables have smaller seeds
CHECKPOINT, TOKENS = "checkpoint", "tokens"  # what jobs leave in their directories
_MODEL = "model"
_SECONDS_A_SEGMENT, _SECONDS_A_START = 0.15, 8.0
_BYTES_A_PARAMETER = 16  # of a saved training: weight, two moments of Adam in float32, and the export
_PRECISION = {"float32": (), "bfloat16": ("--bf16",), "float16": ("--fp16",)}
_SECTIONS = ("sizes", "methods", "systems", "tables")
MONOLINGUAL = "{monolingual}"  # in the words of a start: the files of monolingual text to train on, English last
_BESIDE_PAIRS = ("parallel", "mixed")  # kinds of text in files of pairs, one sample a text; the others are cut evenly
#: options of a start that what is trained is in proportion to -> their value in a `ModelDescription`
MATCHED_BY: dict[str, Callable[[Any], int]] = {
    "--lora-rank": lambda model: model.lora.lora_rank,
    "--new-blocks": lambda model: len(model.new_layers),
}


class StudySettings(NamedTuple):
    """What the command line says of a study.

    Attributes:
        size: One of the grid's sizes.
        minutes: Training steps and test segments grow with it.
        seeds: How many times each system is trained.
        pairs: Language pairs with English, such as ``de-en``.
        base: Dense Hugging Face directory; the size's own if empty.
        data: Directory of the text, named as in examples/data.
        dtype: Of all training and evaluation.
    """

    size: str
    minutes: int
    seeds: int
    pairs: tuple[str, ...]
    base: str
    data: str
    dtype: str


class Training(NamedTuple):
    """A training of a system.

    Attributes:
        kind: Of text: ``monolingual``, ``parallel``, both in one (``mixed``), ``review`` (monolingual text again).
        phase: That it trains.
        start: Made the system's first checkpoint from the base.
        job: Leaves a checkpoint.
        data: Jobs that make its token files.
        steps: Of training.
        batch: Sequences of a step.
    """

    kind: str
    phase: Phase
    start: Job
    job: Job
    data: list[Job]
    steps: int
    batch: int

    @property
    def is_pairs(self) -> bool:
        """Whether a sample is a pair or a text, padded, in place of as many tokens as a sequence has."""
        return self.kind in _BESIDE_PAIRS


def read_grid(path: Path) -> dict[str, Any]:
    """Read a grid and check that its names are known to each other.

    Raises:
        MixMoEError: The file is missing or no YAML, or a section, method or system is missing; it is named.
    """
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MixMoEError(f"Cannot read the grid {path}: {' '.join(str(error).split())}.") from error
    if missing := [name for name in _SECTIONS if not isinstance(grid, dict) or not grid.get(name)]:
        raise MixMoEError(f"The grid {path} has no {missing[0]}.")
    for name, system in grid["systems"].items():
        if system and system["method"] not in grid["methods"]:
            raise MixMoEError(f"The grid's system {name} is of the method {system['method']}, which methods lacks.")
    for name, method in grid["methods"].items():
        if (flag := method.get("matched_by")) and flag not in MATCHED_BY:
            raise MixMoEError(f"The grid's method {name} is matched_by {flag}: choose one of {', '.join(MATCHED_BY)}.")
    for name, entry in grid["tables"].items():
        claimed = [name for claim in entry["claims"] for name in claim]
        for system in [*entry["systems"], *claimed, *entry.get("axis", {}).get("values", ())]:
            if system not in grid["systems"]:
                raise MixMoEError(f"The grid's table {name} has the system {system}, which systems lacks.")
    return dict(grid)


def absent_systems(grid: dict[str, Any]) -> dict[str, str]:
    """Return the systems whose method this version of the package lacks, and the method of each."""
    named = {name: system["method"] for name, system in grid["systems"].items() if system}
    methods = {name: grid["methods"][method].get("form_of", method) for name, method in named.items()}
    return {name: method for name, method in methods.items() if method not in METHODS}


@functools.cache
def _fingerprint(path: Path) -> str:
    """Return a hash of a file, or of all files directly in a directory.

    Raises:
        MixMoEError: There is none.
    """
    if not path.exists():
        raise MixMoEError(f"The study needs {path}, which is not there.")
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Grid:
    """The jobs of a grid under some settings.

    Attributes:
        content: Of `read_grid`.
        settings: Of the command line.
        steps: Of training, by system and kind of text, in place of the size's.
        starts: What systems' starts take beside their own words.

    Raises:
        MixMoEError: The size is not in the grid, a setting is out of range, or a pair has no text.
    """

    content: dict[str, Any]
    settings: StudySettings
    steps: Mapping[tuple[str, str], int] = field(default_factory=dict)
    starts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = self.content["sizes"]
        if self.settings.size not in sizes:
            raise MixMoEError(f"There is no size {self.settings.size!r}: choose one of {', '.join(sizes)}.")
        if self.settings.minutes < 1 or self.settings.seeds < 1:
            raise MixMoEError("MINUTES and SEEDS must be whole numbers from 1.")
        if self.settings.seeds >= TRIAL_SEED:
            raise MixMoEError(f"SEEDS must be below {TRIAL_SEED}, the seed with which learning rates are chosen.")
        if not (Path(self.base) / "config.json").is_file():
            raise MixMoEError(f"BASE={self.base} is not a Hugging Face model directory: config.json is missing.")
        for pair in self.settings.pairs:
            if not pair.endswith("-en") or not Path(self._text(pair, "train")).is_file():
                raise MixMoEError(f"There is no {self._text(pair, 'train')}: choose other PAIRS.")

    @property
    def size(self) -> dict[str, Any]:
        """The grid's entry of the size."""
        return dict(self.content["sizes"][self.settings.size])

    @property
    def base(self) -> str:
        """The dense model that all systems start from."""
        return self.settings.base or str(self.size["base"])

    @property
    def languages(self) -> list[str]:
        """All languages of the pairs, English last."""
        return [*(pair.removesuffix("-en") for pair in self.settings.pairs), "en"]

    @property
    def segments(self) -> int:
        """Test segments of each direction and texts of each language."""
        return int(self.size["segments_a_minute"]) * self.settings.minutes

    def _text(self, pair: str, split: str) -> str:
        return f"{self.settings.data}/{pair}.{split}.tsv.gz"

    def _mono(self, language: str, split: str) -> str:
        return f"{self.settings.data}/mono.{language}.{split}.txt.gz"

    def _job(
        self, name: str, words: Sequence[object], parents: Sequence[Job] = (), files: Sequence[str] = (),
        **costs: float,
    ) -> Job:  # fmt: skip
        inputs = tuple(_fingerprint(Path(file)) for file in files)
        return Job(name, ("mixmoe", *map(str, words)), tuple(parents), inputs, **costs)

    def _prepared(self, kind: str) -> list[Job]:
        """Return the jobs that make token files of one kind of text, English last where it is monolingual."""
        common = ["--tokenizer", self.base, "--output-prefix", f"{OWN}/{TOKENS}"]
        beside = ["--beside-pairs", self.size["sequence"] + 1] if kind == "mixed" else []
        monolingual = [] if kind == "parallel" else [
            self._job(f"data {language}{' beside pairs' if beside else ''}",
                      ["preprocess", "mono", "--input", self._mono(language, "train"), *beside, *common],
                      files=[self._mono(language, "train"), self.base])
            for language in self.languages
        ]  # fmt: skip
        if kind not in _BESIDE_PAIRS:
            return monolingual
        return monolingual + [
            self._job(
                f"data {pair}",
                ["preprocess", "parallel", "--input", self._text(pair, "train"), "--both-directions",
                 "--source-language", pair.removesuffix("-en"), "--target-language", "en", "--source-column", "xx",
                 "--target-column", "en", "--max-tokens", self.size["sequence"] + 1, *common],
                files=[self._text(pair, "train"), self.base],
            )
            for pair in self.settings.pairs
        ]  # fmt: skip

    def _start(self, name: str, seed: int) -> Job:
        system = self.content["systems"][name]
        own = [*system.get("start", []), *self.starts.get(name, ()), *self.size.get("start", [])]
        text = [self._mono(language, "train") for language in self.languages] if MONOLINGUAL in own else []
        words = [*self.content["methods"][system["method"]]["start"], *own]
        words = [word for given in words for word in (text if given == MONOLINGUAL else [given])]
        return self._job(
            f"start {name}, seed {seed}",
            ["hf-to-megatron", "--hf-dir", self.base, *words, "--seed", seed, "--force", "--output-dir",
             f"{OWN}/{CHECKPOINT}"],
            files=[self.base, *text], cost=_SECONDS_A_START, disk=self.parameters * 4,
        )  # fmt: skip

    def rate(self, method: str, kind: str, factor: float | None = None) -> float:
        """Return a method's highest learning rate.

        Args:
            method: Of the grid's methods.
            kind: Of text, see `Training`.
            factor: Of the size's ``learning_rates``; None: the one that was chosen for the method (``rate_factors``).
        """
        factor = self.size.get("rate_factors", {}).get(method, 1.0) if factor is None else factor
        return float(f"{self.size['learning_rates'][method][kind] * factor:.3g}")

    def _train(
        self, name: str, kind: str, seed: int, start: Job, parent: Job, factor: float | None
    ) -> Training:  # fmt: skip
        system, size = self.content["systems"][name], self.size
        steps = self.steps.get((name, kind), size[kind]["steps_a_minute"] * self.settings.minutes)
        interval, rate = steps // 2 + 1, self.rate(system["method"], kind, factor)
        data = self._prepared(kind)
        own = f"{OWN}/{CHECKPOINT}"
        method = self.content["methods"][system["method"]]
        flag, value = ["--phase", system["phases"][kind]] if kind in system.get("phases", ()) else method[kind]
        phase = PHASES[value] if flag == "--phase" else phase_of_stage(value)
        words = [
            "train", flag, value, "--init-from", parent.path(CHECKPOINT),
            "--load", own, "--save", own, "--save-interval", interval, "--train-iters", steps,
            "--data-path", *(job.path(TOKENS) for job in data), "--seq-length", size["sequence"],
            "--micro-batch-size", size[kind]["batch"], "--global-batch-size", size[kind]["batch"],
            "--lr", rate, "--min-lr", rate / 10, "--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.03",
            "--weight-decay", "0.0", "--clip-grad", "1.0", "--seed", seed, "--num-workers", "0", "--eval-iters", "0",
            "--log-interval", "5", "--tensorboard-dir", f"{OWN}/tensorboard", "--tensorboard-log-interval", "1",
            *_PRECISION[self.settings.dtype], *size.get("train", []), *system.get("train", []),
        ]  # fmt: skip
        if kind not in _BESIDE_PAIRS:
            words += ["--split", "100,0,0", "--data-cache-path", f"{OWN}/cache"]
        if kind == "review":  # MoE-LPR: English is what the base knows best
            words += ["--lpr-original-data-path", data[-1].path(TOKENS)]
        saved = 4 if "--no-save-optim" in words else 2 * _BYTES_A_PARAMETER
        job = self._job(f"train {name} on {kind} text, seed {seed}", words, [parent, *data],
                        cost=steps * size[kind]["seconds_a_step"] + _SECONDS_A_START,
                        disk=self.parameters * saved)  # fmt: skip
        return Training(kind, phase, start, job, data, steps, size[kind]["batch"])

    def trainings(self, name: str, seed: int, factor: float | None = None) -> list[Training]:
        """Return the trainings of a system, each from the last; none of the untouched base.

        Args:
            name: Of the grid's systems.
            seed: From 1.
            factor: As in `rate`.
        """
        found: list[Training] = []
        if system := self.content["systems"][name]:
            start = last = self._start(name, seed)
            for kind in system["text"]:
                found.append(self._train(name, kind, seed, start, last, factor))
                last = found[-1].job
        return found

    def _evaluate(self, label: str, model: str, parents: Sequence[Job], split: str = "test") -> Job:
        tests = [f"{pair}={self._text(pair, split)}" for pair in self.settings.pairs]
        monolingual = [f"{language}={self._mono(language, split)}" for language in self.languages if split == "test"]
        words = ["evaluate", "--system", f"{EVALUATED}={model}"]
        words += [word for test in tests for word in ("--test", test)]
        words += [word for text in monolingual for word in ("--mono", text)]
        words += ["--source-column", "xx", "--target-column", "en", "--both-directions", "--limit", str(self.segments),
                  "--mono-limit", str(self.segments), "--decoding", "greedy", "--max-length-ratio", "2",
                  "--batch-size", str(self.size["evaluation_batch"]), "--dtype", self.settings.dtype,
                  "--output-dir", f"{OWN}/evaluation"]  # fmt: skip
        files = [entry.partition("=")[2] for entry in (*tests, *monolingual)]
        cost = 2 * len(tests) * self.segments * _SECONDS_A_SEGMENT + _SECONDS_A_START
        return self._job(f"evaluate {label}", words, parents, files if parents else [*files, self.base], cost=cost)

    def evaluation(self, name: str, seed: int) -> Job:
        """Return the last job of a system's chain; its directory has ``evaluation/evaluation.json``.

        Args:
            name: Of the grid's systems.
            seed: From 1; the untouched base has no seed.
        """
        system = self.content["systems"][name]
        if not system:
            return self._evaluate(name, self.base, [])
        export = self._export(name, seed)
        return self._evaluate(f"{name}, seed {seed}", export.path(_MODEL), [export])

    def _export(self, name: str, seed: int, factor: float | None = None) -> Job:
        """Return the job that leaves a trained system as a Hugging Face model."""
        trained = self.trainings(name, seed, factor)[-1].job
        return self._job(
            f"export {name}, seed {seed}",
            ["to-hf", "--checkpoint-dir", trained.path(CHECKPOINT), "--force", "--output-dir", f"{OWN}/{_MODEL}"],
            [trained], cost=_SECONDS_A_START, disk=self.parameters * 4,
        )  # fmt: skip

    def trials(self, tables: Sequence[str]) -> dict[tuple[str, float], Job]:
        """Return what tells a good learning rate: evaluations on the valid files, at each of `TRIAL_FACTORS`.

        Args:
            tables: Whose methods are tried, each as its first system that reads monolingual, then parallel text.

        Returns:
            Method and factor to the evaluation.
        """
        tried: dict[str, str] = {}
        for name in dict.fromkeys(name for table in tables for name in self.systems_of(table)):
            system = self.content["systems"][name]
            if system and system["text"][:2] == ["monolingual", "parallel"]:
                tried.setdefault(system["method"], name)
        found = {}
        for method, name in tried.items():
            for factor in TRIAL_FACTORS:
                export = self._export(name, TRIAL_SEED, factor)
                label = f"{method} at {factor:.2g} times its learning rates"
                found[method, factor] = self._evaluate(label, export.path(_MODEL), [export], "valid")
        return found

    def systems_of(self, table: str) -> list[str]:
        """Return the systems of a table that this version can train, the base first even where the table lacks it.

        Raises:
            MixMoEError: There is no such table.
        """
        tables = self.content["tables"]
        if table not in tables:
            raise MixMoEError(f"There is no table {table!r}: choose all, or some of {', '.join(tables)}.")
        absent = absent_systems(self.content)
        named = [name for name in tables[table]["systems"] if name not in absent]
        return named if BASE_SYSTEM in named else [BASE_SYSTEM, *named]

    def absence(self, tables: Sequence[str]) -> str:
        """Return a sentence that names the tables' systems whose method this version lacks; empty if there is none."""
        named = dict.fromkeys(name for table in tables for name in self.content["tables"][table]["systems"])
        absent = {name: method for name, method in absent_systems(self.content).items() if name in named}
        what = "; ".join(f"{name} needs the method {method}" for name, method in absent.items())
        return f"Left out: {what}." if what else ""

    def claims_of(self, table: str) -> list[tuple[str, str]]:
        """Return the table's claims "first is better than second" of systems that this version can train."""
        systems = self.systems_of(table)
        claims = self.content["tables"][table]["claims"]
        return [(first, second) for first, second in claims if first in systems and second in systems]

    def evaluations(self, table: str) -> dict[str, list[Job]]:
        """Return the evaluation of each seed of each system of a table."""
        seeds = range(1, self.settings.seeds + 1)
        return {name: [self.evaluation(name, seed) for seed in seeds] for name in self.systems_of(table)}

    @functools.cached_property
    def parameters(self) -> int:
        """Numbers in the base's weight files."""
        total = 0
        for file in Path(self.base).glob("*.safetensors"):
            with safe_open(file, "numpy") as weights:
                total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
        return total
