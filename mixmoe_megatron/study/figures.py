"""The report's pictures, in colours that colour-blind readers can tell apart (Okabe and Ito; cividis; PuOr)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from mixmoe_megatron.study.retention_curve import retention_curves, tokens_seen
from mixmoe_megatron.study.statistics import Estimate
from mixmoe_megatron.study.tables import values_of
from mixmoe_megatron.study.training_log import Curves

PALETTE = ("#7F7F7F", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
AUX_LOSSES = {
    "lm_load_balancing_loss": ("LM experts", PALETTE[2]),
    "mt_load_balancing_loss": ("MT experts", PALETTE[4]),
}
_DPI = 150
_SMOOTHING_PARTS = 20


class Gain(NamedTuple):
    """A cell of `draw_gains`: the value, its text, and whether it is of the row's own pair."""

    value: float
    text: str
    own: bool


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG atomically; names of users are no formulas."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.png")
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    figure.savefig(temporary, dpi=_DPI)
    os.replace(temporary, path)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def smooth(values: Sequence[float]) -> list[float]:
    """Return the centred moving average over a twentieth of the values, over what there is of it at both ends."""
    reach = len(values) // (2 * _SMOOTHING_PARTS)
    windows = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw_loss_curves(stages: dict[str, Curves], path: Path) -> None:
    """Draw loss and aux losses of each stage over its steps.

    Args:
        stages: Title of a stage to its curves.
        path: The PNG file.
    """
    figure = Figure(figsize=(5.2 * len(stages), 6.0), layout="constrained")
    grid = figure.subplots(2, len(stages), squeeze=False, sharex="col", height_ratios=[3, 2])
    for column, (title, curves) in enumerate(stages.items()):
        upper, lower = grid[0][column], grid[1][column]
        steps, values = zip(*curves["lm_loss"], strict=True)
        upper.plot(steps, values, color="0.75", linewidth=0.8, label="each step")
        upper.plot(steps, smooth(values), color=PALETTE[2], linewidth=2.0, label="moving average")
        upper.set_title(title)
        upper.legend(frameon=False)
        for name, (label, colour) in AUX_LOSSES.items():
            if name in curves:
                steps, values = zip(*curves[name], strict=True)
                lower.plot(steps, values, color=colour, linewidth=1.4, label=label)
        lower.axhline(1.0, color="0.4", linestyle=":", linewidth=1.2, label="balanced (1)")
        lower.set_xlabel("step")
        lower.legend(frameon=False)
        _tidy(upper)
        _tidy(lower)
    grid[0][0].set_ylabel("cross-entropy (nats per token)")
    grid[1][0].set_ylabel("aux loss, unweighted")
    _save(figure, path)


def draw_retention(stages: dict[str, Curves], dense_bits: Mapping[str, float], path: Path) -> None:
    """Draw bits a byte of each held-out text over the tokens that a stage has seen, over its steps where unknown.

    Args:
        stages: Title of a stage to its curves; each with `retention_curves`.
        dense_bits: Bits a byte of the dense base by text, drawn as a dashed line.
        path: The PNG file.
    """
    figure = Figure(figsize=(5.2 * len(stages), 4.0), layout="constrained")
    grid = figure.subplots(1, len(stages), squeeze=False)[0]
    for axes, (title, curves) in zip(grid, stages.items(), strict=True):
        tokens = tokens_seen(curves)
        for index, (text, points) in enumerate(retention_curves(curves).items()):
            colour = PALETTE[(index + 1) % len(PALETTE)]
            places = [tokens[step] / 1e6 if tokens else step for step, _ in points]
            axes.plot(places, [value for _, value in points], color=colour, marker="o", markersize=3, label=f" {text}")
            if text in dense_bits:
                axes.axhline(dense_bits[text], color=colour, linestyle="--", label=f" {text}, dense base")
        axes.set_title(title)
        axes.set_xlabel("tokens seen (millions)" if tokens else "step")
        axes.legend(frameon=False)
        _tidy(axes)
    grid[0].set_ylabel("bits per byte of held-out text")
    _save(figure, path)


