"""Evaluate several systems on the same segments; everything finished is kept on disk and skipped by the next run.

Layout of the output directory:

- ``manifest.json``: options and fingerprints of what the results belong to; a run with others is refused.
- ``hypotheses/{direction}.{system}.txt``: one hypothesis a line; ``.source.txt`` and ``.reference.txt`` beside them, so
  that the `sacrebleu` command can be run on the very same files.
- ``hypotheses/{direction}.{system}.partial.jsonl``: finished batches of an unfinished translation.
- ``measurements/{system}.json``: perplexity, routing and seconds.
- ``comet.json``: COMET scores.
- ``evaluation.json``: all results; ``comparison.md``, ``.tex``, ``.csv``, ``.json``: the scores as one table.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mixmoe_megatron.cli import write_json, write_text
from mixmoe_megatron.data.languages import check_language
from mixmoe_megatron.data.prompts import PromptTemplate
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.comet_scores import CometScorer
from mixmoe_megatron.evaluation.generation import GenerationOptions, translate
from mixmoe_megatron.evaluation.meteor import meteor_is_installed, report_missing_parts, score_meteor
from mixmoe_megatron.evaluation.models import LoadedModel, check_model, load_model, model_fingerprint
from mixmoe_megatron.evaluation.perplexity import measure_perplexity
from mixmoe_megatron.evaluation.provenance import evaluation_versions, git_commit, read_json
from mixmoe_megatron.evaluation.routing import is_mixmoe, measure_routing
from mixmoe_megatron.evaluation.scores import METRIC_NAMES, bleu_of, compare, score
from mixmoe_megatron.evaluation.segments import Direction, sha256_of_texts
from mixmoe_megatron.study.comparison import COMPARISON_SUFFIXES, write_comparison

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_RESERVED_NAMES = {"source", "reference"}


@dataclass(frozen=True)
class EvaluationPlan:
    """What to evaluate.

    Attributes:
        systems: System name to model directory, in the order of the tables.
        directions: Test segments of each translation direction.
        monolingual: Language code to texts, for perplexity and routing.
        generation: How to decode.
        template: The prompt.
        baseline: System that the others are tested against; None for no test.
        rival: Another one that they are tested against too, such as full fine-tuning; None for none.
        dtype: Of the models, ``float32`` by default.
        device: A torch device.
        comet: COMET model (see `comet_scores.find_comet`); None: no COMET.
        selection: How segments were chosen (files, limit, seed), for the record.

    Raises:
        MixMoEError: No system, nothing to do, an unusable system name, or an unknown language, baseline or rival.
    """

    systems: dict[str, Path]
    directions: list[Direction]
    monolingual: dict[str, list[str]]
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    template: PromptTemplate = field(default_factory=PromptTemplate)
    baseline: str | None = None
    rival: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    comet: str | None = None
    selection: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.systems:
            raise MixMoEError("Name at least one system to evaluate.")
        if not self.directions and not self.monolingual:
            raise MixMoEError("Give a translation test set, monolingual text, or both: there is nothing to evaluate.")
        for name in self.systems:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in _RESERVED_NAMES:
                raise MixMoEError(
                    f"{name!r} cannot name a system: use letters, digits, _ and -, not source, reference."
                )
        for role, wanted in (("baseline", self.baseline), ("rival", self.rival)):
            if wanted is not None and wanted not in self.systems:
                raise MixMoEError(f"The {role} {wanted!r} is not among the systems {', '.join(self.systems)}.")
        names = [direction.name for direction in self.directions]
        if twice := [name for name in names if names.count(name) > 1]:
            raise MixMoEError(f"The direction {twice[0]} comes twice: name its test sets, as in {twice[0]}@NAME=FILE.")
        for language in self.monolingual:
            check_language(language)

    def identity(self) -> dict[str, Any]:
        """Return everything that results depend on; the batch size and the device are not part of it."""
        generation = asdict(self.generation)
        del generation["batch_size"]
        if self.generation.decoding == "greedy":
            del generation["num_beams"]
        return {
            "format_version": FORMAT_VERSION,
            **generation,
            "prompt_template": self.template.text,
            "dtype": self.dtype,
            "systems": {name: model_fingerprint(path) for name, path in self.systems.items()},
            "test_sets": {d.name: sha256_of_texts([*d.sources, *d.references]) for d in self.directions},
            "monolingual": {language: sha256_of_texts(texts) for language, texts in self.monolingual.items()},
        }


def _check(plan: EvaluationPlan, output_dir: Path) -> None:
    """Find what would fail after hours of decoding before anything is read or written.

    Raises:
        MixMoEError: A model, device, tokenizer or the directory cannot be used.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise MixMoEError(f"{output_dir} is a file: choose another output directory.")
    texts = {text for direction in plan.directions for text in (*direction.sources, *direction.references)}
    texts.update(text for lines in plan.monolingual.values() for text in lines)
    for name, path in plan.systems.items():
        tokenizer = check_model(name, path, dtype=plan.dtype, device=plan.device)
        if quoted := sum(map(tokenizer.spells_special_token, texts)):
            logger.info(
                "%s: special tokens spelled out in test texts are encoded as plain text (texts: %d)", name, quoted
            )
    for direction in plan.directions:
        bleu_of(direction.target_language)
    if plan.directions:
        report_missing_parts()


