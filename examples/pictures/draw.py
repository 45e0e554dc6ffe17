"""Draw the two pictures of the top README: the architecture, and the results that the examples' papers have in tables.

draw.py                      architecture.png and results.png, beside this file
draw.py --output-dir DIR     elsewhere
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch

from mixmoe_megatron.cli import run_command

HERE = Path(__file__).resolve().parent
GREY, LIGHT_BLUE, BLUE, ORANGE, GREEN = "#c4c9d1", "#a0cbe8", "#4c78a8", "#f28e2b", "#59a14f"
COLOURS = {
    "dense base": GREY, "upcycled": LIGHT_BLUE, "stage 1": BLUE, "Mix-MoE": ORANGE, "full fine-tuning": GREEN
}  # fmt: skip
TITLES = {
    "real": "make real: chrF++",
    "quickstart": "make quickstart: chrF",
    "into English": "make protocol: chrF++ into English",
    "from English": "make protocol: chrF++ out of English",
}


def tables_of(paper: str) -> list[list[list[str]]]:
    """Return a Markdown file's tables: rows of cells, the header first, the line of dashes left out."""
    tables = []
    for block in re.findall(r"(?:^\|.*\|\n)+", (HERE.parent / paper).read_text("utf-8"), re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        tables.append([row for row in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in row)])
    return tables


def figures() -> dict[str, Any]:
    """Return what the picture of the results shows, from tables: {panel: {"of": labels, system: values}}."""
    panels: dict[str, Any] = {}
    found = (
        tables_of("real/README.md")[1:2] + tables_of("quickstart/README.md")[:1] + tables_of("protocol/README.md")[:2]
    )
    for title, (header, *rows) in zip(TITLES, found, strict=True):
        wanted = [i for i, name in enumerate(header) if i and not re.search("perplexity|BLEU|bits", name)]
        panels[title] = {"of": [re.sub(r"^chrF\S* ", "", header[i]) for i in wanted]}
        panels[title] |= {row[0]: [float(row[i].split()[0]) for i in wanted] for row in rows}
    return panels


def draw_results(path: Path) -> None:
    """Draw bars for each panel; the figures go into the picture's own description."""
    panels = figures()
    plot, axes = pyplot.subplots(1, len(panels), figsize=(12, 2.8), width_ratios=[2.6, 2, 4, 4], layout="constrained")
    for axis, (name_of_run, panel) in zip(axes, panels.items(), strict=True):
        systems = [name for name in panel if name != "of"]
        for place, name in enumerate(systems):
            left = [i + (place - (len(systems) - 1) / 2) * 0.8 / len(systems) for i in range(len(panel["of"]))]
            axis.bar(left, panel[name], 0.8 / len(systems), color=COLOURS[name])
        axis.set_xticks(range(len(panel["of"])), panel["of"])
        axis.set_title(TITLES[name_of_run], fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, 22)
    axes[0].set_ylim(0, 1.6 * max(max(values) for name, values in panels["real"].items() if name != "of"))
    named = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    axes[0].legend(handles=named, fontsize=7, frameon=False, ncols=2, loc="upper left")
    plot.savefig(path, dpi=110, metadata={"Description": json.dumps(panels)})
    pyplot.close(plot)


def box(axis: Any, left: float, bottom: float, width: float, height: float, text: str, colour: str) -> None:
    """Draw a named box."""
    shape = FancyBboxPatch(
        (left, bottom), width, height, boxstyle="round,pad=0.02", facecolor=colour, edgecolor="white"
    )
    axis.add_patch(shape)
    axis.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=8)


def arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """Draw an arrow with a remark above its middle."""
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color="#555555"))
    axis.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.12, text, ha="center", fontsize=8)


def experts(axis: Any, left: float, bottom: float, name: str, colour: str) -> None:
    """Draw a group of four experts and its router, 2.4 wide."""
    for i in range(4):
        box(axis, left + 0.6 * i, bottom, 0.52, 0.9, f"{name}\n{i + 1}", colour)
    box(axis, left, bottom - 0.65, 2.32, 0.4, f"{name} router", colour)


def draw_architecture(path: Path) -> None:
    """Draw a dense FFN, the LM experts of stage 1, and both groups of stage 2."""
    plot, axis = pyplot.subplots(figsize=(10, 3.2), layout="constrained")
    axis.set(xlim=(0, 13.4), ylim=(-0.2, 4.1))
    axis.axis("off")
    for left, title in ((0.2, "dense model"), (3.9, "stage 1: monolingual text"), (8.3, "stage 2: parallel text")):
        axis.text(left, 3.75, title, fontsize=10, weight="bold")
    box(axis, 0.2, 1.6, 2.3, 0.9, "FFN, width F", GREY)
    arrow(axis, (2.6, 2.05), (3.8, 2.05), "upcycling:\nslices of F / n")
    experts(axis, 3.9, 1.6, "LM", GREEN)
    arrow(axis, (6.4, 2.05), (8.2, 2.05), "MT := LM,\nLM frozen")
    experts(axis, 8.3, 1.6, "LM", GREY)
    experts(axis, 10.95, 1.6, "MT", ORANGE)
    axis.text(3.9, 0.45, "hidden state h and its Fourier features\ngo to the router; k experts a token", fontsize=8)
    axis.text(8.3, 0.45, "each token picks k experts in each group;\nthe groups' outputs are averaged", fontsize=8)
    axis.text(0.2, 0.45, "every fourth layer;\nall else stays frozen", fontsize=8)
    key = ((8.3, GREY, "frozen"), (9.5, GREEN, "trained in stage 1"), (11.4, ORANGE, "trained in stage 2"))
    for left, colour, text in key:
        box(axis, left, 3.2, 0.25, 0.2, "", colour)
        axis.text(left + 0.35, 3.3, text, fontsize=8, va="center")
    plot.savefig(path, dpi=110)
    pyplot.close(plot)


def main(argv: list[str] | None = None) -> int:
    """Draw both pictures and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=HERE, help="default: beside this file")
    args = parser.parse_args(argv)

    def draw() -> None:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        draw_architecture(args.output_dir / "architecture.png")
        draw_results(args.output_dir / "results.png")

    return run_command(draw)


if __name__ == "__main__":
    sys.exit(main())
