#!/usr/bin/env python3
"""Time that each command takes to start: from the call to the end of `--help`.

With a tokenizer also the time of `preprocess mono` on one line of text, which is its time to the first line.

Example:
    mixmoe benchmark-startup --tokenizer examples/quickstart/base
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from mixmoe_megatron.__main__ import COMMANDS, command_path
from mixmoe_megatron.cli import make_main, write_json
from mixmoe_megatron.errors import MixMoEError


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--commands", nargs="+", default=[*COMMANDS], choices=COMMANDS, help="default: all")
    parser.add_argument("--tokenizer", metavar="DIR", type=Path, help="Hugging Face tokenizer directory")
    parser.add_argument("--turns", type=int, default=3, help="turns, of which the fastest counts (default: 3)")
    parser.add_argument("--output", metavar="FILE", help="write the figures there as JSON")
    return parser


def time_command(name: str, words: list[str]) -> dict[str, float]:
    """Run a command once, without its output.

    Args:
        name: of COMMANDS.
        words: that follow it.

    Returns:
        `seconds` by the clock, and `cpu_seconds` of the process, which other work on the machine hardly changes.

    Raises:
        MixMoEError: the command failed.
    """
    silent = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
    start = time.perf_counter()
    command = [sys.executable, str(command_path(name)), *words]
    child = os.posix_spawn(sys.executable, command, os.environ, file_actions=[silent])
    _, status, used = os.wait4(child, 0)
    if status:
        raise MixMoEError(f"{name} {' '.join(words)} failed; its message is above.")
    return {"seconds": time.perf_counter() - start, "cpu_seconds": used.ru_utime + used.ru_stime}


def run(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        MixMoEError: a command failed, or --turns is not positive.
    """
    if args.turns < 1:
        raise MixMoEError("--turns must be positive.")
    print(f"{'command':<22}{'seconds':>9}{'CPU seconds':>13}")
    fastest = {}
    with TemporaryDirectory() as scratch:
        lines = {name: (name, ["--help"]) for name in args.commands}
        if args.tokenizer:
            text = Path(scratch, "text.txt")
            text.write_text("One line.\n", encoding="utf-8")
            words = ["--input", str(text), "--tokenizer", str(args.tokenizer), "--output-prefix", f"{scratch}/data"]
            lines["preprocess one line"] = ("preprocess", ["mono", *words, "--min-tokens", "0"])
        for title, (name, words) in lines.items():
            turns = [time_command(name, words) for _ in range(args.turns)]
            fastest[title] = {key: min(turn[key] for turn in turns) for key in turns[0]}
            print(f"{title:<22}{fastest[title]['seconds']:>9.2f}{fastest[title]['cpu_seconds']:>13.2f}", flush=True)
    if args.output is not None:
        write_json(args.output, fastest)


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
