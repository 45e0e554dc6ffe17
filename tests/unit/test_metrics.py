"""Scores equal those of the sacrebleu command on the same files, and mistakes are told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.scores import compare, score

REFERENCES = ["The house is old.", "Children play in the garden.", "The river runs through the town, slowly.", "Yes!"]
BASELINE = ["The home is old", "Kids in garden", "A river goes past that city", ""]
SYSTEM = ["The house is very old.", "Children play in a garden.", "The river runs through the city, slowly.", "Yes."]
CHINESE_REFERENCES = ["河流穿过城镇，孩子们在花园里玩耍。", "房子很旧。"]
CHINESE_SYSTEM = ["河流穿过城市，孩子在花园里玩。", "房子是旧的。"]

#: `python -m sacrebleu`, which cannot print its p-values where they are float32 (NumPy 2).
SACREBLEU = """
import json
json.JSONEncoder.default = lambda self, value: float(value)
from sacrebleu.sacrebleu import main
main()
"""


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def sacrebleu_command(tmp_path: Path, references: list[str], systems: list[list[str]], *options: str) -> list[dict]:
    files = [str(write(tmp_path / f"hypotheses{index}.txt", lines)) for index, lines in enumerate(systems)]
    command = [sys.executable, "-c", SACREBLEU, str(write(tmp_path / "reference.txt", references)), "-i", *files,
               "-m", "bleu", "chrf", "-w", "12", *options]  # fmt: skip
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result if isinstance(result, list) else [result]


@pytest.mark.parametrize(
    ("language", "references", "system"), [("en", REFERENCES, SYSTEM), ("zh", CHINESE_REFERENCES, CHINESE_SYSTEM)]
)
def test_scores_and_signatures_equal_the_sacrebleu_command(tmp_path, language, references, system) -> None:
    tokenizer = {"en": "13a", "zh": "zh"}[language]
    bleu, chrf = sacrebleu_command(tmp_path, references, [system], "--tokenize", tokenizer)
    plus = sacrebleu_command(tmp_path, references, [system], "--chrf-word-order", "2")[1]
    asian = ["--ter-asian-support", "--ter-normalized"] if language == "zh" else []
    ter = sacrebleu_command(tmp_path, references, [system], "-m", "ter", *asian)[0]
    ours = score(system, references, language)
    assert ours.ter == pytest.approx(ter["score"], abs=1e-9)
    assert ours.bleu == pytest.approx(bleu["score"], abs=1e-9)
    assert ours.chrf == pytest.approx(chrf["score"], abs=1e-9)
    assert ours.chrf_plus_plus == pytest.approx(plus["score"], abs=1e-9)
    assert ours.signatures == {
        "bleu": bleu["signature"],
        "chrf": chrf["signature"],
        "chrf_plus_plus": plus["signature"],
        "ter": ter["signature"],
    }


def test_the_documented_signature() -> None:
    assert (
        score(SYSTEM, REFERENCES, "en")
        .signatures["bleu"]
        .startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    )
    assert "|tok:zh|" in score(CHINESE_SYSTEM, CHINESE_REFERENCES, "zh").signatures["bleu"]


def test_paired_bootstrap_equals_the_sacrebleu_command(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("SACREBLEU_SEED", raising=False)
    rows = sacrebleu_command(tmp_path, REFERENCES, [BASELINE, SYSTEM], "--paired-bs", "--paired-bs-n", "200")
    ours = compare(("a", BASELINE), ("b", SYSTEM), REFERENCES, "en", num_resamples=200)
    assert ours.bleu_p_value == pytest.approx(rows[1]["BLEU"]["p_value"], abs=1e-4)
    assert ours.chrf_p_value == pytest.approx(rows[1]["chrF2"]["p_value"], abs=1e-4)
    assert ours.bleu_difference == pytest.approx(
        score(SYSTEM, REFERENCES, "en").bleu - score(BASELINE, REFERENCES, "en").bleu
    )
    assert ours.chrf_difference > 0
    assert "bs:200|seed:12345" in ours.signatures["chrf"]


def test_equal_systems_do_not_differ() -> None:
    result = compare(("a", SYSTEM), ("b", SYSTEM), REFERENCES, "en", num_resamples=50)
    assert result.chrf_difference == result.bleu_difference == 0.0
    assert result.chrf_p_value == result.bleu_p_value == 1.0
    assert result.to_dict()["baseline"] == "a"


def test_a_comparison_is_json_when_numpy_hands_out_float32(monkeypatch) -> None:
    """NumPy 2 keeps 0.5 * float32, sacreBLEU's interval, a float32."""
    monkeypatch.setattr("sacrebleu.significance.estimate_ci", lambda scores: (np.float32(scores.mean()), np.float32(2)))
    result = compare(("a", BASELINE), ("b", SYSTEM), REFERENCES, "en", num_resamples=50)
    assert json.loads(json.dumps(result.to_dict()))["chrf_interval"] == 2.0


@pytest.mark.parametrize("copies", [1, 50])
def test_one_segment_decides_nothing(copies) -> None:
    """Its resamples are all alike, as those of its copies are: sacreBLEU's p-value is the smallest there is."""
    sides = [BASELINE[:1] * copies, SYSTEM[:1] * copies, REFERENCES[:1] * copies]
    result = compare(("a", sides[0]), ("b", sides[1]), sides[2], "en")
    assert result.chrf_difference > 0 and result.chrf_p_value == result.bleu_p_value == 1.0
    worse = compare(("a", sides[1]), ("b", sides[0]), sides[2], "en")
    assert worse.chrf_difference < 0 and worse.chrf_p_value == 1.0


def test_other_translations_of_the_same_score_do_not_differ() -> None:
    swapped = [SYSTEM[0], BASELINE[0]] * 20, [BASELINE[0], SYSTEM[0]] * 20
    result = compare(("a", swapped[0]), ("b", swapped[1]), REFERENCES[:1] * 40, "en", num_resamples=50)
    assert result.chrf_difference == 0.0 and result.chrf_p_value == 1.0


def test_a_real_difference_is_still_told() -> None:
    result = compare(("a", ["x"] * 40), ("b", REFERENCES * 10), REFERENCES * 10, "en")
    assert result.chrf_difference > 0 and result.chrf_p_value < 0.001


def test_count_mismatch_and_nothing_to_score() -> None:
    with pytest.raises(MixMoEError, match="3 hypotheses for 4 references"):
        score(SYSTEM[:3], REFERENCES, "en")
    with pytest.raises(MixMoEError, match="'b' has 3 hypotheses"):
        compare(("a", SYSTEM), ("b", SYSTEM[:3]), REFERENCES, "en")
    with pytest.raises(MixMoEError, match="no segment"):
        score([], [], "en")
