#!/usr/bin/env python3
"""List the iterations of a Megatron checkpoint: which are whole, which are damaged, in which file and how.

Exit status 2 when the iteration that training would go on from is damaged. One that an interrupted save left behind is
no damage: nothing refers to it, and the next save of that iteration replaces it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mixmoe_megatron.checkpoint.health import find_damage, saved_iterations, whole_iteration
from mixmoe_megatron.cli import make_main


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint_dir", metavar="DIR", type=Path, help="directory of a training run")
    parser.add_argument("--full", action="store_true", help="read every byte and compare checksums, not only sizes")
    return parser


def run(args: argparse.Namespace) -> None:
    """List the iterations and say which one training goes on from."""
    for directory in saved_iterations(args.checkpoint_dir):
        damage = find_damage(directory, full=args.full)
        print(f"{directory.name}  {f'damaged: {damage}' if damage else 'whole'}", flush=True)
    newest = whole_iteration(args.checkpoint_dir, full=args.full)
    print(f"training goes on from {newest.name}")


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
