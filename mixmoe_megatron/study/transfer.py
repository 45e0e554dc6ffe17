"""Cross-lingual transfer: models whose stage 2 saw one language pair each, tested in the directions of all pairs.

Rows are training pairs, columns test directions. A gain above 0 is better, whatever the metric: TER's is turned round.

Source: Mix-MoE (arXiv:2605.24681) V-G. Figure 4 is stage 1's row of the gains over the base, Figure 5 the gains over
stage 1. The paper does not say which languages that stage 1 had seen; here every row starts from the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from mixmoe_megatron.cli import write_json, write_text
from mixmoe_megatron.data.languages import check_language
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.markup import bold, escape_markdown
from mixmoe_megatron.study.comparison import blocks, is_into_english
from mixmoe_megatron.study.figures import Gain, draw_gains
from mixmoe_megatron.study.html_report import render_html
from mixmoe_megatron.study.report import TOY_NOTE, check_evaluation
from mixmoe_megatron.study.tables import METRIC_TITLES, csv_text, metrics_of, score_text, shown, signed, table
from mixmoe_megatron.study.verdict import MIN_TESTED_SEGMENTS, SIGNIFICANT

_LOWER_IS_BETTER = {"ter"}
_NOTE = (
    "Each row is a model whose stage 2 saw one language pair only, in both directions; the columns are test "
    "directions, the row's own pair in bold. Gains above 0 are better, those of TER too. An asterisk: p < {level} by "
    "paired bootstrap (BLEU and chrF, against {baseline}, from {segments} test segments on; of {cells} such tests a "
    "metric, {chance:.0f} would be below it by chance)."
)


def _pair_of(direction: str) -> frozenset[str]:
    return frozenset(direction.partition("@")[0].split("-"))


def _check_pairs(evaluation: dict[str, Any], trained: Mapping[str, str], stage1: str | None) -> None:
    """Refuse what no matrix can be made of: every system needs its part, every part its system."""
    baseline, directions = evaluation["baseline"], evaluation["directions"]
    if baseline is None:
        raise MixMoEError("The evaluation has no base to gain over: run evaluate_translation.py with --baseline NAME.")
    systems = list(dict.fromkeys(system for scores in directions.values() for system in scores))
    for name in (*trained, *([stage1] if stage1 else [])):
        if name not in systems:
            raise MixMoEError(f"The evaluation has no system {name!r}: it has {', '.join(systems) or 'none'}.")
        if name == baseline or (name == stage1 and name in trained):
            raise MixMoEError(f"{name!r} cannot be two things: name each of base, stage 1 and trained models once.")
    for name in systems:
        if name not in (baseline, stage1, *trained):
            raise MixMoEError(f"System {name!r} has no training pair: give --trained {name}=PAIR, such as de-en.")
    if not trained:
        raise MixMoEError("No system was trained on a pair: give --trained NAME=PAIR.")
    for name, pair in trained.items():
        languages = pair.split("-")
        if len(languages) != 2 or languages[0] == languages[1]:
            raise MixMoEError(f"The training pair of {name!r} must be two languages, such as de-en, not {pair!r}.")
        for language in languages:
            check_language(language)
        own = [direction for direction in directions if _pair_of(direction) == frozenset(languages)]
        if not own:
            raise MixMoEError(f"{name!r} was trained on {pair}, which is not tested: evaluate with --test {pair}=FILE.")
        if len(own) == len(directions):
            raise MixMoEError(f"Only {pair}, on which {name!r} was trained, is tested: evaluate other pairs too.")


def _scores(
    evaluation: dict[str, Any], metric: str, systems: list[str], directions: list[str]
) -> dict[str, dict[str, float]]:
    """Return system -> direction -> score."""
    rows: dict[str, dict[str, float]] = {system: {} for system in systems}
    for direction, system in product(directions, systems):
        value = evaluation["directions"][direction].get(system, {}).get(metric)
        if value is None:
            raise MixMoEError(
                f"The evaluation has no {METRIC_TITLES[metric]} of {system!r} in {direction}: "
                "evaluate all systems in all directions."
            )
        rows[system][direction] = value
    return rows


def gains(metric: str, scores: dict[str, float], reference: dict[str, float]) -> dict[str, float]:
    """Return direction -> score minus the reference's, in the metric's own unit; of TER, the reference's minus it."""
    if metric in _LOWER_IS_BETTER:
        scores, reference = reference, scores
    return {direction: value - reference[direction] for direction, value in scores.items()}


