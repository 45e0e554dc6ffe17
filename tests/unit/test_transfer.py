"""The transfer matrix, computed by hand: gains and their means, the files, and what is refused in one sentence."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixmoe_megatron.study.transfer import (
    csv_transfer,
    gain_cells,
    markdown_transfer,
    mean_gains,
    transfer_matrix,
    write_transfer,
)

TRAINED = {"de": "de-en", "fi": "fi-en"}
#: chrF++ of (base, stage 1, trained on de-en, trained on fi-en)
SCORES = {
    "de-en": (10.0, 11.0, 20.0, 14.0),
    "en-de": (8.0, 8.0, 18.0, 7.0),
    "fi-en": (5.0, 7.0, 9.0, 15.0),
    "en-fi": (6.0, 5.0, 5.0, 16.0),
}


@pytest.fixture
def evaluation() -> dict[str, Any]:
    systems = ("base", "stage1", *TRAINED)
    return {
        "baseline": "base",
        "systems": {system: f"models/{system}" for system in systems},
        "num_test_segments": dict.fromkeys(SCORES, 30),
        "directions": {
            direction: {
                system: {"bleu": value / 2, "chrf_plus_plus": value, "ter": 100 - value, "meteor": value / 100}
                for system, value in zip(systems, values, strict=True)
            }
            for direction, values in SCORES.items()
        },
        "signatures": {direction: {"bleu": "tok:13a"} for direction in SCORES},
        "significance": {
            direction: {
                system: {"bleu_p_value": 0.01 if direction == "fi-en" and system == "de" else 0.5, "chrf_p_value": 0.5}
                for system in systems[1:]
            }
            for direction in SCORES
        },
        "perplexity": {}, "routing": {}, "seconds": {}, "options": {"dtype": "bfloat16"}, "versions": {},
        "commit": "0123abc",
    }  # fmt: skip


def without_stage1(evaluation: dict[str, Any]) -> dict[str, Any]:
    for scores in evaluation["directions"].values():
        del scores["stage1"]
    return evaluation


def test_the_gains(evaluation) -> None:
    block = transfer_matrix(evaluation, TRAINED, "stage1")["metrics"]["chrf_plus_plus"]
    assert block["scores"]["de"] == {"de-en": 20.0, "fi-en": 9.0, "en-de": 18.0, "en-fi": 5.0}
    assert list(block["scores"]["de"]) == ["de-en", "fi-en", "en-de", "en-fi"], "into English first"
    assert block["gains"] == {
        "base": {
            "stage1": {"de-en": 1.0, "fi-en": 2.0, "en-de": 0.0, "en-fi": -1.0},
            "de": {"de-en": 10.0, "fi-en": 4.0, "en-de": 10.0, "en-fi": -1.0},
            "fi": {"de-en": 4.0, "fi-en": 10.0, "en-de": -1.0, "en-fi": 10.0},
        },
        "stage1": {
            "de": {"de-en": 9.0, "fi-en": 2.0, "en-de": 10.0, "en-fi": 0.0},
            "fi": {"de-en": 3.0, "fi-en": 8.0, "en-de": -1.0, "en-fi": 11.0},
        },
    }


def test_the_means(evaluation) -> None:
    means = transfer_matrix(evaluation, TRAINED, "stage1")["metrics"]["chrf_plus_plus"]["means"]
    assert means["base"]["de"] == {
        "own": 10.0, "others_into_english": 4.0, "others_out_of_english": -1.0, "better": 1, "others": 2
    }  # fmt: skip
    assert means["base"]["stage1"] == {
        "own": None, "others_into_english": 1.5, "others_out_of_english": -0.5, "better": 2, "others": 4
    }  # fmt: skip
    assert means["stage1"]["fi"]["own"] == 9.5
    only_into = mean_gains({"de-en@wmt17": 1.0, "de-en@flores": 3.0, "fi-en": 4.0}, "en-de")
    assert only_into["own"] == 2.0
    assert only_into["others_out_of_english"] is None


def test_a_gain_above_0_is_better_whatever_the_metric(evaluation) -> None:
    metrics = transfer_matrix(without_stage1(evaluation), TRAINED)["metrics"]
    assert metrics["ter"]["gains"]["base"] == metrics["chrf_plus_plus"]["gains"]["base"]
    assert list(metrics["ter"]["gains"]) == ["base"], "no stage 1 named"


def test_cells(evaluation) -> None:
    matrix = transfer_matrix(without_stage1(evaluation), TRAINED)
    assert gain_cells(matrix, "bleu", "base")["de"] == ["+5.0", "+2.0*", "+5.0", "-0.5"]
    assert gain_cells(matrix, "meteor", "base")["de"] == ["+10.0", "+4.0", "+10.0", "-1.0"], "in hundredths"
    matrix["num_test_segments"]["fi-en"] = 29
    assert gain_cells(matrix, "bleu", "base")["de"][1] == "+2.0", "too few segments for a test"


def test_the_page(evaluation, tmp_path) -> None:
    matrix = transfer_matrix(evaluation, TRAINED, "stage1")
    text = markdown_transfer(matrix, toy=True)
    assert "**Toy-sized figures.**" in text
    assert "**Toy-sized figures.**" not in markdown_transfer(matrix)
    assert re.search(r"\| de-en \(de\) +\| \*\*\+10\.0\*\* +\| +\+4\.0 \| \*\*\+10\.0\*\* +\| +-1\.0 \|", text)
    assert re.search(r"\| de-en \(de\) +\| chrF\+\+ +\| +\+10\.0 \| +\+4\.0 \| +-1\.0 \| +1 of 2 \|", text)
    assert "of 12 such tests a metric, 1 would be below" in text
    write_transfer(matrix, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"transfer.{suffix}" for suffix in ("md", "html", "csv", "json")} | {
        f"transfer_{metric}.png" for metric in ("bleu", "chrf_plus_plus", "ter", "meteor")
    }
    page = (tmp_path / "out" / "transfer.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert json.loads((tmp_path / "out" / "transfer.json").read_text(encoding="utf-8")) == matrix


def test_the_csv_holds_every_score(evaluation) -> None:
    rows = list(csv.DictReader(csv_transfer(transfer_matrix(evaluation, TRAINED, "stage1")).splitlines()))
    assert len(rows) == 4 * 4 * 4
    row = next(row for row in rows if (row["system"], row["direction"], row["metric"]) == ("de", "fi-en", "bleu"))
    assert row == {"system": "de", "trained_on": "de-en", "direction": "fi-en", "own_pair": "0", "metric": "bleu",
                   "score": "4.5", "gain_over_base": "2.0", "gain_over_stage1": "1.0", "p_value": "0.01"}  # fmt: skip
    assert [row["gain_over_base"] for row in rows if row["system"] == "base"] == [""] * 16


def only(*directions: str) -> Callable[[dict[str, Any]], None]:
    def change(evaluation: dict[str, Any]) -> None:
        evaluation["directions"] = {name: evaluation["directions"][name] for name in directions}

    return change


BOTH = ["--trained", "de=de-en", "--trained", "fi=fi-en"]


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        (None, ["--trained", "de=de-en"], "System 'stage1' has no training pair: give --trained stage1=PAIR"),
        (None, ["--stage1", "stage1", "--trained", "de=de-en"], "System 'fi' has no training pair"),
        (None, ["--stage1", "nobody", *BOTH], "has no system 'nobody': it has base, stage1, de, fi."),
        (None, ["--stage1", "base", *BOTH], "'base' cannot be two things"),
        (None, ["--stage1", "stage1", *BOTH, "--trained", "stage1=de-en"], "'stage1' cannot be two things"),
        (None, ["--stage1", "stage1", "--trained", "de=de-en", "--trained", "fi=fi"], "must be two languages"),
        (None, ["--stage1", "stage1", "--trained", "de=de-en", "--trained", "fi=xx-en"], "Unknown language code 'xx'"),
        (None, ["--stage1", "stage1", "--trained", "de=de-en", "--trained", "fi=cs-en"], "cs-en, which is not tested"),
        (None, ["--trained", "de"], "--trained takes NAME=PAIR, not 'de'."),
        (None, [*BOTH, "--trained", "de=fi-en"], "--trained names 'de' twice."),
        (lambda evaluation: evaluation.update(baseline=None), BOTH, "has no base to gain over"),
        (lambda evaluation: evaluation.pop("routing"), BOTH, "not an evaluation.json"),
        (only(), BOTH, "has no system 'de': it has none."),
        (only("de-en", "en-de"), ["--stage1", "stage1", "--trained", "de=de-en", "--trained", "fi=de-en"],
         "Only de-en, on which 'de' was trained, is tested"),
        (lambda evaluation: evaluation["directions"]["en-fi"].pop("de"), ["--stage1", "stage1", *BOTH],
         "has no BLEU of 'de' in en-fi"),
    ],
)  # fmt: skip
def test_mistakes(evaluation, change, options, sentence, tmp_path, repo_root, monkeypatch, capsys) -> None:
    if change is not None:
        change(evaluation)
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(evaluation), encoding="utf-8")
    assert run_tool(repo_root, monkeypatch, path, *options, "--output-dir", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command(evaluation, tmp_path, repo_root, monkeypatch, capsys) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(evaluation), encoding="utf-8")
    options = ["--stage1", "stage1", *BOTH, "--output-dir", tmp_path / "out"]
    assert run_tool(repo_root, monkeypatch, path, *options) == 0
    assert "transfer.html" in capsys.readouterr().out
    assert (tmp_path / "out" / "transfer.csv").is_file()


def run_tool(repo_root: Path, monkeypatch: pytest.MonkeyPatch, evaluation: Path, *options: Any) -> int:
    spec = importlib.util.spec_from_file_location("transfer_matrix", repo_root / "tools" / "transfer_matrix.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    words = ["transfer_matrix.py", "--evaluation", evaluation, *options]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    return tool.main()
