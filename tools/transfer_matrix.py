#!/usr/bin/env python3
"""Show what training on one language pair gains in all others: transfer.md, .html, .csv, .json and heatmaps.

Example:
    mixmoe transfer-matrix --evaluation runs/eval/evaluation.json --stage1 stage1 \
        --trained mixmoe_de=de-en --trained mixmoe_fi=fi-en --output-dir runs/transfer
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mixmoe_megatron.cli import make_main


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--evaluation", type=Path, required=True, help="evaluation.json, with the base as its baseline")
    parser.add_argument(
        "--trained", action="append", default=[], metavar="NAME=PAIR", help="a system and its training pair; repeatable"
    )
    parser.add_argument("--stage1", metavar="NAME", help="the system that all were trained from: gains over it too")
    parser.add_argument("--toy", action="store_true", help="say on top that the figures are toy-sized")
    parser.add_argument("--output-dir", type=Path, required=True)
    return parser


def run(args: argparse.Namespace) -> None:
    """Read the evaluation and write the matrix."""
    from mixmoe_megatron.evaluation.provenance import read_json
    from mixmoe_megatron.evaluation.segments import named_values
    from mixmoe_megatron.study.transfer import transfer_matrix, write_transfer

    trained = named_values(args.trained, "--trained", "PAIR")
    write_transfer(transfer_matrix(read_json(args.evaluation), trained, args.stage1), args.output_dir, toy=args.toy)
    print(f"Wrote {args.output_dir / 'transfer.html'}, .md, .csv and .json.")


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
