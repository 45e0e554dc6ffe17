#!/usr/bin/env python3
"""Compare a Hugging Face model with a Megatron checkpoint on a text, and say where they first differ.

Exit status: 0 the logits and every layer agree, 1 they differ, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys

from mixmoe_megatron.cli import make_main

_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-dir", required=True, help="Hugging Face directory, dense or exported Mix-MoE")
    parser.add_argument("--checkpoint-dir", required=True, help="directory with mixmoe_metadata.json")
    parser.add_argument("--iteration", type=int, help="default: the latest")
    parser.add_argument("--text", help="default: 64 fixed token ids")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tolerance", type=float, help="relative (default 1e-4 in fp32, 5e-2 in bf16)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compare, print the table and return 0 when the models agree, else 1."""
    from mixmoe_megatron.conversion.parity import check_parity

    tolerance = _TOLERANCE[args.dtype] if args.tolerance is None else args.tolerance
    differences, first = check_parity(
        args.hf_dir, args.checkpoint_dir, args.text, tolerance, args.dtype, args.iteration
    )
    print("place        largest difference   relative")
    for difference in differences:
        mark = "  <- first over the tolerance" if difference is first else ""
        print(f"{difference.place:<12} {difference.largest:>18.3e} {difference.relative:>10.2e}{mark}")
    print("the models agree" if first is None else f"the models differ from {first.place} on")
    return int(first is not None)


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
