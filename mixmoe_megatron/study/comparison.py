"""The paper's big table: systems by directions, BLEU, METEOR and COMET of each, the best in bold.

Two blocks, into English and out of it; written as Markdown, CSV, LaTeX and JSON.

Source: Mix-MoE (arXiv:2605.24681) Tables II and IV.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixmoe_megatron.cli import whole_file, write_json
from mixmoe_megatron.markup import bold, escape_latex
from mixmoe_megatron.study.tables import METRIC_TITLES, metrics_of, score_text, table

#: the columns of a direction, and what stands in for a metric that was not measured
COLUMNS = (("bleu", "B", None), ("meteor", "M", "chrf"), ("comet", "C", "chrf_plus_plus"))
COMPARISON_SUFFIXES = ("md", "tex", "csv", "json")
_LETTERS = {"chrf": "F", "chrf_plus_plus": "F+"}


def columns_of(evaluation: dict[str, Any]) -> dict[str, str]:
    """Return metric -> column letter: B, M, C; chrF (F) and chrF++ (F+) where METEOR or COMET are missing."""
    present = metrics_of(evaluation)
    chosen = [(name, letter) if name in present else (other, _LETTERS.get(other or "", ""))
              for name, letter, other in COLUMNS]  # fmt: skip
    return {name: letter for name, letter in chosen if name in present}


def blocks(evaluation: dict[str, Any]) -> list[list[str]]:
    """Return the directions of each block: those into English, then all others."""
    into = [name for name in evaluation["directions"] if name.partition("@")[0].endswith("-en")]
    others = [name for name in evaluation["directions"] if name not in into]
    return [block for block in (into, others) if block]


def best_systems(evaluation: dict[str, Any], direction: str, metric: str) -> set[str]:
    """Return the systems whose shown score is the best of a direction."""
    shown = {
        system: float(score_text(metric, scores[metric]))
        for system, scores in evaluation["directions"][direction].items()
    }
    return {system for system, value in shown.items() if value == max(shown.values())}


def markdown_comparison(evaluation: dict[str, Any]) -> str:
    """Return the table as Markdown, one block below the other."""
    columns = columns_of(evaluation)
    parts = [", ".join(f"{letter} {METRIC_TITLES[name]}" for name, letter in columns.items()) + "; the best in bold."]
    for block in blocks(evaluation):
        header = ["system", *(f"{name.upper()} {letter}" for name in block for letter in columns.values())]
        parts.append(table(header, [[system, *cells] for system, cells in _rows(evaluation, block, bold)]))
    return "\n\n".join(parts)


def _rows(evaluation: dict[str, Any], block: list[str], embolden: Callable[[str], str]) -> list[tuple[str, list[str]]]:
    columns = columns_of(evaluation)
    best = {(name, metric): best_systems(evaluation, name, metric) for name in block for metric in columns}
    return [
        (
            system,
            [
                embolden(text) if system in best[name, metric] else text
                for name in block
                for metric in columns
                for text in [score_text(metric, evaluation["directions"][name][system][metric])]
            ],
        )
        for system in evaluation["directions"][block[0]]
    ]


def latex_comparison(evaluation: dict[str, Any]) -> str:
    """Return the table as LaTeX (booktabs), one tabular for each block."""
    columns = columns_of(evaluation)
    parts = []
    for block in blocks(evaluation):
        heads = " & ".join(rf"\multicolumn{{{len(columns)}}}{{c}}{{{escape_latex(name.upper())}}}" for name in block)
        letters = " & ".join(letter for _ in block for letter in columns.values())
        lines = [rf"\begin{{tabular}}{{l{'r' * len(columns) * len(block)}}}", r"\toprule", rf"& {heads} \\"]
        lines += [rf"& {letters} \\", r"\midrule"]
        rows = _rows(evaluation, block, r"\textbf{{{}}}".format)
        lines += [rf"{escape_latex(system)} & {' & '.join(cells)} \\" for system, cells in rows]
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


def csv_comparison(evaluation: dict[str, Any]) -> str:
    """Return every score in full precision, a line for each system, direction and metric."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["system", "direction", "metric", "score"])
    for direction, systems in evaluation["directions"].items():
        for system, scores in systems.items():
            writer.writerows([system, direction, metric, value] for metric, value in scores.items())
    return stream.getvalue()


def write_comparison(evaluation: dict[str, Any], output_dir: Path) -> None:
    """Write comparison.md, .tex, .csv and .json.

    Args:
        evaluation: Content of evaluation.json with at least one direction.
        output_dir: Must exist.
    """
    texts = {
        "md": markdown_comparison(evaluation) + "\n",
        "tex": latex_comparison(evaluation),
        "csv": csv_comparison(evaluation),
    }
    for suffix, text in texts.items():
        with whole_file(output_dir / f"comparison.{suffix}") as stream:
            stream.write(text)
    write_json(output_dir / "comparison.json", evaluation["directions"])
