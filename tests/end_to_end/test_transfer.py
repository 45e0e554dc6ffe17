"""The transfer run with another base and two pairs: its matrix, and a second run that takes over its stage 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.examples import assert_refused, run_example
from tests.helpers.tiny_hf import save_tiny_dense


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"PAIRS": "de-en xx-en"}, "PAIRS: xx-en is none of cs-en de-en"),
        ({"PAIRS": "de-en de-en"}, "names a pair twice"),
        ({"PAIRS": " "}, "PAIRS is empty"),
        ({"BASE": "/nowhere"}, "BASE=/nowhere is not a Hugging Face model directory"),
        ({"FROM": "/nowhere"}, "FROM=/nowhere is no protocol run with a finished stage 1"),
        ({"MINUTES": "soon"}, "MINUTES=soon must be a whole number"),
    ],
)
def test_wrong_settings_are_refused(variables: dict[str, str], sentence: str, tmp_path: Path) -> None:
    assert_refused("transfer", tmp_path, sentence, **variables)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_pairs_and_a_run_that_takes_over_stage_1(tmp_path: Path) -> None:
    save_tiny_dense(tmp_path / "base", "qwen2")
    status, output = run_example("transfer", tmp_path, BASE=str(tmp_path / "base"), PAIRS="de-en fi-en")
    assert status == 0, output[-3000:]
    check_matrix(tmp_path / "out", ["de-en", "fi-en"])

    second = tmp_path / "second"
    status, output = run_example("transfer", tmp_path, FROM=str(tmp_path / "out"), PAIRS="et-en", OUT=str(second))
    assert status == 0, output[-3000:]
    assert "[stage1] done before" in output
    check_matrix(second, ["et-en"])
    assert (second / "stage1").resolve() == tmp_path / "out" / "stage1"
    status, output = run_example("transfer", tmp_path, FROM=str(second), BASE="/nowhere", OUT=str(tmp_path / "third"))
    assert status == 2
    assert f"was made from BASE={tmp_path / 'base'}, not from BASE=/nowhere" in output


def check_matrix(directory: Path, pairs: list[str]) -> None:
    """Every pair's row has 14 directions in each metric, and the page holds its heatmaps."""
    matrix = json.loads((directory / "transfer.json").read_text(encoding="utf-8"))
    assert matrix["references"] == ["base", "stage1"]
    assert matrix["trained"] == {pair: pair for pair in pairs}
    assert {"bleu", "chrf", "chrf_plus_plus"} <= set(matrix["metrics"])
    for block in matrix["metrics"].values():
        assert set(block["scores"]) == {"base", "stage1", *pairs}
        assert set(block["gains"]["base"]) == {"stage1", *pairs}
        assert set(block["gains"]["stage1"]) == set(pairs)
        assert all(len(row) == 14 for rows in (block["scores"], *block["gains"].values()) for row in rows.values())
    page = (directory / "transfer.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(matrix["metrics"])
    assert (directory / "transfer.md").is_file()
    assert (directory / "transfer.csv").is_file()
