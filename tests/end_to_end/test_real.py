"""`make real` on a tiny base: its plan, its five systems, its last line; an earlier plan gives the same figures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.examples import assert_refused, run_example
from tests.helpers.tiny_hf import save_tiny_dense
from tests.helpers.training import ROOT


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"PAIR": "xx-en"}, "PAIR=xx-en has no data; choose one of: cs-en de-en"),
        ({"BASE": "/nowhere"}, "BASE=/nowhere is not a Hugging Face model directory"),
        ({"HOURS": "long"}, "HOURS=long must be a number such as 1.5."),
        ({"SEGMENTS": "0"}, "SEGMENTS=0 must be a whole number from 1."),
        ({"PLAN": "/nowhere"}, "PLAN=/nowhere is not the plan of an earlier run."),
        ({"START": "zero"}, "START=zero must be copy or important."),
        ({"STAGE2_LR": "fast"}, "STAGE2_LR=fast must be a learning rate"),
    ],
)
def test_wrong_settings_are_refused(variables: dict[str, str], sentence: str, tmp_path: Path) -> None:
    assert_refused("real", tmp_path, sentence, **variables)


def load_budget() -> ModuleType:
    spec = importlib.util.spec_from_file_location("budget", ROOT / "examples" / "real" / "budget.py")
    assert spec and spec.loader
    budget = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(budget)
    return budget


def test_the_hours_are_divided_by_measured_seconds() -> None:
    budget = load_budget()
    spent = {"dense": 10, "zero_shot": 100, "measure_stage1": 20, "measure_stage2": 20, "measure_sft": 20}
    step_seconds = {"stage1": 4.0, "stage2": 6.0, "sft": 8.0}
    left = 3600 - 170 - 60 - 40 - 400
    assert budget.parts_in(1.0, spent, step_seconds) == left // (3 * 4 + 10 * 6 + 10 * 8)
    assert budget.parts_in(0.01, spent, step_seconds) == 1


def test_short_pairs_at_first_do_not_make_the_plan_too_long(tmp_path: Path) -> None:
    """What is measured are pairs of 14 tokens a sample, where the file's mean is 70."""
    budget = load_budget()
    for folder in ("data", "logs", "steps"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data" / "de-en.json").write_text(json.dumps({"tokens": 700, "documents": 10}))
    for name, milliseconds, rate in (("stage1", 10000, ""), ("stage2", 2000, "5.6E+01"), ("sft", 4000, "")):
        told = f" tokens_per_second: {rate} |" * bool(rate)
        lines = [f"elapsed time per iteration (ms): {each}.0 |{told}\n" for each in (90000, *[milliseconds] * 3)]
        (tmp_path / "logs" / f"measure_{name}.log").write_text("".join(lines))
    for name in ("dense", "zero_shot", "measure_stage1", "measure_stage2", "measure_sft"):
        (tmp_path / "steps" / name).write_text("0")
    budget.write_plan(tmp_path, 1.0, "de-en")  # a part: 3 steps of 10 s, 10 of 10 s and 10 of 20 s
    assert (tmp_path / "plan").read_text() == "STAGE1_STEPS=30 STAGE2_STEPS=100\n"


@pytest.mark.slow
def test_three_learning_rates_of_each_training(tmp_path: Path) -> None:
    save_tiny_dense(tmp_path / "base", "qwen2")
    status, output = run_example(
        "real", tmp_path, RATES="1", START="important", BASE=str(tmp_path / "base"), PAIR="et-en"
    )
    assert status == 0, output[-3000:]
    rows = [line.split("|")[1:-1] for line in (tmp_path / "out" / "rates.md").read_text().splitlines()[2:]]
    tried = [(name.strip(), float(rate)) for name, rate, *_ in rows]
    assert tried == [("stage1", 6.67e-5), ("stage1", 2e-4), ("stage1", 6e-4), ("stage2", 6.67e-5), ("stage2", 2e-4),
                     ("stage2", 6e-4), ("sft", 2.22e-6), ("sft", 6.67e-6), ("sft", 2e-5)]  # fmt: skip
    for name in ("stage1", "stage2", "sft"):
        losses = {float(loss): chosen.strip() for training, _, loss, chosen in rows if training.strip() == name}
        assert losses[min(losses)] == "yes" and list(losses.values()).count("yes") == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_five_systems_twice_the_same(tmp_path: Path) -> None:
    save_tiny_dense(tmp_path / "base", "qwen2")
    settings = {"BASE": str(tmp_path / "base"), "PAIR": "et-en", "SEGMENTS": "6", "TEXTS": "6"}
    status, output = run_example("real", tmp_path / "first", HOURS="0.001", **settings)
    assert status == 0, output[-3000:]
    out = tmp_path / "first" / "out"
    assert (out / "plan").read_text() == "STAGE1_STEPS=3 STAGE2_STEPS=10\n", "no time for more"
    summary = json.loads((out / "summary.json").read_text())
    systems = ["base", "upcycled", "stage1", "sft", "mixmoe"]
    assert all(list(direction) == systems for direction in summary["directions"].values())
    assert set(summary["perplexity"]) == {"et", "en", "zh"}
    first_line = (out / "report.md").read_text().splitlines()[0]
    assert output.splitlines()[-1] == summary["verdict"] and summary["verdict"][:30] in first_line
    assert "Against full fine-tuning (sft): translation" in summary["verdict"]
    assert "trained parameters" in (out / "costs.md").read_text()
    again = {**settings, "HOURS": "0.001", "PLAN": str(out / "plan")}
    status, output = run_example("real", tmp_path / "second", **again)
    assert status == 0, output[-3000:]
    repeated = json.loads((tmp_path / "second" / "out" / "summary.json").read_text())
    for figures in ("directions", "bits_per_byte", "significance", "routing"):
        assert repeated[figures] == summary[figures]
