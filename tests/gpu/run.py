#!/usr/bin/env python3
"""Hold this package to its word on one GPU: every check prints PROVED, FAILED or NOT RUN, and why.

Not a pytest suite: a check that cannot run is no success, and a GPU machine may have no package index (tests/gpu/
packages.txt lists what is needed besides torch and transformers).

    make test-gpu                         on a machine with CUDA: about ten minutes, runs/gpu_report.json
    DEVICE=cpu make test-gpu              the checks that need no GPU, in bfloat16
    python -m tests.gpu.run layer train   some checks; --jobs 4 runs them side by side where they measure no time
    DEVICE=cpu python -m tests.gpu.run train --write-reference   renew the losses that a GPU run is compared with

Exit status: 0 when nothing failed and something was proved, 1 when a row failed, 2 when there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

if os.environ.setdefault("DEVICE", "cuda") == "cpu":  # the processes that a check starts look there too
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.gpu import environment, exports, layer, speed, training
from tests.gpu.harness import DEVICE, FAILED, NOT_RUN, PROVED, ROOT, Row, Rows, machine

CHECKS = {check.name: check for module in (environment, layer, training, exports, speed) for check in module.CHECKS}


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"default: all of {', '.join(CHECKS)}")
    parser.add_argument(
        "--jobs", type=int, default=1, help="checks side by side, where none measures time (default: 1)"
    )
    parser.add_argument("--report", default="runs/gpu_report.json", help="default: %(default)s")
    parser.add_argument("--logs", metavar="DIR", help="keep the whole output of each check there")
    parser.add_argument("--write-reference", action="store_true", help="write the reference losses (DEVICE=cpu)")
    parser.add_argument("--inside", metavar="FILE", help=argparse.SUPPRESS)  # run one check in this process
    return parser


def run_inside(name: str, file: Path, write_reference: bool) -> None:
    """Run one check in this process and write its rows to `file`."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = Rows(Path(scratch), write_reference)
        try:
            CHECKS[name].run(rows)
        finally:
            file.write_text(json.dumps([asdict(row) for row in rows.rows]), "utf-8")


def run_check(name: str, args: argparse.Namespace, logs: Path) -> list[Row]:
    """Run a check in a process of its own, so that a dead one takes no other with it, and return its rows."""
    check, file, log = CHECKS[name], logs / f"{name}.json", logs / f"{name}.log"
    command = [sys.executable, "-m", "tests.gpu.run", name, "--inside", str(file)]
    command += ["--write-reference"] if args.write_reference else []
    limit, reason = check.limit * (3 if DEVICE == "cpu" else 1), ""
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(limit)
            reason = f"the check's process ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            reason = f"no end after {limit} s"
    rows = [Row(**row) for row in json.loads(file.read_text("utf-8"))] if file.exists() else []
    if reason or not rows:
        tail = " | ".join(log.read_text("utf-8", errors="replace").splitlines()[-4:])
        rows.append(Row(f"{name}: {check.title}", FAILED, f"{reason or 'no row was tried'}: {tail[-600:]}"))
    for row in rows:
        sys.stdout.write(f"[{name}] {row.line()[:1000]}\n")
    sys.stdout.flush()
    return rows


def run_checks(names: list[str], args: argparse.Namespace) -> dict[str, list[Row]]:
    """Run checks, side by side where none measures time, and return their rows in the order of the names."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(max(1, args.jobs)) as pool:
        logs = Path(args.logs or scratch)
        logs.mkdir(parents=True, exist_ok=True)
        together = {name: pool.submit(run_check, name, args, logs) for name in names if not CHECKS[name].alone}
        rows = {name: future.result() for name, future in together.items()}
        rows |= {name: run_check(name, args, logs) for name in names if CHECKS[name].alone}
    return {name: rows[name] for name in names}


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = build_parser().parse_args(argv)
    if DEVICE not in ("cuda", "cpu") or set(args.checks) - set(CHECKS):
        sys.stderr.write(f"error: DEVICE is cuda or cpu, and the checks are {', '.join(CHECKS)}.\n")
        return 2
    if args.inside:
        run_inside(args.checks[0], Path(args.inside), args.write_reference)
        return 0
    import torch

    if DEVICE == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("error: no CUDA device: `DEVICE=cpu make test-gpu` tries what needs no GPU.\n")
        return 2
    names = args.checks or [name for name, check in CHECKS.items() if DEVICE == "cuda" or check.on_cpu]
    report: dict[str, Any] = {"machine": machine(), "command": ["python", "-m", "tests.gpu.run", *sys.argv[1:]]}
    rows = run_checks(names, args)
    report["checks"] = {
        name: {"title": CHECKS[name].title, "rows": [asdict(row) for row in rows[name]]} for name in names
    }
    path = Path(args.report)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    count = {s: sum(row.status == s for group in rows.values() for row in group) for s in (PROVED, FAILED, NOT_RUN)}
    counted = ", ".join(f"{number} {status}" for status, number in count.items())
    sys.stdout.write(f"{counted} on {report['machine']['device']} ({DEVICE}); report: {path}\n")
    return int(count[FAILED] > 0 or count[PROVED] == 0)


if __name__ == "__main__":
    sys.exit(main())
