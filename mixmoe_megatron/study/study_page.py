"""What a study leaves to read: study.html, study.md, study.csv, study.json; of each table a page, LaTeX and pictures.

The pages and study.json tell the seconds that the jobs took; all else is the same to the byte on the same CPU,
however often the study was killed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmoe_megatron.cli import write_json, write_text
from mixmoe_megatron.evaluation.provenance import cpu_model, evaluation_versions, git_commit, read_json
from mixmoe_megatron.markup import code_span, escape_markdown
from mixmoe_megatron.study.comparison import latex_comparison, markdown_comparison
from mixmoe_megatron.study.figures import draw_learning_curves, draw_plane, draw_series
from mixmoe_megatron.study.footprint import Footprint
from mixmoe_megatron.study.grid import Grid, absent_systems
from mixmoe_megatron.study.html_report import render_html
from mixmoe_megatron.study.jobs import with_parents
from mixmoe_megatron.study.statistics import Contrast, Estimate, seed_means
from mixmoe_megatron.study.study_results import RETENTION, TRANSLATION, TableResults, read_results
from mixmoe_megatron.study.tables import csv_text, p_value_text, signed, table

HOW_TO_READ = (
    "chrF++ is the mean over sentences; the change of bits per byte is against the untouched base (above 0: worse). "
    "Intervals: 95 %, of resampled seeds and resampled segments; with one seed they tell of other segments alone. A "
    "claim holds, or fails, where the sign-flip test over seeds is significant after Holm's correction in its table "
    "and the interval excludes 0; below 6 seeds it can't be told, whatever the difference."
)
COST_NOTE = (
    "Parameters in millions; active: those that a token meets. Trained: by each training, in its order. Operations of "
    "all trainings in 10^12, without padding; of the forward pass of a token in 10^6, behind half a sequence."
)
SECONDS_NOTE = (
    " Seconds on this machine, means over seeds: of all trainings with their start-up, of a translated segment."
)
_COUNTED = ("total", "active", "training_flops", "token_flops")
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


def _cost_table(footprints: Mapping[str, Footprint], seconds: bool) -> str:
    header = ["system", "parameters", "active", "trained", "operations, training", "operations, token"]
    rows = []
    for system, found in footprints.items():
        trained = " + ".join(f"{count / 1e6:.2f}" for count in found.trained)
        rows.append([system, f"{found.total / 1e6:.2f}", f"{found.active / 1e6:.2f}", trained,
                     f"{found.training_flops / 1e12:.2f}", f"{found.token_flops / 1e6:.2f}"])  # fmt: skip
        if seconds:
            rows[-1] += [f"{found.training_seconds:.0f}", f"{found.generation_seconds:.2f}"]
    if seconds:
        header += ["s, training", "s, segment"]
    return f"{COST_NOTE}{SECONDS_NOTE if seconds else ''}\n\n{table(header, rows)}"


def _table_section(grid: Grid, name: str, results: TableResults, pictures: Mapping[str, str], seconds: bool) -> str:
    entry = grid.content["tables"][name]
    corpus = {"directions": directions_of(results)}
    rows = []
    for system, scores in results.systems.items():
        retention, translation = scores.estimates
        loads = [" / ".join(f"{value:.2f}" for value in values) for values in zip(*scores.loads.values(), strict=True)]
        rows.append([system, _interval(translation), _change(retention), *(loads or ["", ""])])
    sentences = [f"- {escape_markdown(claim_sentence(*claim, contrast))}" for claim, contrast in results.claims.items()]
    parts = [
        f"## {escape_markdown(entry['title'])}",
        table(["system", "chrF++", "bits per byte, change", "load_max", "entropy"], rows),
        *(f"![{name}: {title}]({file})" for title, file in pictures.items()),
        "\n".join(sentences),
        _cost_table(results.footprints, seconds),
        f"Corpus scores, mean over seeds. {markdown_comparison(corpus)}",
    ]
    if paper := entry.get("paper"):
        known = [[str(row), *map(str, values)] for row, values in paper["rows"].items()]
        parts += [PAPER_NOTE, table(["BLEU", *paper["columns"]], known)]
    return "\n\n".join(parts)


def _draw(grid: Grid, name: str, results: TableResults, output_dir: Path) -> dict[str, str]:
    """Draw a table's pictures; returns title to file name."""
    pictures = {"retention against translation": f"table_{name}.png"}
    points = {system: scores.estimates for system, scores in results.systems.items()}
    draw_plane(points, output_dir / pictures["retention against translation"])
    if results.curves:
        pictures["loss on parallel text"] = f"table_{name}_loss.png"
        draw_learning_curves(results.curves, output_dir / pictures["loss on parallel text"])
    if axis := grid.content["tables"][name].get("axis"):
        systems = {system: value for system, value in axis["values"].items() if system in points}
        series = {str(value): points[system][1] for system, value in systems.items()}
        loads = {
            group: [results.systems[system].loads[group].load_max for system in systems]
            for group in results.systems[next(iter(systems))].loads
        }
        pictures[axis["title"]] = f"table_{name}_series.png"
        draw_series(series, loads, axis["title"], output_dir / pictures[axis["title"]])
    return pictures