def mean_gains(row: dict[str, float], pair: str | None) -> dict[str, float | int | None]:
    """Sum up a row of gains.

    Args:
        row: Direction to gain.
        pair: On which the row's model was trained; None: on none, so that all directions are others.

    Returns:
        ``own``, ``others_into_english``, ``others_out_of_english``: mean gains, None where there is no such direction;
        ``better``, ``others``: how many of the other directions gain, and how many there are.
    """
    parts: dict[str, list[float]] = {"own": [], "others_into_english": [], "others_out_of_english": []}
    for direction, gain in row.items():
        is_own = pair is not None and _pair_of(direction) == _pair_of(pair)
        other = "others_into_english" if is_into_english(direction) else "others_out_of_english"
        parts["own" if is_own else other].append(gain)
    others = parts["others_into_english"] + parts["others_out_of_english"]
    means = {name: fmean(part) if part else None for name, part in parts.items()}
    return {**means, "better": sum(gain > 0 for gain in others), "others": len(others)}


def transfer_matrix(evaluation: dict[str, Any], trained: dict[str, str], stage1: str | None = None) -> dict[str, Any]:
    """Put an evaluation into matrices of training pairs by test directions.

    Args:
        evaluation: Content of evaluation.json with a baseline: the dense base.
        trained: System to its training pair, such as ``{"mixmoe": "de-en"}``: all systems but the base and stage 1.
        stage1: The system that the trained ones started from, which gains are measured against too; None: no such one.

    Returns:
        The content of transfer.json. ``references``: the base and stage 1. ``directions``: those into English first.
        ``metrics``: for each ``scores`` (system -> direction -> score), ``gains`` (reference
        -> system -> direction -> gain), ``means`` (reference -> system -> `mean_gains`) and ``p_values`` (system ->
        direction -> of the difference to the base, where it was tested).

    Raises:
        MixMoEError: This is no evaluation.json, it has no baseline, a system has no training pair or a pair no system,
            a training pair is not tested or is the only one, or a score is missing.
    """
    check_evaluation(evaluation)
    _check_pairs(evaluation, trained, stage1)
    references = [evaluation["baseline"], *([stage1] if stage1 else [])]
    directions = [name for block in blocks(evaluation) for name in block]
    metrics = {}
    for metric in metrics_of(evaluation):
        scores = _scores(evaluation, metric, [*references, *trained], directions)
        block: dict[str, Any] = {"scores": scores, "gains": {}, "means": {}, "p_values": {}}
        for reference in references:
            later = list(scores)[list(scores).index(reference) + 1 :]  # what came of the reference
            rows = {system: gains(metric, scores[system], scores[reference]) for system in later}
            block["gains"][reference] = rows
            block["means"][reference] = {system: mean_gains(row, trained.get(system)) for system, row in rows.items()}
        for system in block["gains"][references[0]]:
            tests = {direction: test.get(system, {}) for direction, test in evaluation["significance"].items()}
            name = f"{metric}_p_value"
            block["p_values"][system] = {direction: test[name] for direction, test in tests.items() if name in test}
        metrics[metric] = block
    kept = ("num_test_segments", "signatures", "options", "versions", "commit")
    facts = {"references": references, "trained": trained, "directions": directions, "metrics": metrics}
    return facts | {key: evaluation[key] for key in kept}


def row_name(matrix: dict[str, Any], system: str) -> str:
    """Return what a row is called: its training pair, with the system's name where that is another."""
    pair = matrix["trained"].get(system, system)
    return pair if pair == system else f"{pair} ({system})"


def gain_cells(matrix: dict[str, Any], metric: str, reference: str) -> dict[str, list[str]]:
    """Return system -> the texts of its gains over a reference; an asterisk where the base's test is significant."""
    block, counts = matrix["metrics"][metric], matrix["num_test_segments"]
    tested = block["p_values"] if reference == matrix["references"][0] else {}

    def text(system: str, direction: str, gain: float) -> str:
        p_value = tested.get(system, {}).get(direction, 1.0)
        significant = gain and p_value < SIGNIFICANT and counts[direction] >= MIN_TESTED_SEGMENTS
        return signed(shown(metric, gain)) + ("*" if significant else "")

    return {
        system: [text(system, direction, gain) for direction, gain in row.items()]
        for system, row in block["gains"][reference].items()
    }


def _is_own(matrix: dict[str, Any], system: str, direction: str) -> bool:
    pair = matrix["trained"].get(system)
    return pair is not None and _pair_of(direction) == _pair_of(pair)


def _matrix_table(matrix: dict[str, Any], rows: dict[str, list[str]]) -> str:
    directions = matrix["directions"]
    lines = []
    for system, texts in rows.items():
        cells = zip(directions, texts, strict=True)
        shown_cells = [bold(text) if _is_own(matrix, system, direction) else text for direction, text in cells]
        lines.append([row_name(matrix, system), *shown_cells])
    return table(["trained on", *directions], lines)