def _found_systems(output_dir: Path) -> set[str]:
    """Return the systems of which the directory holds results, finished or not."""
    measured = {path.stem for path in (output_dir / "measurements").glob("[!.]*")}
    files = [path.name for path in (output_dir / "hypotheses").glob("[!.]*")]
    translated = {name.removesuffix(".txt").removesuffix(".partial.jsonl").rpartition(".")[2] for name in files}
    return measured | translated - _RESERVED_NAMES


def _found_identity(output_dir: Path, *, discard: bool) -> dict[str, Any]:
    """Return what the results in a directory belong to, after discarding them if wanted; empty when there are none.

    Raises:
        MixMoEError: They belong to something that manifest.json does not tell, or it is of another kind of run.
    """
    manifest_path = output_dir / "manifest.json"
    manifest = read_json(manifest_path) if manifest_path.exists() else {}
    if manifest and "systems" not in manifest:
        raise MixMoEError(f"{manifest_path} is not an evaluation's: choose another output directory.")
    if discard:
        for name in ("hypotheses", "measurements"):
            if (output_dir / name).exists():
                shutil.rmtree(output_dir / name)
        for name in ("evaluation.json", *(f"comparison.{suffix}" for suffix in COMPARISON_SUFFIXES), "manifest.json"):
            (output_dir / name).unlink(missing_ok=True)
    found = _found_systems(output_dir)
    if unknown := found - set(manifest.get("systems", ())):
        raise MixMoEError(
            f"{output_dir} holds results of {min(unknown)}, and its manifest.json does not say of which model: "
            "choose another output directory, or overwrite it with --overwrite."
        )
    systems = {name: value for name, value in manifest.get("systems", {}).items() if name in found}
    return {**manifest, "systems": systems} if systems else {}


