"""The paper's big table: systems by directions, BLEU, METEOR and COMET of each, the best in bold.

Two blocks, into English and out of it; written as Markdown, CSV, LaTeX and JSON.

Source: Mix-MoE (arXiv:2605.24681) Tables II and IV.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixmoe_megatron.cli import write_json, write_text
from mixmoe_megatron.markup import bold, escape_latex
from mixmoe_megatron.study.tables import METRIC_TITLES, csv_text, metrics_of, score_text, table

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


def is_into_english(direction: str) -> bool:
    """Tell whether a direction, of whatever test set, has English as its target."""
    return direction.partition("@")[0].endswith("-en")


def blocks(evaluation: dict[str, Any]) -> list[list[str]]:
    """Return the directions of each block: those into English, then all others."""
    into = [name for name in evaluation["directions"] if is_into_english(name)]
    others = [name for name in evaluation["directions"] if not is_into_english(name)]
    return [block for block in (into, others) if block]


def _rows(evaluation: dict[str, Any], block: list[str], embolden: Callable[[str], str]) -> dict[str, list[str]]:
    """Return system -> its cells in a block, column by column; the best shown score of each column in bold."""
    rows: dict[str, list[str]] = {system: [] for system in evaluation["directions"][block[0]]}
    for direction in block:
        for metric in columns_of(evaluation):
            scores = evaluation["directions"][direction]
            texts = {system: score_text(metric, scores[system][metric]) for system in rows}
            best = max(map(float, texts.values()))
            for system, text in texts.items():
                rows[system].append(embolden(text) if float(text) == best else text)
    return rows


def markdown_comparison(evaluation: dict[str, Any]) -> str:
    """Return the table as Markdown, one block below the other."""
    columns = columns_of(evaluation)
    parts = [", ".join(f"{letter} {METRIC_TITLES[name]}" for name, letter in columns.items()) + "; the best in bold."]
    for block in blocks(evaluation):
        header = ["system", *(f"{name.upper()} {letter}" for name in block for letter in columns.values())]
        parts.append(table(header, [[system, *cells] for system, cells in _rows(evaluation, block, bold).items()]))
    return "\n\n".join(parts)


def latex_comparison(evaluation: dict[str, Any]) -> str:
    """Return the table as LaTeX (booktabs), one tabular for each block."""
    letters = list(columns_of(evaluation).values())
    parts = []
    for block in blocks(evaluation):
        heads = "".join(rf"& \multicolumn{{{len(letters)}}}{{c}}{{{escape_latex(name.upper())}}} " for name in block)
        lines = [rf"\begin{{tabular}}{{l{'r' * len(letters) * len(block)}}}", r"\toprule", rf"{heads}\\"]
        lines += [rf"& {' & '.join(letters * len(block))} \\", r"\midrule"]
        rows = _rows(evaluation, block, r"\textbf{{{}}}".format)
        lines += [rf"{' & '.join([escape_latex(system), *cells])} \\" for system, cells in rows.items()]
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


def csv_comparison(evaluation: dict[str, Any]) -> str:
    """Return every score in full precision, a line for each system, direction and metric."""
    rows = [
        [system, direction, metric, value]
        for direction, systems in evaluation["directions"].items()
        for system, scores in systems.items()
        for metric, value in scores.items()
    ]
    return csv_text(["system", "direction", "metric", "score"], rows)


def write_comparison(evaluation: dict[str, Any], output_dir: Path) -> None:
    """Write comparison.md, .tex, .csv and .json.

    Args:
        evaluation: Content of evaluation.json with at least one direction.
        output_dir: Must exist.
    """
    write_text(output_dir / "comparison.md", markdown_comparison(evaluation) + "\n")
    write_text(output_dir / "comparison.tex", latex_comparison(evaluation))
    write_text(output_dir / "comparison.csv", csv_comparison(evaluation))
    write_json(output_dir / "comparison.json", evaluation["directions"])
