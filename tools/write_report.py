#!/usr/bin/env python3
"""Write report.md, summary.json and pictures from an evaluation and the logs of both training stages.

The last line printed, the report's first, tells whether training made the model better than the untouched base.

Example:
    mixmoe report --evaluation runs/eval/evaluation.json --stage1-log runs/stage1/tensorboard \
        --stage2-log runs/stage2/tensorboard --seconds runs/seconds.json --output-dir runs/report
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
    parser.add_argument("--evaluation", type=Path, required=True, help="evaluation.json of evaluate_translation.py")
    log_help = "JSONL log, TensorBoard directory, or Megatron's console output"
    parser.add_argument("--stage1-log", type=Path, metavar="LOG", help=log_help)
    parser.add_argument("--stage2-log", type=Path, metavar="LOG", help=log_help)
    parser.add_argument(
        "--dense-bits", action="append", default=[], metavar="TEXT=BITS",
        help="bits per byte of the dense base on a text of --eval-mono, as the logs call it; repeatable",
    )  # fmt: skip
    parser.add_argument("--seconds", type=Path, metavar="FILE", help='JSON {"step": seconds}')
    parser.add_argument("--training-dtype", default="", metavar="DTYPE", help="to be told beside the evaluation's")
    parser.add_argument("--pair", default="", metavar="XX-YY", help="default: the first direction")
    parser.add_argument("--trained", default="", metavar="NAME", help="system to judge; default: mixmoe, else the last")
    parser.add_argument("--full", default="sft", metavar="NAME", help="system that is full fine-tuning (default: sft)")
    parser.add_argument("--toy", action="store_true", help="say on top that the figures are toy-sized")
    parser.add_argument("--output-dir", type=Path, required=True)
    return parser


def run(args: argparse.Namespace) -> None:
    """Read the inputs and write the report."""
    from mixmoe_megatron.evaluation.provenance import read_json
    from mixmoe_megatron.evaluation.segments import named_numbers
    from mixmoe_megatron.study.report import ReportInputs, write_report
    from mixmoe_megatron.study.training_log import read_training_log

    logs = {
        "Stage 1: monolingual text, LM experts": args.stage1_log,
        "Stage 2: translation, MT experts": args.stage2_log,
    }
    hypotheses_dir = args.evaluation.parent / "hypotheses"
    inputs = ReportInputs(
        evaluation=read_json(args.evaluation),
        stages={title: read_training_log(path) for title, path in logs.items() if path is not None},
        seconds=read_json(args.seconds) if args.seconds else {},
        pair=args.pair,
        trained=args.trained,
        full=args.full,
        toy=args.toy,
        training_dtype=args.training_dtype,
        dense_bits=named_numbers(args.dense_bits, "--dense-bits"),
        hypotheses_dir=hypotheses_dir if hypotheses_dir.is_dir() else None,
    )
    summary = write_report(inputs, args.output_dir)
    print(f"Wrote {args.output_dir / 'report.md'} and summary.json.")
    print(summary["verdict"])


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
