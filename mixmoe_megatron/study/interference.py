"""What training cost and gained, language by language: monolingual perplexity and translation, before and after.

The intervals are 95 % percentile intervals of a paired bootstrap over texts: both systems are resampled on the same
texts, so that what makes a text easy for both cancels.

Source: Mix-MoE (arXiv:2605.24681) Table VII (interference); the intervals are ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NUM_RESAMPLES = 1000
_SEED = 12345


def bits_per_byte_change(
    before: dict[str, Any], after: dict[str, Any], num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float | None, float | None]:
    """Compare two systems' bits per byte on the same texts.

    Args:
        before: Of the baseline: content of `Perplexity.to_dict`.
        after: Of the system, on the same texts.
        num_resamples: Bootstrap resamples.

    Returns:
        The relative change in percent (above 0: worse), and the 95 % interval of it: None, None of a single text, whose
        resamples are all alike and tell nothing of other texts.
    """
    first, second = (np.asarray(value["text_bits"], dtype=np.float64) for value in (before, after))
    assert first.shape == second.shape, "both systems read the same texts"
    change = float(100.0 * (second.sum() / first.sum() - 1.0))
    if len(first) == 1:
        return change, None, None
    draws = np.random.default_rng(_SEED).integers(len(first), size=(num_resamples, len(first)))
    changes = 100.0 * (second[draws].sum(axis=1) / first[draws].sum(axis=1) - 1.0)
    low, high = np.quantile(changes, (0.025, 0.975))
    return change, float(low), float(high)


def interference(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare each system with the baseline in each language.

    Args:
        evaluation: Content of evaluation.json, with a baseline.

    Returns:
        One row for each language and system: perplexities, the change of bits per byte with its interval (None where no
        monolingual text was measured), and for each direction the chrF of both with the half-width of sacreBLEU's 95 %
        interval.
    """
    baseline = evaluation["baseline"]
    rows = []
    for system in evaluation["systems"]:
        if baseline is None or system == baseline:
            continue
        for language in _languages(evaluation):
            row: dict[str, Any] = {"language": language, "system": system, "perplexity": None, "directions": {}}
            if measured := evaluation["perplexity"].get(language):
                row["perplexity"] = [measured[name]["perplexity"] for name in (baseline, system)]
                row["bits_per_byte_change"] = bits_per_byte_change(measured[baseline], measured[system])
            for direction, tests in evaluation["significance"].items():
                if language in direction.partition("@")[0].split("-") and system in tests:
                    scores = evaluation["directions"][direction]
                    row["directions"][direction] = {
                        "chrf": [scores[name]["chrf"] for name in (baseline, system)],
                        "interval": [tests[system]["chrf_baseline_interval"], tests[system]["chrf_interval"]],
                        "p_value": tests[system]["chrf_p_value"],
                    }
            rows.append(row)
    return rows


def _languages(evaluation: dict[str, Any]) -> list[str]:
    """All languages of the evaluation, those with monolingual text first, in their order."""
    translated = [code for name in evaluation["directions"] for code in name.partition("@")[0].split("-")]
    return list(dict.fromkeys([*evaluation["perplexity"], *translated]))