def directions_of(results: TableResults) -> dict[str, dict[str, dict[str, float]]]:
    """Return direction to system to its corpus scores, as evaluation.json has them."""
    directions = next(iter(results.systems.values())).corpus
    return {name: {system: scores.corpus[name] for system, scores in results.systems.items()} for name in directions}


def _settings_section(grid: Grid) -> str:
    settings, rates = grid.settings, grid.size["learning_rates"]
    kinds = list(dict.fromkeys(kind for of_method in rates.values() for kind in of_method))
    lines = [
        f"Size {settings.size}, MINUTES={settings.minutes}, SEEDS={settings.seeds}, {settings.dtype}, base "
        f"{code_span(grid.base)}, {', '.join(settings.pairs)}, {grid.segments} segments each way at most.",
        f"All systems that read a kind of text train on it for the same "
        f"{'operations' if grid.steps else 'steps, on the same tokens'}; mixed text is both kinds in one, for the "
        "steps of both.",
        HOW_TO_READ,
        table(
            ["highest learning rate", *kinds],
            [
                [method, *(str(grid.rate(method, kind)) if kind in rates[method] else "" for kind in kinds)]
                for method in rates
            ],
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
        for group, load in scores.loads.items():
            rows += [[name, system, "all", f"{key} {group}", value, "", ""] for key, value in load._asdict().items()]
        found = results.footprints[system]
        rows += [[name, system, "all", key, getattr(found, key), "", ""] for key in _COUNTED]
        rows += [[name, system, "all", f"trained {index + 1}", value, "", ""]
                 for index, value in enumerate(found.trained)]  # fmt: skip
    for (first, second, endpoint), contrast in results.claims.items():
        rows.append([name, f"{first} - {second}", "all", endpoint, *contrast.estimate])
    return rows


def _record(grid: Grid, tables: Mapping[str, TableResults], root: Path) -> dict[str, Any]:
    jobs = with_parents(job for name in tables for row in grid.evaluations(name).values() for job in row)
    finished = {job.name: read_json(job.directory(root) / "done.json") for job in jobs}
    return {
        "settings": grid.settings._asdict(),
        "commit": git_commit(),
        "commits_of_jobs": sorted({str(done["commit"]) for done in finished.values()}),
        "footprints": {
            name: {system: found._asdict() for system, found in results.footprints.items()}
            for name, results in tables.items()
        },
        "versions": evaluation_versions(),
        "machine": cpu_model(),
        "claims": [
            {"table": name, "first": first, "second": second, "endpoint": endpoint, **contrast._asdict()}
            for name, results in tables.items()
            for (first, second, endpoint), contrast in results.claims.items()
        ],
        "seeds": {
            system: {
                endpoint: seed_means(blocks).tolist()
                for endpoint, blocks in ((TRANSLATION, scores.translation), (RETENTION, scores.retention))
            }
            for results in tables.values()
            for system, scores in results.systems.items()
        },
        "seconds": {name: done["seconds"] for name, done in finished.items()},
    }


def write_study(grid: Grid, names: list[str], output_dir: Path, root: Path) -> list[str]:
    """Write all files of a study.

    Args:
        grid: The study.
        names: Its tables; all their jobs have run.
        output_dir: Must exist.
        root: Directory of all jobs.

    Returns:
        The sentences of all claims, and where the page is.
    """
    tables = {name: read_results(grid, name, root) for name in names}
    rows = list[list[object]]()
    pictures = {name: _draw(grid, name, results, output_dir) for name, results in tables.items()}
    for name, results in tables.items():
        write_text(output_dir / f"table_{name}.tex", latex_comparison({"directions": directions_of(results)}))
        rows += _csv_rows(name, results)

    def sections(seconds: bool) -> dict[str, str]:
        return {name: _table_section(grid, name, found, pictures[name], seconds) for name, found in tables.items()}

    settings, timed = _settings_section(grid), sections(seconds=True)
    start = f"# The study\n\n{settings}\n\n"
    write_text(output_dir / "study.md", start + "\n\n".join(sections(seconds=False).values()) + "\n")
    write_text(output_dir / "study.html", render_html(start + "\n\n".join(timed.values()), output_dir))
    for name, section in timed.items():
        page = f"{section.removeprefix('#')}\n\n## Settings\n\n{settings}"
        write_text(output_dir / f"table_{name}.html", render_html(page, output_dir))
    write_text(output_dir / "study.csv",
               csv_text(["table", "system", "direction", "figure", "value", "low", "high"], rows))  # fmt: skip
    write_json(output_dir / "study.json", _record(grid, tables, root))
    sentences = [
        f"{name}: {claim_sentence(*claim, contrast)}"
        for name, found in tables.items()
        for claim, contrast in found.claims.items()
    ]
    return [*sentences, f"Page: {output_dir / 'study.html'}"]
