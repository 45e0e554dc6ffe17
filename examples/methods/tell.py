"""Tell what a run of this example gave: tell.py OUT prints a table of its methods and phases."""

from __future__ import annotations

import sys
from pathlib import Path

from mixmoe_megatron.checkpoint.metadata import METADATA_FILE
from mixmoe_megatron.cli import run_command
from mixmoe_megatron.conversion.hf_config import read_hf_config
from mixmoe_megatron.study.tables import table
from mixmoe_megatron.study.training_log import read_parameters, read_training_log

COLUMNS = ["method", "phase", "first loss", "last loss", "trained parameters", "all parameters", "export"]


def row(out: Path, method: str, phase: str) -> list[str]:
    """Return what the training in OUT/METHOD/PHASE was, and what its method was exported as."""
    losses = [loss for _, loss in read_training_log(out / method / phase / "tensorboard")["lm_loss"]]
    counts = read_parameters(out / "logs" / f"{method}_{phase}.log")
    export = read_hf_config(out / method / "model")["architectures"][0]
    return [method, phase, f"{losses[0]:.3f}", f"{losses[-1]:.3f}", *counts, export]


def rows(out: Path) -> list[list[str]]:
    """Return a row for each phase of each method, in the order in which they ran."""
    trainings = [path.parent for path in out.glob("*/*/tensorboard")]
    trainings.sort(key=lambda path: (path / METADATA_FILE).stat().st_mtime_ns)
    return [row(out, path.parent.name, path.name) for path in trainings]


def main() -> int:
    """Run the command and return its exit status."""
    return run_command(lambda: print(table(COLUMNS, rows(Path(sys.argv[1])))))


if __name__ == "__main__":
    sys.exit(main())
