"""A whole evaluation: its files, that finished work is skipped, and that runs with other options are refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.generation import GenerationOptions
from mixmoe_megatron.evaluation.segments import Direction
from mixmoe_megatron.study import runner
from mixmoe_megatron.study.runner import EvaluationPlan, evaluate
from tests.helpers.tiny_hf import SENTENCES, save_tiny_dense, tiny_mixmoe, tiny_tokenizer

DIRECTION = Direction("de", "en", ["Das Haus ist alt.", "Der Fluss fließt."], ["The house is old.", "The river runs."])
GREEDY = GenerationOptions("greedy", max_new_tokens=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    save_tiny_dense(root / "base")
    tiny_mixmoe(stage=2).save_pretrained(root / "mixmoe")
    tiny_tokenizer(root / "mixmoe")
    return {name: root / name for name in ("base", "mixmoe")}


@pytest.fixture(scope="module")
def plan(models) -> EvaluationPlan:
    texts = {"de": [SENTENCES[2]], "en": [SENTENCES[1]]}
    return EvaluationPlan(models, [DIRECTION, DIRECTION.reverse()], texts, GREEDY, baseline="base")


@pytest.fixture(scope="module")
def finished(plan, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("evaluation")
    evaluate(plan, output_dir)
    return output_dir


def refuse_to_load(*args, **kwargs):
    raise AssertionError("a model was loaded")


def tool(repo_root: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, repo_root / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_and_files(finished) -> None:
    result = json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))
    assert set(result["directions"]) == {"de-en", "en-de"}
    assert set(result["directions"]["de-en"]["mixmoe"]) == {
        "bleu", "chrf", "chrf_plus_plus", "ter", "meteor"
    }  # fmt: skip
    assert set(result["significance"]["de-en"]) == {"mixmoe"}
    assert set(result["perplexity"]["de"]) == {"base", "mixmoe"}
    assert set(result["routing"]) == {"mixmoe"}
    assert set(result["routing"]["mixmoe"]["en"]["layers"]) == {"1", "3"}
    assert result["num_test_segments"] == {"de-en": 2, "en-de": 2}
    assert set(result["seconds"]["mixmoe"]) >= {"translate de-en", "perplexity de", "routing de"}
    assert result["versions"]["sacrebleu"]
    hypotheses = {path.name for path in (finished / "hypotheses").iterdir()}
    assert hypotheses == {f"{d}.{s}.txt" for d in ("de-en", "en-de") for s in ("source", "reference", "base", "mixmoe")}


def test_scores_equal_the_sacrebleu_command_on_the_files(finished) -> None:
    result = json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))
    folder = finished / "hypotheses"
    command = [sys.executable, "-m", "sacrebleu", str(folder / "de-en.reference.txt"), "-i",
               str(folder / "de-en.mixmoe.txt"), "-m", "chrf", "-w", "12"]  # fmt: skip
    theirs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert result["directions"]["de-en"]["mixmoe"]["chrf"] == pytest.approx(theirs["score"], abs=1e-9)
    assert result["signatures"]["de-en"]["chrf"] == theirs["signature"]


def test_finished_work_is_skipped_and_systems_can_be_added(plan, finished, models, monkeypatch) -> None:
    before = json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))
    with monkeypatch.context() as patch:
        patch.setattr(runner, "load_model", refuse_to_load)
        assert evaluate(plan, finished) == before
    more = replace(plan, systems={**models, "again": models["base"]})
    result = evaluate(more, finished)
    assert result["directions"]["de-en"]["again"] == result["directions"]["de-en"]["base"]
    assert result["significance"]["de-en"]["again"]["chrf_difference"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generation": replace(GREEDY, max_new_tokens=6)}, "max new tokens was 5 and is now 6"),
        ({"directions": [replace(DIRECTION, sources=["x", "y"])]}, "test sets de-en"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_other_options_are_refused(plan, finished, change, message) -> None:
    with pytest.raises(MixMoEError, match=message):
        evaluate(replace(plan, **change), finished)


def test_batch_size_may_change(plan, finished, monkeypatch) -> None:
    monkeypatch.setattr(runner, "load_model", refuse_to_load)
    evaluate(replace(plan, generation=replace(GREEDY, batch_size=1)), finished)


def test_another_model_under_the_same_name_is_refused_and_can_overwrite(plan, models, tmp_path) -> None:
    alone = replace(plan, systems={"base": models["base"]}, monolingual={}, directions=[DIRECTION])
    evaluate(alone, tmp_path / "out")
    save_tiny_dense(tmp_path / "other", seed=7)
    other = replace(alone, systems={"base": tmp_path / "other"})
    with pytest.raises(MixMoEError, match="systems base was"):
        evaluate(other, tmp_path / "out")
    result = evaluate(other, tmp_path / "out", overwrite=True)
    assert result["systems"] == {"base": str(tmp_path / "other")}
    (tmp_path / "out" / "hypotheses" / "de-en.base.txt").write_text("one line\n", encoding="utf-8")
    with pytest.raises(MixMoEError, match="1 hypotheses for 2 references"):
        evaluate(other, tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"systems": {}}, "at least one system"),
        ({"systems": {"a b": Path("x")}}, "cannot name a system"),
        ({"systems": {"source": Path("x")}}, "cannot name a system"),
        ({"directions": [], "monolingual": {}}, "nothing to evaluate"),
        ({"baseline": "other"}, "baseline 'other'"),
        ({"directions": [DIRECTION, DIRECTION]}, "de-en comes twice"),
        ({"monolingual": {"xy": ["text"]}}, "Unknown language code 'xy'"),
    ],
)
def test_plans_that_make_no_sense(plan, fields, message) -> None:
    with pytest.raises(MixMoEError, match=message):
        replace(plan, **fields)


def test_the_command_prints_the_table(models, tmp_path, repo_root, monkeypatch, capsys) -> None:
    test_set = tmp_path / "test.tsv"
    test_set.write_text("en\txx\nThe house is old.\tDas Haus ist alt.\nYes\tJa\n", encoding="utf-8")
    options = ["--baseline", "base", "--test", f"de-en={test_set}", "--source-column", "xx",
               "--decoding", "greedy", "--max-new-tokens", 4,
               "--output-dir", tmp_path / "out"]  # fmt: skip
    for name, path in models.items():
        options += ["--system", f"{name}={path}"]
    monkeypatch.setattr(sys, "argv", ["evaluate_translation.py", *map(str, options)])
    assert tool(repo_root, "evaluate_translation").main() == 0
    printed = capsys.readouterr().out
    assert "| de-en     | mixmoe |" in printed
    assert "p " in printed
    monkeypatch.setattr(sys, "argv", ["evaluate_translation.py", *map(str, options[:-4]), "--system", "broken"])
    assert tool(repo_root, "evaluate_translation").main() == 2
    assert capsys.readouterr().err.strip().endswith("error: --system takes NAME=PATH, not 'broken'.")


def test_segments_with_line_breaks_and_special_tokens(models, tmp_path, repo_root, monkeypatch, caplog) -> None:
    """The files are those that the sacrebleu command takes; the user hears of the special tokens."""
    rows = [{"de": "Das <s>alte</s>\nHaus", "en": "The old\u2028\rhouse"}, {"de": "Hund\x85", "en": "\x0cDog"}]
    test_set = tmp_path / "t.jsonl"
    test_set.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["--system", f"a={models['base']}", "--test", f"de-en={test_set}", "--decoding", "greedy",
               "--max-new-tokens", "3", "--output-dir", str(tmp_path / "out")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate_translation.py", *options])
    with caplog.at_level("INFO"):
        assert tool(repo_root, "evaluate_translation").main() == 0
    assert "a: special tokens spelled out in test texts are encoded as plain text (texts: 1)" in caplog.text
    folder = tmp_path / "out" / "hypotheses"
    assert (folder / "de-en.source.txt").read_text("utf-8") == "Das <s>alte</s> Haus\nHund\n"
    command = [sys.executable, "-m", "sacrebleu", str(folder / "de-en.reference.txt"), "-i",
               str(folder / "de-en.a.txt"), "-m", "chrf", "-b"]  # fmt: skip
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0


def test_inspect_routing_command(models, tmp_path, repo_root, monkeypatch, capsys) -> None:
    mono = tmp_path / "mono.txt"
    mono.write_text("\n".join(SENTENCES[1:4]), encoding="utf-8")
    options = ["--model", models["mixmoe"], "--mono", f"de={mono}", "--mono", f"en={mono}", "--output-dir", tmp_path]
    monkeypatch.setattr(sys, "argv", ["inspect_routing.py", *map(str, options)])
    assert tool(repo_root, "inspect_routing").main() == 0
    assert "Distance of de en (0 alike, 1 disjoint): layer 1 lm 0.00" in capsys.readouterr().out
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((tmp_path / "routing.json").read_text(encoding="utf-8"))["languages"]) == {"de", "en"}
