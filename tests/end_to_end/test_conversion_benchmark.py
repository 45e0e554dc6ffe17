"""The conversion benchmark runs both commands, compares the way back bit by bit, and cleans up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.training import run_command


@pytest.mark.slow  # several processes that import torch: about 20 seconds
@pytest.mark.parametrize("kind", ["dense", "upcycled"])
def test_tiny(tmp_path: Path, kind: str) -> None:
    words = [
        "--model",
        "tiny",
        "--kind",
        kind,
        "--repeats",
        "2",
        "--directory",
        tmp_path / "scratch",
        "--output",
        tmp_path / "out.json",
    ]
    shown = run_command("tools/benchmark_conversion.py", *words).stdout
    steps = {step["name"]: step for step in json.loads((tmp_path / "out.json").read_text())["steps"]}
    for name in ("Hugging Face -> Megatron", "Megatron -> Hugging Face"):
        assert name in shown and steps[name]["peak_gigabytes"] > 0.01 and steps[name]["ratio"] > 0
    assert not list((tmp_path / "scratch").iterdir())
