"""The comparison with full fine-tuning, on another base and another pair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.examples import assert_refused, run_example
from tests.helpers.tiny_hf import save_tiny_dense


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"PAIR": "xx-en"}, "PAIR=xx-en has no data; choose one of: cs-en de-en"),
        ({"BASE": "/nowhere"}, "BASE=/nowhere is not a Hugging Face model directory"),
        ({"MINUTES": "0"}, "MINUTES=0 must be a whole number"),
        ({"FULL_LR": "fast"}, "FULL_LR=fast must be a learning rate"),
    ],
)
def test_wrong_settings_are_refused(variables: dict[str, str], sentence: str, tmp_path: Path) -> None:
    assert_refused("interference", tmp_path, sentence, **variables)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_models_are_compared(tmp_path: Path) -> None:
    save_tiny_dense(tmp_path / "base", "qwen2")
    status, output = run_example("interference", tmp_path, BASE=str(tmp_path / "base"), PAIR="et-en", FULL_LR="1e-3")
    assert status == 0, output[-3000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    systems = {"base", "sft", "pt_sft", "mixmoe"}
    assert set(summary["directions"]) == {"et-en", "en-et"}
    assert all(set(direction) == systems for direction in summary["directions"].values())
    assert set(summary["perplexity"]) == {"et", "en"}
    kept = output[output.index("bits per byte") :]
    assert all(f"| et       | {system}" in kept for system in systems)
    parents = [json.loads((tmp_path / "out" / name / "mixmoe_metadata.json").read_text()) for name in ("sft", "pt_sft")]
    assert [Path(parent["parent"]["path"]).name for parent in parents] == ["dense", "pt"]
    assert all(parent["phase"] == "dense" for parent in parents)
