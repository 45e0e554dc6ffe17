"""The quickstart with another base and another pair: killed in the middle, started again, and its report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.tiny_hf import save_tiny_dense
from tests.helpers.training import ROOT

SCRIPT = ROOT / "examples" / "quickstart" / "run.sh"


def start(directory: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PAIR": "et-en", "MINUTES": "1", "OMP_NUM_THREADS": "1", "OUT": str(directory / "out")}
    return subprocess.Popen(
        ["bash", str(SCRIPT)],
        env={**environment, **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"PAIR": "xx-en"}, "PAIR=xx-en has no data"),
        ({"BASE": "/nowhere"}, "BASE=/nowhere is not a Hugging Face model directory"),
        ({"MINUTES": "soon"}, "MINUTES=soon must be a whole number"),
        ({"DTYPE": "half"}, "The dtype must be one of auto, float32, bfloat16, float16, not 'half'."),
    ],
)
def test_wrong_settings_are_refused(variables: dict[str, str], sentence: str, tmp_path: Path) -> None:
    run = start(tmp_path, **variables)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 2
    assert output.startswith("error: ")
    assert sentence in output
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_dtype_is_not_gone_on_with(tmp_path: Path) -> None:
    settings = tmp_path / "out" / "settings"
    settings.parent.mkdir()
    settings.write_text(f"DTYPE=float32 PAIR=et-en MINUTES=1 BASE={ROOT}/examples/quickstart/base\n", "utf-8")
    output, _ = (run := start(tmp_path, DTYPE="bfloat16")).communicate(timeout=60)
    assert run.returncode == 2
    assert output.startswith("error: ") and "holds a run with DTYPE=float32" in output
    assert not list((tmp_path / "out" / "steps").iterdir())


def test_the_seconds_of_a_step_are_those_of_all_its_attempts(tmp_path: Path) -> None:
    for folder in ("logs", "steps", "spent"):
        (tmp_path / folder).mkdir()
    (tmp_path / "spent" / "train").write_text("40\n")  # by a run that was killed
    script = f"set -euo pipefail; OUT={tmp_path}; source examples/resumable.sh; step train 'train it' sleep 1"
    subprocess.run(["bash", "-c", script], cwd=ROOT, check=True)
    assert 41 <= int((tmp_path / "steps" / "train").read_text()) < 50


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_and_ends_with_a_report(tmp_path: Path) -> None:
    save_tiny_dense(tmp_path / "base", "qwen2")
    log = tmp_path / "out" / "logs" / "stage1.log"
    first = start(tmp_path, BASE=str(tmp_path / "base"))
    deadline = time.monotonic() + 400
    while not (log.is_file() and "iteration        5/" in log.read_text()):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)  # the script dies, its step lives on
    second = start(tmp_path, BASE=str(tmp_path / "base"))
    output, _ = second.communicate(timeout=800)
    assert second.returncode == 0, output[-3000:]
    assert "[data] done before" in output
    assert "stopping what a killed run left behind" in output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["directions"]) == {"et-en", "en-et"}
    for direction in summary["directions"].values():
        assert set(direction) == {"base", "stage1", "mixmoe"}
        assert all(0 <= scores["chrf"] <= 100 and "bleu" in scores for scores in direction.values())
    assert set(summary["perplexity"]) == {"et", "en"}
    assert {"pair", "signatures", "seconds", "versions", "commit"} <= set(summary)
    for picture in ("loss_curves.png", "routing_mixmoe.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000
