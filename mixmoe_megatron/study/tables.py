"""Results as tables that read well both on a terminal and as Markdown.

Written without pandas on purpose: its tables are a few lines shorter here, and importing it with its LaTeX writer takes
as long as all else that an evaluation imports for its tables.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from mixmoe_megatron.markup import Markdown, escape_markdown
from mixmoe_megatron.study.interference import interference

METRIC_TITLES = {
    "bleu": "BLEU", "chrf": "chrF", "chrf_plus_plus": "chrF++", "ter": "TER", "meteor": "METEOR", "comet": "COMET"
}  # fmt: skip
_PERCENT = {"meteor", "comet"}  # 0 to 1 as they come, shown times 100 as the paper does


def metrics_of(evaluation: dict[str, Any]) -> dict[str, str]:
    """Return the metrics that an evaluation has, with their titles."""
    measured = {name for systems in evaluation["directions"].values() for scores in systems.values() for name in scores}
    return {name: title for name, title in METRIC_TITLES.items() if name in measured}


def values_of(groups: dict[str, dict[str, Any]], name: str) -> dict[str, dict[str, float]]:
    """Return group -> system -> one of its values; a group is a direction or a language of evaluation.json."""
    return {group: {system: values[name] for system, values in systems.items()} for group, systems in groups.items()}


def shown(metric: str, value: float) -> float:
    """Return a score, or a difference of scores, as tables and pictures show it: METEOR and COMET times 100."""
    return 100 * value if metric in _PERCENT else value


def score_text(metric: str, value: float) -> str:
    """Return a score with one digit, see `shown`."""
    return f"{shown(metric, value):.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Return an aligned Markdown table.

    Args:
        header: Column titles.
        rows: Cells, as many a row as there are titles; shown as they are, unless they are `Markdown`.
        text_columns: How many columns, from the left, are aligned left; the others are aligned right.
    """
    cells = [
        [cell if isinstance(cell, Markdown) else escape_markdown(str(cell)) for cell in row] for row in (header, *rows)
    ]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (cell.ljust(width) if column < text_columns else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if column < text_columns else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a CSV file's text, numbers in full precision.

    Args:
        header: Column titles.
        rows: Values, as many a row as there are titles.
    """
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    return stream.getvalue()


def signed(value: float, digits: int = 1) -> str:
    """Return a number with its sign, as in +1.5; one that rounds to 0 has none."""
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


def p_value_text(p_value: float) -> str:
    """Return `p = 0.012`, or `p < 0.001` below what three digits show."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def score_table(evaluation: dict[str, Any]) -> str:
    """Return the table of translation scores; differences are against the baseline, with the bootstrap's p-value.

    Args:
        evaluation: Content of evaluation.json.
    """
    baseline = evaluation["baseline"]
    metrics = metrics_of(evaluation)
    header = ["direction", "system", *metrics.values()]
    if baseline is not None:
        header += [f"chrF against {baseline}", f"BLEU against {baseline}"]
    rows = []
    for direction, systems in evaluation["directions"].items():
        for system, scores in systems.items():
            row = [direction, system, *(score_text(metric, scores[metric]) for metric in metrics)]
            if test := evaluation["significance"].get(direction, {}).get(system):
                row += [_difference(test, metric) for metric in ("chrf", "bleu")]
            rows.append(row + [""] * (len(header) - len(row)))
    return table(header, rows, text_columns=2)


def _difference(test: dict[str, Any], metric: str) -> str:
    return f"{signed(test[f'{metric}_difference'], 2)} ({p_value_text(test[f'{metric}_p_value'])})"


def perplexity_table(evaluation: dict[str, Any]) -> str:
    """Return the table of perplexities; the last column is the change of bits per byte against the baseline.

    Args:
        evaluation: Content of evaluation.json.
    """
    baseline = evaluation["baseline"]
    header = ["language", "system", "perplexity", "bits per byte"]
    if baseline is not None:
        header.append(f"change against {baseline}")
    rows = []
    for language, systems in evaluation["perplexity"].items():
        for system, value in systems.items():
            row = [language, system, f"{value['perplexity']:.2f}", f"{value['bits_per_byte']:.3f}"]
            if baseline is not None:
                change = value["bits_per_byte"] / systems[baseline]["bits_per_byte"] - 1.0
                row.append("" if system == baseline else f"{signed(100 * change)} %")
            rows.append(row)
    return table(header, rows, text_columns=2)


def routing_table(routing: dict[str, Any]) -> str:
    """Return one model's expert shares, a row for each layer, group and language.

    Args:
        routing: Language to the content of `Routing.to_dict`.
    """
    rows = [
        [layer, group, language, *(f"{100 * share:.0f} %" for share in value["share"]), f"{value['load_balance']:.2f}",
         f"{value['top_prob']:.2f}"]
        for layer in next(iter(routing.values()))["layers"]
        for group in next(iter(routing.values()))["layers"][layer]
        for language, measured in routing.items()
        for value in [measured["layers"][layer][group]]
    ]  # fmt: skip
    experts = len(rows[0]) - 5
    header = ["layer", "group", "text", *(f"expert {index}" for index in range(experts)), "n Σ f P", "top prob"]
    return table(header, rows, text_columns=3)


def interference_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as one Markdown table; English, which is on a side of every pair, has no translation columns."""
    header = ["language", "system", "perplexity", "bits per byte", "chrF into English", "chrF from English"]
    cells = []
    for row in rows:
        line = [row["language"], row["system"], "", ""]
        if row["perplexity"]:
            line[2] = " -> ".join(f"{value:.1f}" for value in row["perplexity"])
            change, low, high = row["bits_per_byte_change"]
            interval = "" if low is None else f" [{signed(low)}, {signed(high)}]"
            line[3] = f"{signed(change)} %{interval}"
        for wanted in (f"{row['language']}-en", f"en-{row['language']}"):
            found = [value for name, value in row["directions"].items() if name.partition("@")[0] == wanted]
            line.append("; ".join(_change(value) for value in found))
        cells.append(line)
    return table(header, cells, text_columns=2)


def _change(value: dict[str, Any]) -> str:
    before, after = (
        f"{score:.1f} ± {half:.1f}" if half else f"{score:.1f}"
        for score, half in zip(value["chrf"], value["interval"], strict=True)
    )
    return f"{before} -> {after}"


def specialisation_table(measures: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the measures of `routing.specialisation`, a row for each layer and group."""
    rows = [
        [layer, group, f"{value['mutual_information']:.3f}", f"{100 * value['normalised']:.1f} %",
         f"{value['entropy']:.2f}", f"{value['mean_entropy']:.2f}"]
        for layer, groups in measures.items() for group, value in groups.items()
    ]  # fmt: skip
    header = ["layer", "group", "mutual information (bits)", "of the most", "entropy (bits)", "entropy over all"]
    return table(header, rows, text_columns=2)


def format_tables(evaluation: dict[str, Any]) -> str:
    """Return all tables of an evaluation for the terminal.

    Args:
        evaluation: Content of evaluation.json.
    """
    parts = []
    if evaluation["directions"]:
        counts = ", ".join(f"{name}: {count} segments" for name, count in evaluation["num_test_segments"].items())
        parts.append(f"Translation, sacreBLEU ({counts})\n\n{score_table(evaluation)}")
    if evaluation["perplexity"]:
        parts.append(f"Perplexity on monolingual text\n\n{perplexity_table(evaluation)}")
    if rows := interference(evaluation):
        parts.append(f"Before and after, language by language (95 % intervals)\n\n{interference_table(rows)}")
    parts += [f"Routing of {name}\n\n{routing_table(routing)}" for name, routing in evaluation["routing"].items()]
    return "\n\n".join(parts)