def _means_table(matrix: dict[str, Any], reference: str) -> str:
    rows = []
    for metric, block in matrix["metrics"].items():
        for system, means in block["means"][reference].items():
            texts = ["" if means[key] is None else signed(shown(metric, means[key]))
                     for key in ("own", "others_into_english", "others_out_of_english")]  # fmt: skip
            better = f"{means['better']} of {means['others']}"
            rows.append([row_name(matrix, system), METRIC_TITLES[metric], *texts, better])
    header = ["trained on", "metric", "own pair", "others into English", "others out of English", "others that gain"]
    return table(header, rows, text_columns=2)


def picture_name(metric: str) -> str:
    """Return the file name of a metric's heatmap."""
    return f"transfer_{metric}.png"


def markdown_transfer(matrix: dict[str, Any], *, toy: bool = False) -> str:
    """Return transfer.md: mean gains, then for each metric the heatmap, the scores and the gains.

    Args:
        matrix: Of `transfer_matrix`.
        toy: Whether to say on top that the figures are toy-sized.
    """
    references, directions = matrix["references"], matrix["directions"]
    cells = len(directions) * (len(references) - 1 + len(matrix["trained"]))
    counts = ", ".join(f"{escape_markdown(name)} {matrix['num_test_segments'][name]}" for name in directions)
    parts = ["# Cross-lingual transfer", *([TOY_NOTE] if toy else [])]
    numbers = {"level": SIGNIFICANT, "segments": MIN_TESTED_SEGMENTS, "cells": cells, "chance": SIGNIFICANT * cells}
    parts.append(_NOTE.format(baseline=escape_markdown(references[0]), **numbers))
    parts.append(f"Test segments: {counts}. The models computed in {matrix['options']['dtype']}.")
    for reference in references:
        parts += [f"## Mean gain over {escape_markdown(reference)}", _means_table(matrix, reference)]
    for metric, block in matrix["metrics"].items():
        title = METRIC_TITLES[metric]
        scores = {name: [score_text(metric, value) for value in row.values()] for name, row in block["scores"].items()}
        parts += [f"## {title}", f"![Gains of {title}]({picture_name(metric)})", _matrix_table(matrix, scores)]
        for reference in references:
            gains_table = _matrix_table(matrix, gain_cells(matrix, metric, reference))
            parts += [f"Gain over {escape_markdown(reference)}:", gains_table]
    parts.append(f"Commit: {matrix['commit'] or 'not in a git checkout'}.")
    return "\n\n".join(parts) + "\n"


def csv_transfer(matrix: dict[str, Any]) -> str:
    """Return every score and gain in full precision, a line for each system, direction and metric."""
    rows: list[list[object]] = []
    references = matrix["references"]
    header = ["system", "trained_on", "direction", "own_pair", "metric", "score"]
    for metric, block in matrix["metrics"].items():
        for system, row in block["scores"].items():
            for direction, score in row.items():
                over = [block["gains"][name].get(system, {}).get(direction, "") for name in references]
                own, pair = int(_is_own(matrix, system, direction)), matrix["trained"].get(system, "")
                p_value = block["p_values"].get(system, {}).get(direction, "")
                rows.append([system, pair, direction, own, metric, score, *over, p_value])
    return csv_text([*header, *(f"gain_over_{name}" for name in references), "p_value"], rows)


def draw_transfer(matrix: dict[str, Any], metric: str, path: Path) -> None:
    """Draw a metric's gains over the base, and over stage 1 where there is one, as heatmaps; own pairs are framed."""
    panels = {}
    for reference, rows in matrix["metrics"][metric]["gains"].items():
        texts = gain_cells(matrix, metric, reference)
        panels[f"{METRIC_TITLES[metric]}: gain over {reference}"] = {
            row_name(matrix, system): [
                Gain(shown(metric, value), text, _is_own(matrix, system, direction))
                for (direction, value), text in zip(row.items(), texts[system], strict=True)
            ]
            for system, row in rows.items()
        }
    draw_gains(panels, matrix["directions"], path)


def write_transfer(matrix: dict[str, Any], output_dir: Path, *, toy: bool = False) -> None:
    """Write transfer.md, .html, .csv, .json and a heatmap for each metric.

    Args:
        matrix: Of `transfer_matrix`.
        output_dir: Created if absent.
        toy: See `markdown_transfer`.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    for metric in matrix["metrics"]:
        draw_transfer(matrix, metric, output_dir / picture_name(metric))
    text = markdown_transfer(matrix, toy=toy)
    write_text(output_dir / "transfer.md", text)
    write_text(output_dir / "transfer.html", render_html(text, output_dir))
    write_text(output_dir / "transfer.csv", csv_transfer(matrix))
    write_json(output_dir / "transfer.json", matrix)
