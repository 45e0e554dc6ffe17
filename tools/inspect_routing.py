#!/usr/bin/env python3
"""Show where a Mix-MoE model sends the tokens of each language: a table, routing.json and routing.png.

Example:
    python tools/inspect_routing.py --model models/mixmoe --mono de=examples/data/mono.de.test.txt.gz \
        --mono en=examples/data/mono.en.test.txt.gz --output-dir runs/routing
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mixmoe_megatron.cli import run_command, setup_logging, write_json


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="exported Mix-MoE model directory")
    parser.add_argument("--mono", action="append", required=True, metavar="CODE=FILE", help="text; repeatable")
    parser.add_argument("--limit", type=int, default=0, help="lines of each file, a seeded choice (default: 0, all)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of lines (default: 0)")
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    parser.add_argument("--device", default="cpu", help="a torch device (default: cpu)")
    parser.add_argument("--output-dir", type=Path, required=True)
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure, print and draw."""
    from itertools import combinations

    from mixmoe_megatron.evaluation.figures import draw_routing
    from mixmoe_megatron.evaluation.models import load_model
    from mixmoe_megatron.evaluation.routing import language_distance, measure_routing
    from mixmoe_megatron.evaluation.segments import named_paths, read_monolingual
    from mixmoe_megatron.evaluation.tables import routing_table

    paths = named_paths(args.mono, "--mono")
    texts = {language: read_monolingual(path, limit=args.limit, seed=args.seed) for language, path in paths.items()}
    loaded = load_model(args.model.name, args.model, dtype=args.dtype, device=args.device)
    measured = {language: measure_routing(loaded, lines) for language, lines in texts.items()}
    routing = {language: value.to_dict() for language, value in measured.items()}
    distances = {f"{a} {b}": language_distance(measured[a], measured[b]) for a, b in combinations(measured, 2)}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "routing.json", {"languages": routing, "distances": distances})
    draw_routing(routing, args.output_dir / "routing.png")
    print(routing_table(routing))
    for pair, layers in distances.items():
        values = ", ".join(f"layer {layer} {name} {value:.2f}" for layer, groups in layers.items()
                           for name, value in groups.items())  # fmt: skip
        print(f"Distance of {pair} (0 alike, 1 disjoint): {values}")


def main() -> int:
    """Run the command and return its exit status."""
    args = build_parser().parse_args()
    setup_logging()
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
