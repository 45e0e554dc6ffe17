"""The checks of `make test-gpu` that need no GPU, and what the command says where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixmoe_megatron.dtypes import choose_dtype

ROOT = Path(__file__).resolve().parents[2]
# Training takes one minute on a CPU with bfloat16 instructions, and seven without.
SLOW_WITHOUT_BFLOAT16 = pytest.mark.slow if choose_dtype("auto", "cpu").dtype != "bfloat16" else ()


def run_checks(device: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DEVICE": device, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.gpu.run", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("check", ["layer", pytest.param("train", marks=SLOW_WITHOUT_BFLOAT16), "exchange"])
def test_a_check_that_needs_no_gpu(check: str, tmp_path: Path) -> None:
    done = run_checks("cpu", check, "--report", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    rows = report["checks"][check]["rows"]
    assert {row["status"] for row in rows} <= {"PROVED", "NOT RUN"}
    assert all("Transformer Engine" in row["detail"] for row in rows if row["status"] == "NOT RUN")
    assert report["machine"]["packages"]["torch"]


def test_without_a_gpu_it_is_one_sentence_and_no_success(tmp_path: Path) -> None:
    done = run_checks("cuda", "--report", tmp_path / "report.json")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no CUDA device") and done.stderr.count("\n") == 1
    assert not (tmp_path / "report.json").exists()


def test_a_row_that_fails_or_a_check_that_dies_is_no_success(tmp_path: Path) -> None:
    reference = ROOT / "tests/gpu/reference_losses.json"
    assert json.loads(reference.read_text("utf-8"))["stage1"], "the committed losses are what a GPU is held to"
    code = (
        "from tests.gpu import layer, run\n"
        "layer.FP32_TOLERANCE = 0.0\n"
        "from tests.gpu.harness import Rows\n"
        "rows = Rows(__import__('pathlib').Path('.'))\n"
        "layer.run(rows)\n"
        "print([row.status for row in rows.rows].count('FAILED'))\n"
    )
    environment = {**os.environ, "DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert int(done.stdout.splitlines()[-1]) > 0, "a bound of nothing must be broken"
