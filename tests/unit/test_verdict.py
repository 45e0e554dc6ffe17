"""A report's first line: better or worse than the untouched base, per direction, and what was not evaluated."""

from __future__ import annotations

from typing import Any

import pytest

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.study.verdict import judge_test, verdict

Differences = dict[str, tuple[float, float]]


def paired_tests(differences: Differences) -> dict[str, Any]:
    return {
        direction: {"mixmoe": {"chrf_plus_plus_difference": difference, "chrf_plus_plus_p_value": p_value}}
        for direction, (difference, p_value) in differences.items()
    }


def evaluation(
    differences: Differences, bits: dict[str, list[float]] | None = None, rival: Differences | None = None
) -> dict[str, Any]:
    """Of base and mixmoe: chrF++ and p-values of each direction; of each language mixmoe's bits over 1 of the base."""
    systems = ["base", "stage1", "mixmoe", *(["sft"] if rival is not None else [])]
    return {
        "baseline": "base",
        "rival": "sft" if rival is not None else None,
        "systems": dict.fromkeys(systems, "models/x"),
        "directions": {direction: {} for direction in differences},
        "num_test_segments": dict.fromkeys(differences, 200),
        "significance": paired_tests(differences),
        "rival_significance": paired_tests(rival or {}),
        "perplexity": {
            language: {name: {"text_bits": ratios if name == "mixmoe" else [1.0] * len(ratios)} for name in systems}
            for language, ratios in (bits or {}).items()
        },
    }


def test_better() -> None:
    value = evaluation({"de-en": (2.0, 0.0005), "en-de": (1.0, 0.02)}, {"de": [0.9] * 20})
    assert verdict(value) == (
        "mixmoe against the untouched base (base): translation better in de-en (+2.00 chrF++, p < 0.001) and en-de "
        "(+1.00 chrF++, p = 0.020); retention better in de (-10.0 % bits per byte). "
        "Full fine-tuning (sft) was not evaluated."
    )


def test_worse_is_a_warning() -> None:
    value = evaluation({"de-en": (-2.0, 0.004)}, {"zh": [1.2, 1.3] * 20})
    assert verdict(value).startswith(
        "WARNING: mixmoe is worse than doing nothing: translation in de-en, retention in zh. Against the untouched "
        "base (base): translation worse in de-en (-2.00 chrF++, p = 0.004); retention worse in zh (+25.0 % bits per "
    )


def test_no_difference() -> None:
    value = evaluation({"de-en": (2.0, 0.05), "en-de": (0.001, 0.001)}, {"de": [0.9, 1.1] * 10, "en": [1.5]})
    text = verdict(value)
    assert "WARNING" not in text and "better" not in text and "worse" not in text
    assert "translation not distinguishable in de-en (+2.00 chrF++, p = 0.050) and en-de (0.00 chrF++" in text
    assert "retention not distinguishable in de (0.0 % bits per byte) and en (+50.0 %" in text, "one text is no proof"


def test_mixed_directions_are_told_apart() -> None:
    value = evaluation({"de-en": (2.0, 0.001), "en-de": (-1.0, 0.03), "fi-en": (0.1, 0.6)})
    assert verdict(value).startswith(
        "WARNING: mixmoe is worse than doing nothing: translation in en-de. Against the untouched base (base): "
        "translation worse in en-de (-1.00 chrF++, p = 0.030), better in de-en (+2.00 chrF++, p = 0.001), not "
        "distinguishable in fi-en (+0.10 chrF++, p = 0.600); retention not measured."
    )


def test_many_directions_are_told_shortly() -> None:
    languages = ("cs", "de", "et", "fi", "ru")
    better: Differences = {f"{code}-en": (2.0, 0.001) for code in languages}
    assert "translation better in all 5 directions;" in verdict(evaluation(better))
    mixed = verdict(evaluation({**better, "en-ru": (-1.0, 0.01)}))
    assert "translation worse in en-ru, better in cs-en, de-en, et-en, fi-en and ru-en;" in mixed


def test_a_base_that_is_not_there() -> None:
    value = evaluation({"de-en": (2.0, 0.001)}) | {"baseline": None, "significance": {}}
    assert verdict(value).startswith("mixmoe was evaluated without the untouched base: nothing says whether training")
    assert verdict(value | {"systems": {}}) == "No trained model was evaluated."
    assert verdict(value | {"systems": {"base": "x"}, "baseline": "base"}) == "No trained model was evaluated."


def test_full_fine_tuning() -> None:
    directions: Differences = {"de-en": (2.0, 0.001), "en-de": (1.0, 0.01)}
    value = evaluation(directions, {"de": [1.0] * 20}, {"de-en": (-3.0, 0.001), "en-de": (0.2, 0.4)})
    assert verdict(value).endswith(
        " Against full fine-tuning (sft): translation worse in de-en (-3.00 chrF++, p = 0.001), not distinguishable in "
        "en-de (+0.20 chrF++, p = 0.400); retention not distinguishable in de (0.0 % bits per byte)."
    )
    assert "WARNING" not in verdict(value), "worse than another method is not worse than doing nothing"
    assert "translation not tested;" in verdict(value | {"rival": None}).partition("full fine-tuning")[2]
    assert "full fine-tuning" not in verdict(value, trained="sft").lower()


def test_which_system_is_judged() -> None:
    value = evaluation({"de-en": (2.0, 0.001)}) | {"systems": dict.fromkeys(("base", "mixmoe", "other"), "x")}
    assert verdict(value).startswith("mixmoe ")
    assert verdict(value, trained="other").startswith("other against")
    assert verdict(value | {"systems": {"base": "x", "other": "x"}}).startswith("other against")
    for wrong in ("base", "absent"):
        with pytest.raises(
            MixMoEError, match=f"No trained system '{wrong}' was evaluated: choose one of mixmoe, other"
        ):
            verdict(value, trained=wrong)


def test_few_segments_decide_nothing() -> None:
    test = {"chrf_difference": 5.0, "chrf_p_value": 0.001}
    assert [judge_test(test, "chrf", count) for count in (29, 30)] == ["not distinguishable", "better"]
    value = evaluation({"de-en": (2.0, 0.001)}) | {"num_test_segments": {"de-en": 6}}
    assert "not distinguishable in de-en (+2.00 chrF++, p = 0.001, only 6 segments)" in verdict(value)


def test_an_evaluation_of_an_earlier_version_is_judged_by_chrf() -> None:
    value = evaluation({"de-en": (0.0, 1.0)})
    value["significance"]["de-en"]["mixmoe"] = {"chrf_difference": -1.0, "chrf_p_value": 0.01}
    assert "worse in de-en (-1.00 chrF, p = 0.010)" in verdict(value)
