"""What a study leaves to read: study.html and study.md, a LaTeX file for each table, study.csv and study.json.

All but study.json, which tells what the jobs took, is the same to the byte whenever the same jobs are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmoe_megatron.cli import write_json, write_text
from mixmoe_megatron.evaluation.provenance import cpu_model, evaluation_versions, git_commit, read_json
from mixmoe_megatron.markup import code_span, escape_markdown
from mixmoe_megatron.study.comparison import latex_comparison, markdown_comparison
from mixmoe_megatron.study.figures import draw_plane
from mixmoe_megatron.study.grid import Grid, absent_systems
from mixmoe_megatron.study.html_report import render_html
from mixmoe_megatron.study.jobs import with_parents
from mixmoe_megatron.study.statistics import Contrast, Estimate
from mixmoe_megatron.study.study_results import RETENTION, TRANSLATION, TableResults, read_results
from mixmoe_megatron.study.tables import csv_text, p_value_text, signed, table

HOW_TO_READ = (
    "chrF++ is the mean over sentences; the change of bits per byte is against the untouched base (above 0: worse). "
    "Intervals: 95 %, of resampled seeds and resampled segments; with one seed they tell of other segments alone. A "
    "claim holds, or fails, where the sign-flip test over seeds is significant after Holm's correction in its table "
    "and the interval excludes 0; below 6 seeds it can't be told, whatever the difference."
)
PAPER_NOTE = "The paper's own (Llama-3.2-1B, its data; not comparable with the figures above):"


def _interval(value: Estimate, digits: int = 1) -> str:
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def _change(value: Estimate) -> str:
    return f"{signed(value.mean)} % [{signed(value.low)}, {signed(value.high)}]"


def claim_sentence(first: str, second: str, endpoint: str, contrast: Contrast) -> str:
    """Say in one sentence what can be said of a claim.

    Args:
        first: The system that should be better.
        second: The other one.
        endpoint: `TRANSLATION` or `RETENTION`.
        contrast: What was found.
    """
    estimate, unit = contrast.estimate, " chrF++" if endpoint == TRANSLATION else " percentage points of bits per byte"
    figures = f"{signed(estimate.mean, 2)}{unit}, {signed(estimate.low, 2)} to {signed(estimate.high, 2)}"
    found = f"{contrast.verdict} ({figures}; {p_value_text(contrast.adjusted)} after Holm)"
    return f"{first} better than {second} in {endpoint}: {found}."


def _table_section(grid: Grid, name: str, results: TableResults, picture: Path) -> str:
    entry = grid.content["tables"][name]
    corpus = {"directions": directions_of(results)}
    rows, points = [], {}
    for system, scores in results.systems.items():
        retention, translation = points[system] = scores.estimates
        load = "" if scores.load_max is None else f"{scores.load_max:.2f}"
        rows.append([system, _interval(translation), _change(retention), load])
    draw_plane(points, picture)
    sentences = [f"- {escape_markdown(claim_sentence(*claim, contrast))}" for claim, contrast in results.claims.items()]
    parts = [
        f"## {escape_markdown(entry['title'])}",
        table(["system", "chrF++", "bits per byte, change", "load_max"], rows),
        f"![{name}: retention against translation]({picture.name})",
        "\n".join(sentences),
        f"Corpus scores, mean over seeds. {markdown_comparison(corpus)}",
    ]
    if paper := entry.get("paper"):
        known = [[str(row), *map(str, values)] for row, values in paper["rows"].items()]
        parts += [PAPER_NOTE, table(["BLEU", *paper["columns"]], known)]
    return "\n\n".join(parts)


def directions_of(results: TableResults) -> dict[str, dict[str, dict[str, float]]]:
    """Return direction to system to its corpus scores, as evaluation.json has them."""
    directions = next(iter(results.systems.values())).corpus
    return {name: {system: scores.corpus[name] for system, scores in results.systems.items()} for name in directions}


def _settings_section(grid: Grid) -> str:
    settings, rates = grid.settings, grid.size["learning_rates"]
    lines = [
        f"Size {settings.size}, MINUTES={settings.minutes}, SEEDS={settings.seeds}, {settings.dtype}, base "
        f"{code_span(grid.base)}, {', '.join(settings.pairs)}, {grid.segments} segments each way at most.",
        HOW_TO_READ,
        table(
            ["highest learning rate", "monolingual", "parallel"],
            [[method, str(rate["monolingual"]), str(rate["parallel"])] for method, rate in rates.items()],
        ),
    ]
    if absent := absent_systems(grid.content):
        lines.append(f"Left out, because this version lacks their method: {', '.join(map(escape_markdown, absent))}.")
    return "\n\n".join(lines)


def _csv_rows(name: str, results: TableResults) -> list[list[object]]:
    rows: list[list[object]] = []
    for system, scores in results.systems.items():
        for direction, metrics in scores.corpus.items():
            rows += [[name, system, direction, metric, value, "", ""] for metric, value in metrics.items()]
        for endpoint, value in zip((RETENTION, TRANSLATION), scores.estimates, strict=True):
            rows.append([name, system, "all", endpoint, *value])
        if scores.load_max is not None:
            rows.append([name, system, "all", "load_max", scores.load_max, "", ""])
    for (first, second, endpoint), contrast in results.claims.items():
        rows.append([name, f"{first} - {second}", "all", endpoint, *contrast.estimate])
    return rows


def _record(grid: Grid, tables: Mapping[str, TableResults], root: Path) -> dict[str, Any]:
    jobs = with_parents(job for name in tables for row in grid.evaluations(name).values() for job in row)
    return {
        "settings": grid.settings._asdict(),
        "commit": git_commit(),
        "versions": evaluation_versions(),
        "machine": cpu_model(),
        "claims": [
            {"table": name, "first": first, "second": second, "endpoint": endpoint, **contrast._asdict()}
            for name, results in tables.items()
            for (first, second, endpoint), contrast in results.claims.items()
        ],
        "seconds": {job.name: read_json(job.directory(root) / "done.json")["seconds"] for job in jobs},
    }


def write_study(grid: Grid, names: list[str], output_dir: Path, root: Path) -> list[str]:
    """Write all files of a study.

    Args:
        grid: The study.
        names: Its tables; all their jobs have run.
        output_dir: Must exist.
        root: Directory of all jobs.

    Returns:
        The sentences of all claims.
    """
    tables = {name: read_results(grid, name, root) for name in names}
    sections, rows = ["# The study", _settings_section(grid)], list[list[object]]()
    for name, results in tables.items():
        sections.append(_table_section(grid, name, results, output_dir / f"table_{name}.png"))
        write_text(output_dir / f"table_{name}.tex", latex_comparison({"directions": directions_of(results)}))
        rows += _csv_rows(name, results)
    text = "\n\n".join(sections) + "\n"
    write_text(output_dir / "study.md", text)
    write_text(output_dir / "study.html", render_html(text, output_dir))
    write_text(output_dir / "study.csv",
               csv_text(["table", "system", "direction", "figure", "value", "low", "high"], rows))  # fmt: skip
    write_json(output_dir / "study.json", _record(grid, tables, root))
    return [
        f"{name}: {claim_sentence(*claim, contrast)}"
        for name, found in tables.items()
        for claim, contrast in found.claims.items()
    ]
