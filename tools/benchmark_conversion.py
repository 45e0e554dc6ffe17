#!/usr/bin/env python3
"""Time and peak memory of the conversion commands on a random checkpoint of a real model's shape, beside `cp`.

The yardstick is what `cp` of the same bytes plus one read of them takes, on the same disk in the same turns. Best times
are compared: other work on the machine only ever adds. The start of Python is part of a command's time. The way back is
compared bit by bit.

Example:
    mixmoe benchmark-conversion --model llama-3.2-1b --directory runs/benchmark
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from mixmoe_megatron.cli import make_main, write_json
from mixmoe_megatron.planning.conversion_benchmark import MODELS, measure_conversions


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3.2-1b", help="shape (default: %(default)s)")
    parser.add_argument("--directory", required=True, help="scratch space of 3 times the model's size")
    parser.add_argument("--kind", choices=("dense", "upcycled"), default="dense", help="what to make in Megatron")
    parser.add_argument("--processes", type=int, default=1, help="of each conversion (torchrun when more than one)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of all (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", help="write the figures there as JSON")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    scratch = Path(args.directory) / "benchmark_conversion"
    try:
        result = measure_conversions(args.model, scratch, args.kind, args.processes, args.repeats)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{args.model}, {args.kind}, {result['gigabytes']:.2f} GB, {args.processes} process(es)")
    print("step                     seconds: best  median  / (cp+read)  peak GB")
    for step in result["steps"]:
        seconds = step["seconds"]
        line = f"{step['name']:<24} {seconds[0]:13.2f} {seconds[len(seconds) // 2]:7.2f}"
        if "ratio" in step:
            line += f" {step['ratio']:12.2f} {step['peak_gigabytes']:8.2f}"
        print(line)
    if args.output:
        write_json(args.output, result)


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
