#!/usr/bin/env python3
"""Train, evaluate and compare the systems of the paper's tables, each several times; say which of its claims hold.

Example:
    mixmoe study --table VII --seeds 1 --minutes 1 --output-dir runs/study
    mixmoe study --table all --seeds 10 --dry-run
    mixmoe study --table II --choose-rates
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mixmoe_megatron.cli import make_main

if TYPE_CHECKING:
    from mixmoe_megatron.study.grid import Grid
    from mixmoe_megatron.study.jobs import Job


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--grid", type=Path, default=Path("examples/study/study.yaml"), help="sizes, systems, tables")
    parser.add_argument("--table", nargs="+", default=["VII"], metavar="NAME", help="tables of the grid, or all")
    parser.add_argument("--size", default="toy", help="of the grid (default: toy)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each system (default: 3)")
    parser.add_argument("--minutes", type=int, default=12, help="steps and segments grow with it (default: 12)")
    parser.add_argument("--pairs", nargs="+", default=["de-en"], metavar="XX-en", help="default: de-en")
    parser.add_argument("--base", default="", metavar="DIR", help="dense Hugging Face model; default: the size's")
    parser.add_argument("--data", default="examples/data", metavar="DIR", help="text, named as in examples/data")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16, or auto: the fast one here")
    parser.add_argument("--match", choices=("tokens", "flops", "parameters"), default="tokens", help="budgets")
    parser.add_argument(
        "--choose-rates", action="store_true", help="train each method at three learning rates, compare on valid files"
    )
    parser.add_argument("--workers", type=int, default=1, help="jobs at a time (default: 1)")
    parser.add_argument(
        "--launcher", default="", metavar="WORDS", help="before each job's command, such as 'srun --gpus 1' under Slurm"
    )
    parser.add_argument("--dry-run", action="store_true", help="print jobs, hours, disk and parameters; run nothing")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/study"), help="the same command goes on there")
    return parser


def describe_plan(grid: Grid, wanted: list[Job], root: Path, workers: int) -> str:
    """Return what --dry-run prints."""
    from mixmoe_megatron.study.jobs import with_parents

    jobs = with_parents(wanted)
    waiting = [job for job in jobs if not job.is_done(root)]
    return "\n".join(
        [
            *(f"{job.key}  {job.name}: {job.typed(root)}" for job in jobs),
            f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them done; about "
            f"{sum(job.cost for job in waiting) / 3600 / workers:.1f} hours and "
            f"{sum(job.disk for job in waiting) / 1e9:.1f} GB more; a base of {grid.parameters / 1e6:.1f} million "
            "parameters.",
        ]
    )


def run(args: argparse.Namespace) -> None:
    """Run what is missing, then write and print what can be said."""
    from mixmoe_megatron.dtypes import choose
    from mixmoe_megatron.errors import MixMoEError
    from mixmoe_megatron.study.budgets import counted_jobs, matched_starts, matched_steps
    from mixmoe_megatron.study.grid import Grid, StudySettings, read_grid
    from mixmoe_megatron.study.jobs import run_jobs
    from mixmoe_megatron.study.study_page import write_study
    from mixmoe_megatron.study.trials import write_rates

    if args.workers < 1:
        raise MixMoEError("--workers must be a whole number from 1.")
    dtype, _ = choose(args.dtype, "auto")
    settings = StudySettings(args.size, args.minutes, args.seeds, tuple(args.pairs), args.base, args.data, dtype)
    grid = Grid(read_grid(args.grid), settings)
    tables = list(grid.content["tables"]) if args.table == ["all"] else args.table
    root, launcher = args.output_dir.resolve() / "jobs", shlex.split(args.launcher)
    if args.match != "tokens":
        names = list(dict.fromkeys(name for table in tables for name in grid.systems_of(table)))
        if not args.dry_run:
            run_jobs(counted_jobs(grid, names), root, args.workers, launcher=launcher)
        if args.match == "flops":
            grid = replace(grid, steps=matched_steps(grid, names, root))
        else:
            grid = replace(grid, starts=matched_starts(grid, names, root))
    wanted = [job for name in tables for row in grid.evaluations(name).values() for job in row]
    if args.choose_rates:
        wanted = list(grid.trials(tables).values())
    if sentence := grid.absence(tables):
        print(sentence, flush=True)
    if args.dry_run:
        print(describe_plan(grid, wanted, root, args.workers))
        return
    try:
        run_jobs(wanted, root, args.workers, lambda job: print(f"$ {job.typed(root)}", flush=True), launcher)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; the same command goes on from here") from None
    write = write_rates if args.choose_rates else write_study
    for sentence in write(grid, tables, args.output_dir, root):
        print(sentence)


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
