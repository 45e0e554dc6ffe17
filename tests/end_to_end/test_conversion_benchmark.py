"""The conversion benchmark runs both commands, compares the way back bit by bit, and cleans up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.training import run_command


@pytest.mark.slow  # four processes that import torch: about 15 seconds
@pytest.mark.parametrize("kind", ["dense", "upcycled"])
def test_tiny(tmp_path: Path, kind: str) -> None:
    words = ["--model", "tiny", "--kind", kind, "--directory", tmp_path / "scratch", "--output", tmp_path / "out.json"]
    shown = run_command("tools/benchmark_conversion.py", *words).stdout
    steps = {step["name"]: step for step in json.loads((tmp_path / "out.json").read_text())["steps"]}
    for name in ("Hugging Face -> Megatron", "Megatron -> Hugging Face"):
        assert name in shown and steps[name]["peak_gigabytes"] > 0.1
        assert steps[name]["ratio"] > steps[name]["ratio_started"]
    assert not list((tmp_path / "scratch").iterdir())