def _merge_identity(old: dict[str, Any], new: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """Return the union of both; systems, test sets and languages may be added, nothing may differ."""
    merged: dict[str, Any] = {}
    for key, value in new.items():
        before = old.get(key, value)
        if not isinstance(value, dict):
            pairs = {key: (before, value)}
            merged[key] = value
        else:  # of each system, test set or language, by name
            pairs = {f"{key} {name}": (before.get(name, entry), entry) for name, entry in value.items()}
            merged[key] = before | value
        for what, (was, now) in pairs.items():
            if was != now:
                raise MixMoEError(
                    f"{output_dir} holds results of another run ({what.replace('_', ' ')} was {was!r} and is now "
                    f"{now!r}): choose another output directory, or overwrite it with --overwrite."
                )
    return merged


def _write_lines(path: Path, lines: list[str]) -> None:
    """Write lines atomically; every line must be free of newlines."""
    write_text(path, "".join(f"{line}\n" for line in lines))


def _read_lines(path: Path, count: int) -> list[str]:
    """Read back what `_write_lines` wrote and check the number of lines."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    if len(lines) != count:
        raise MixMoEError(f"{path} has {len(lines)} hypotheses for {count} references: delete it to decode anew.")
    return lines


class _SystemRun:
    """Evaluates one system; the model is loaded only if something is left to do."""

    def __init__(self, name: str, plan: EvaluationPlan, output_dir: Path) -> None:
        self.name = name
        self.plan = plan
        self.hypotheses_dir = output_dir / "hypotheses"
        self.measurements_path = output_dir / "measurements" / f"{name}.json"
        self.measurements: dict[str, Any] = {"perplexity": {}, "routing": {}, "routed": [], "seconds": {}}
        if self.measurements_path.exists():
            self.measurements = read_json(self.measurements_path)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model."""
        return load_model(self.name, self.plan.systems[self.name], dtype=self.plan.dtype, device=self.plan.device)

    def _timed(self, step: str, work: Callable[[], Any]) -> Any:
        """Do some work, log and note its seconds."""
        self.loaded  # noqa: B018 - loading is not part of the step
        start = time.perf_counter()
        result = work()
        self.measurements["seconds"][step] = round(time.perf_counter() - start, 2)
        logger.info("%s: %s took %.1f s", self.name, step, self.measurements["seconds"][step])
        return result

    def translate(self, direction: Direction) -> None:
        """Translate a direction unless its hypotheses are on disk."""
        path = self.hypotheses_dir / f"{direction.name}.{self.name}.txt"
        partial = path.with_suffix(".partial.jsonl")
        if path.exists():
            _read_lines(path, len(direction.sources))
            partial.unlink(missing_ok=True)
            return
        languages = (direction.source_language, direction.target_language)
        prompts = [self.plan.template.render(source, *languages) for source in direction.sources]
        label = f"{self.name} {direction.name}"
        hypotheses = self._timed(
            f"translate {direction.name}",
            lambda: translate(self.loaded, prompts, direction.sources, self.plan.generation, partial, label),
        )
        write_json(self.measurements_path, self.measurements)
        _write_lines(path, hypotheses)
        partial.unlink()

    def measure(self, language: str, texts: list[str]) -> None:
        """Measure perplexity, and routing where there is any, unless they are on disk."""
        if language in self.measurements["perplexity"]:
            return
        perplexity = self._timed(f"perplexity {language}", lambda: measure_perplexity(self.loaded, texts))
        self._route(language, texts)
        self.measurements["perplexity"][language] = perplexity.to_dict()
        write_json(self.measurements_path, self.measurements)

    def route(self, direction: Direction) -> None:
        """Measure the routing of prompts and reference translations, unless it is on disk."""
        if direction.name in self.measurements["routed"]:
            return
        languages = (direction.source_language, direction.target_language)
        pairs = zip(direction.sources, direction.references, strict=True)
        self._route(direction.name, [self.plan.template.render(a, *languages) + f" {b}" for a, b in pairs])
        self.measurements["routed"].append(direction.name)
        write_json(self.measurements_path, self.measurements)

    def _route(self, name: str, texts: list[str]) -> None:
        if is_mixmoe(self.loaded):
            routing = self._timed(f"routing {name}", lambda: measure_routing(self.loaded, texts))
            self.measurements["routing"][name] = routing.to_dict()


def _score_direction(
    plan: EvaluationPlan, direction: Direction, output_dir: Path, comet: _CometScores | None
) -> dict[str, Any]:
    """Score all systems in one direction and test them against the baseline and the rival."""
    hypotheses = {
        name: _read_lines(output_dir / "hypotheses" / f"{direction.name}.{name}.txt", len(direction.references))
        for name in plan.systems
    }
    scores: dict[str, dict[str, float]] = {}
    signatures: dict[str, str] = {}
    wanted = (direction.references, direction.target_language)
    for name, lines in hypotheses.items():
        scored = score(lines, *wanted)
        scores[name] = {metric: getattr(scored, metric) for metric in METRIC_NAMES}
        signatures = dict(scored.signatures)
        if meteor_is_installed():
            scores[name]["meteor"], signatures["meteor"] = score_meteor(lines, *wanted)
        if comet is not None:
            scores[name]["comet"], signatures["comet"] = comet.score(name, direction, lines)
    tests = {
        key: {name: compare((other, hypotheses[other]), (name, lines), *wanted).to_dict()
              for name, lines in hypotheses.items() if other is not None and name != other}
        for key, other in (("significance", plan.baseline), ("rival_significance", plan.rival))
    }  # fmt: skip
    return {"scores": scores, "signatures": signatures, **tests}


class _CometScores:
    """COMET scores, kept in OUTPUT_DIR/comet.json; the model is loaded only if one is missing."""

    def __init__(self, model: str, device: str, output_dir: Path) -> None:
        self._model, self._device, self._path = model, device, output_dir / "comet.json"
        self._known: dict[str, Any] = read_json(self._path) if self._path.exists() else {}

    @cached_property
    def _scorer(self) -> CometScorer:
        return CometScorer(self._model, self._device)

    def score(self, system: str, direction: Direction, hypotheses: list[str]) -> tuple[float, str]:
        """Return the score of a system in a direction, and the model's signature."""
        texts = [self._model, *direction.sources, *hypotheses, *direction.references]
        key = f"{direction.name} {system} {sha256_of_texts(texts)}"
        if key not in self._known:
            value = self._scorer.score(direction.sources, hypotheses, direction.references)
            self._known[key] = {"score": value, "signature": self._scorer.signature}
            write_json(self._path, self._known)
        return self._known[key]["score"], self._known[key]["signature"]


def evaluate(plan: EvaluationPlan, output_dir: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Run a plan, write evaluation.json and return its content.

    Args:
        plan: What to evaluate.
        output_dir: Created if absent. Results of the same plan found there are kept, an interrupted one is continued.
        overwrite: Discard results found there.

    Raises:
        MixMoEError: The directory holds results of another plan, or any mistake in models or data.
    """
    _check(plan, output_dir)
    identity = plan.identity()
    if found := _found_identity(output_dir, discard=overwrite):
        identity = _merge_identity(found, identity, output_dir)
    for name in ("hypotheses", "measurements"):
        (output_dir / name).mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "manifest.json", identity)
    for direction in plan.directions:
        _write_lines(output_dir / "hypotheses" / f"{direction.name}.source.txt", direction.sources)
        _write_lines(output_dir / "hypotheses" / f"{direction.name}.reference.txt", direction.references)
    measurements = {}
    for name in plan.systems:
        run = _SystemRun(name, plan, output_dir)
        for direction in plan.directions:
            run.translate(direction)
            run.route(direction)
        for language, texts in plan.monolingual.items():
            run.measure(language, texts)
        measurements[name] = run.measurements
    result = _collect(plan, identity, measurements, output_dir)
    write_json(output_dir / "evaluation.json", result)
    if plan.directions:
        write_comparison(result, output_dir)
    return result


def _routing_of(measurements: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """System -> language or direction -> routing, for the systems and names that have any."""
    found = {
        system: {name: value["routing"][name] for name in names if name in value["routing"]}
        for system, value in measurements.items()
    }
    return {system: routing for system, routing in found.items() if routing}


def _collect(
    plan: EvaluationPlan, identity: dict[str, Any], measurements: dict[str, Any], output_dir: Path
) -> dict[str, Any]:
    """Put all results into one dictionary: the content of evaluation.json."""
    comet = _CometScores(plan.comet, plan.device, output_dir) if plan.comet else None
    scored = {direction.name: _score_direction(plan, direction, output_dir, comet) for direction in plan.directions}
    return {
        "format_version": FORMAT_VERSION,
        "baseline": plan.baseline,
        "rival": plan.rival,
        "systems": {name: str(path) for name, path in plan.systems.items()},
        "num_test_segments": {direction.name: len(direction.references) for direction in plan.directions},
        "directions": {name: value["scores"] for name, value in scored.items()},
        "signatures": {name: value["signatures"] for name, value in scored.items()},
        "significance": {name: value["significance"] for name, value in scored.items()},
        "rival_significance": {name: value["rival_significance"] for name, value in scored.items()},
        "perplexity": {
            language: {name: measurements[name]["perplexity"][language] for name in plan.systems}
            for language in plan.monolingual
        },
        "routing": _routing_of(measurements, plan.monolingual),
        "routing_of_directions": _routing_of(measurements, scored),
        "seconds": {name: value["seconds"] for name, value in measurements.items()},
        "selection": plan.selection,
        "options": identity,
        "versions": evaluation_versions(),
        "commit": git_commit(),
    }