def _grouped_bars(axes: Axes, groups: dict[str, dict[str, float]], title: str, digits: int) -> None:
    """Draw {group: {system: value}} as bars with their values on top; legends leave out labels that begin with _."""
    systems = list(next(iter(groups.values())))
    width = 0.8 / len(systems)
    for index, system in enumerate(systems):
        places = [place + (index - (len(systems) - 1) / 2) * width for place in range(len(groups))]
        bars = axes.bar(places, [values[system] for values in groups.values()], width=0.92 * width,
                        color=PALETTE[index % len(PALETTE)], label=f" {system}")  # fmt: skip
        axes.bar_label(bars, fmt=f"%.{digits}f", fontsize=8, padding=2)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_title(title, loc="left")
    axes.margins(y=0.15)
    axes.set_ylim(0.0, max(1.0, axes.get_ylim()[1]))
    _tidy(axes)


def draw_scores(evaluation: dict[str, Any], path: Path) -> None:
    """Draw BLEU and chrF of each direction and bits per byte of each language, a bar for each system.

    Args:
        evaluation: Content of evaluation.json.
        path: The PNG file.
    """
    panels = [
        (values_of(evaluation["directions"], "bleu"), "BLEU (higher is better)", 1),
        (values_of(evaluation["directions"], "chrf"), "chrF (higher is better)", 1),
        (values_of(evaluation["perplexity"], "bits_per_byte"), "Bits per byte (lower is better)", 2),
    ]
    panels = [panel for panel in panels if panel[0]]
    bars = max(len(groups) * len(next(iter(groups.values()))) for groups, _, _ in panels)
    figure = Figure(figsize=(max(6.0, 0.5 * bars + 1.5), 2.6 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        _grouped_bars(axes, *panel)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    _save(figure, path)


def draw_plane(points: Mapping[str, tuple[Estimate, Estimate]], path: Path) -> None:
    """Draw systems by what they keep and what they translate, each with its 95 % intervals: up and left is better.

    Args:
        points: System to the change of bits a byte in percent and to its chrF++.
        path: The PNG file.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for index, (system, (across, up)) in enumerate(points.items()):
        arms = [[[value.mean - value.low], [value.high - value.mean]] for value in (across, up)]
        axes.errorbar(across.mean, up.mean, xerr=np.abs(arms[0]), yerr=np.abs(arms[1]), fmt="o", capsize=3,
                      color=PALETTE[index % len(PALETTE)], label=f" {system}")  # fmt: skip
    axes.axvline(0.0, color="0.4", linestyle=":", linewidth=1.2)
    axes.set_xlabel("change of bits per byte of monolingual text, % (lower: more is kept)")
    axes.set_ylabel("chrF++, mean of sentences (higher is better)")
    axes.legend(frameon=False)
    _tidy(axes)
    _save(figure, path)


def draw_learning_curves(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Draw the loss of several systems over their steps, each as its moving average.

    Args:
        curves: System to (step, nats a token).
        path: The PNG file.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for index, (system, points) in enumerate(curves.items()):
        steps, values = zip(*points, strict=True)
        colour = PALETTE[(index + 1) % len(PALETTE)]
        axes.plot(steps, smooth(values), color=colour, linewidth=1.6, label=f" {system}")
    axes.set_xlabel("step on parallel text")
    axes.set_ylabel("cross-entropy (nats per token), moving average")
    axes.legend(frameon=False)
    _tidy(axes)
    _save(figure, path)


def draw_series(points: Mapping[str, Estimate], loads: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw chrF++ over the values of one option with its 95 % intervals, and below it the load of the experts.

    Args:
        points: Value to chrF++, in order.
        loads: Expert group to `load_max` at each of the values; none: not drawn.
        title: Of the option.
        path: The PNG file.
    """
    figure = Figure(figsize=(6.4, 4.4 if loads else 3.0), layout="constrained")
    grid = figure.subplots(1 + bool(loads), 1, squeeze=False, sharex=True)[:, 0]
    places, values = range(len(points)), list(points.values())
    arms = [[value.mean - value.low for value in values], [value.high - value.mean for value in values]]
    grid[0].errorbar(places, [value.mean for value in values], yerr=arms, fmt="o-", capsize=3, color=PALETTE[2])
    grid[0].set_ylabel("chrF++")
    for index, (group, measured) in enumerate(loads.items()):
        grid[1].plot(places, measured, "o-", color=PALETTE[2 + 2 * index], label=f" {group.upper()} experts")
        grid[1].set_ylabel("load_max (1: balanced)")
        grid[1].legend(frameon=False)
    grid[-1].set_xticks(places, list(points))
    grid[-1].set_xlabel(title)
    for axes in grid:
        _tidy(axes)
    _save(figure, path)


def _heatmap(
    axes: Axes, values: Sequence[Sequence[float]], texts: Sequence[Sequence[str]], colours: str, ends: Sequence[float]
) -> AxesImage:
    """Draw a matrix (rows of columns) with a text in each cell, black on light colours and white on dark ones."""
    image = axes.imshow(values, cmap=colours, vmin=ends[0], vmax=ends[1], aspect="auto")
    light = image.to_rgba(np.asarray(values))[..., :3] @ (0.299, 0.587, 0.114) > 0.5
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            colour = "black" if light[row, column] else "white"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    return image


def draw_gains(panels: dict[str, dict[str, list[Gain]]], directions: Sequence[str], path: Path) -> None:
    """Draw gains as heatmaps one below the other, white at 0, one scale for all; a row's own pair is framed.

    Args:
        panels: Title to row name to a gain for each direction.
        directions: Titles of the columns.
        path: The PNG file.
    """
    limit = max(abs(gain.value) for rows in panels.values() for row in rows.values() for gain in row) or 1.0
    heights = [len(rows) for rows in panels.values()]
    size = (0.62 * len(directions) + 2.6, 0.38 * sum(heights) + 0.9 * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, rows) in zip(grid, panels.items(), strict=True):
        values = [[gain.value for gain in row] for row in rows.values()]
        image = _heatmap(axes, values, [[gain.text for gain in row] for row in rows.values()], "PuOr", (-limit, limit))
        own = [(x, y) for y, row in enumerate(rows.values()) for x, gain in enumerate(row) if gain.own]
        for x, y in own:
            axes.add_patch(Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, fill=False, edgecolor="black", linewidth=1.6))
        axes.set_title(title, loc="left", fontsize="medium")
        axes.set_xticks(range(len(directions)), directions, fontsize=8)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    figure.colorbar(image, ax=list(grid), fraction=0.04)
    _save(figure, path)


def draw_routing(routing: dict[str, Any], path: Path) -> None:
    """Draw one model's expert shares: a heatmap for each group, rows are layers and languages, columns experts.

    Args:
        routing: Language to the content of `Routing.to_dict`.
        path: The PNG file.
    """
    languages = list(routing)
    layers = routing[languages[0]]["layers"]
    groups = list(next(iter(layers.values())))
    rows = [(layer, language) for layer in layers for language in languages]
    shares = {name: [routing[language]["layers"][layer][name]["share"] for layer, language in rows] for name in groups}
    experts = len(shares[groups[0]][0])
    highest = max(max(map(max, values)) for values in shares.values())
    figure = Figure(figsize=((0.75 * experts + 0.8) * len(groups) + 2.2, 0.38 * len(rows) + 1.9), layout="constrained")
    grid = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axes, name in zip(grid, groups, strict=True):
        texts = [[f"{100 * share:.0f}" for share in values] for values in shares[name]]
        image = _heatmap(axes, shares[name], texts, "cividis", (0.0, highest))
        axes.set_title(f"{name.upper()} experts")
        axes.set_xticks(range(experts))
        axes.set_xlabel("expert")
        for boundary in range(len(languages), len(rows), len(languages)):
            axes.axhline(boundary - 0.5, color="white", linewidth=3)
    grid[0].set_yticks(range(len(rows)), [f"layer {layer}  {language}" for layer, language in rows])
    bar = figure.colorbar(image, ax=list(grid), fraction=0.04)
    step = 0.25 if highest > 0.5 else 0.1
    ticks = [index * step for index in range(math.floor(highest / step) + 1)]
    bar.set_ticks(ticks, labels=[f"{100 * tick:.0f} %" for tick in ticks])
    figure.suptitle(f"Share of tokens in % (balanced: {100 / experts:.0f})", fontsize="medium")
    _save(figure, path)
