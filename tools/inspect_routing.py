#!/usr/bin/env python3
"""Show where a Mix-MoE model sends the tokens of each language or direction: tables, routing.json and routing.png.

Example:
    mixmoe routing --checkpoint-dir runs/stage2 --mono de=examples/data/mono.de.test.txt.gz \
        --mono en=examples/data/mono.en.test.txt.gz --output-dir runs/routing
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mixmoe_megatron.cli import make_main, write_json


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="exported Mix-MoE model directory")
    model.add_argument("--checkpoint-dir", type=Path, help="Megatron checkpoint; exported to a temporary directory")
    parser.add_argument(
        "--mono", action="append", required=True, metavar="NAME=FILE", help="text, a line each; repeatable"
    )
    parser.add_argument("--limit", type=int, default=0, help="lines of each file, a seeded choice (default: 0, all)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of lines (default: 0)")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16, or auto (default): the fast one here"
    )
    parser.add_argument(
        "--device", default="auto", help="a torch device; auto (default): the GPU if there is one, else cpu"
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    return parser


def export(checkpoint_dir: Path, output_dir: Path) -> Path:
    """Export a Megatron checkpoint and return the directory."""
    from mixmoe_megatron.conversion.hf_export import ExportRequest, prepare_export, run_export

    run_export(prepare_export(ExportRequest(checkpoint_dir=str(checkpoint_dir), output_dir=str(output_dir))))
    return output_dir


def run(args: argparse.Namespace) -> None:
    """Measure, print and draw."""
    from itertools import combinations

    from mixmoe_megatron.dtypes import choose
    from mixmoe_megatron.evaluation.models import load_model
    from mixmoe_megatron.evaluation.routing import language_distance, measure_routing, specialisation
    from mixmoe_megatron.evaluation.segments import named_paths, read_monolingual
    from mixmoe_megatron.study.figures import draw_routing
    from mixmoe_megatron.study.tables import routing_table, specialisation_table

    paths = named_paths(args.mono, "--mono")
    texts = {language: read_monolingual(path, limit=args.limit, seed=args.seed) for language, path in paths.items()}
    dtype, device = choose(args.dtype, args.device)
    with TemporaryDirectory() as scratch:
        model = args.model or export(args.checkpoint_dir, Path(scratch) / "model")
        loaded = load_model(model.name, model, dtype=dtype, device=device)
    measured = {language: measure_routing(loaded, lines) for language, lines in texts.items()}
    routing = {language: value.to_dict() for language, value in measured.items()}
    distances = {f"{a} {b}": language_distance(measured[a], measured[b]) for a, b in combinations(measured, 2)}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    measures = specialisation(measured)
    write_json(
        args.output_dir / "routing.json",
        {"dtype": dtype, "languages": routing, "specialisation": measures, "distances": distances},
    )
    draw_routing(routing, args.output_dir / "routing.png")
    print(routing_table(routing))
    print(f"\nWhat an expert tells of the text it gets\n\n{specialisation_table(measures)}\n")
    for pair, layers in distances.items():
        values = ", ".join(f"layer {layer} {name} {value:.2f}" for layer, groups in layers.items()
                           for name, value in groups.items())  # fmt: skip
        print(f"Distance of {pair} (0 alike, 1 disjoint): {values}")


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
