#!/usr/bin/env python3
"""Make the stage 2 checkpoint that training would start from: the MT experts are copies of the trained LM experts.

Training does this by itself (`--mixmoe-stage 2 --init-from STAGE1`); here it is for those who want the files, to export
the untrained stage 2 with `mixmoe to-hf`, say. DIR appears when it is complete.
"""

from __future__ import annotations

import argparse
import sys

from mixmoe_megatron.checkpoint.ranks import joined_ranks
from mixmoe_megatron.cli import make_main
from mixmoe_megatron.conversion.prepared import write_checkpoint
from mixmoe_megatron.conversion.stage2 import Stage2Request, prepare_stage2


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint-dir", required=True, help="stage 1 checkpoint")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="stage 2 checkpoint to make")
    parser.add_argument("--iteration", type=int, help="default: the latest")
    parser.add_argument("--seed", type=int, default=1234, help="of MT routers that start random (default 1234)")
    parser.add_argument("--force", action="store_true", help="replace DIR if it has content")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, write nothing")
    return parser


def run(args: argparse.Namespace) -> None:
    """Write the stage 2 checkpoint, or say what would be written."""
    request = Stage2Request(args.checkpoint_dir, args.output_dir, args.iteration, args.seed, args.force)
    with joined_ranks() as ranks:
        prepared = prepare_stage2(request)
        if not args.dry_run:
            write_checkpoint(prepared, ranks)
        if ranks.rank == 0:
            done = f"stage2 checkpoint of {len(prepared.plan)} tensors in {args.output_dir}"
            print(prepared.describe() if args.dry_run else done)


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
