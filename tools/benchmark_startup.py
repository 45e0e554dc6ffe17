#!/usr/bin/env python3
"""Time that each command takes to start: from the call to the end of `--help`."""

from __future__ import annotations

import argparse
import os
import sys
import time

from mixmoe_megatron.__main__ import COMMANDS, command_path
from mixmoe_megatron.cli import make_main, write_json
from mixmoe_megatron.errors import MixMoEError


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--commands", nargs="+", default=[*COMMANDS], choices=COMMANDS, help="default: all")
    parser.add_argument("--turns", type=int, default=3, help="turns, of which the fastest counts (default: 3)")
    parser.add_argument("--output", metavar="FILE", help="write the figures there as JSON")
    return parser


def time_help(name: str) -> dict[str, float]:
    """Start a command with `--help` once.

    Args:
        name: of COMMANDS.

    Returns:
        `seconds` by the clock, and `cpu_seconds` of the process, which other work on the machine hardly changes.

    Raises:
        MixMoEError: the command failed.
    """
    devnull = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
    start = time.perf_counter()
    command = [sys.executable, str(command_path(name)), "--help"]
    child = os.posix_spawn(sys.executable, command, os.environ, file_actions=[devnull])
    _, status, usage = os.wait4(child, 0)
    if status:
        raise MixMoEError(f"{name} --help failed; its message is above.")
    return {"seconds": time.perf_counter() - start, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def run(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        MixMoEError: a command failed, or --turns is not positive.
    """
    if args.turns < 1:
        raise MixMoEError("--turns must be positive.")
    print(f"{'command':<22}{'seconds':>9}{'CPU seconds':>13}")
    fastest = {}
    for name in args.commands:
        turns = [time_help(name) for _ in range(args.turns)]
        fastest[name] = {key: min(turn[key] for turn in turns) for key in turns[0]}
        print(f"{name:<22}{fastest[name]['seconds']:>9.2f}{fastest[name]['cpu_seconds']:>13.2f}", flush=True)
    if args.output is not None:
        write_json(args.output, fastest)


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
