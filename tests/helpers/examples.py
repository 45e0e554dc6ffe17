"""Running the scripts of examples/ as a user does, with a minute's settings."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.helpers.training import ROOT


def run_example(name: str, directory: Path, **variables: str) -> tuple[int, str]:
    """Run examples/NAME/run.sh into `directory`/out and return its exit status and all that it printed."""
    environment = {**os.environ, "MINUTES": "1", "OMP_NUM_THREADS": "1", "OUT": str(directory / "out"), **variables}
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / name / "run.sh")],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1700,
    )
    return done.returncode, done.stdout


def assert_refused(name: str, directory: Path, sentence: str, **variables: str) -> None:
    """Fail unless the script ends with one sentence and has written nothing."""
    status, output = run_example(name, directory, **variables)
    assert status == 2
    assert output.startswith("error: ")
    assert sentence in output
    assert not (directory / "out").exists()
