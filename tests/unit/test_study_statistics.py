"""Simulated studies: no effect is seldom found, a planted one often, and equal systems come out as equal."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import permutation_test

from mixmoe_megatron.study.statistics import (
    EQUAL,
    FAILS,
    HOLDS,
    UNTOLD,
    Block,
    compare_systems,
    hierarchical_bootstrap,
    holm,
    sign_flip_p_value,
)

STUDIES, SEEDS, SEGMENTS = 200, 10, 60
SEED_NOISE, SEGMENT_NOISE = 0.5, 8.0  # of a difference, in chrF++ points: between seeds, between segments


def simulated(random: np.random.Generator, effect: float, seeds: int = SEEDS) -> list[Block]:
    """Differences of two systems in two directions."""
    of_seeds = random.normal(effect, SEED_NOISE, (seeds, 1))
    return [of_seeds + random.normal(0, SEGMENT_NOISE, (seeds, SEGMENTS)) for _ in range(2)]


def share_told(effect: float) -> dict[str, float]:
    random = np.random.default_rng(7)
    words = [
        contrast.verdict
        for _ in range(STUDIES)
        for contrast in compare_systems([simulated(random, effect), simulated(random, effect)])
    ]
    return {word: words.count(word) / len(words) for word in (HOLDS, FAILS, UNTOLD)}


def test_no_effect_is_called_significant_in_at_most_one_study_of_twenty() -> None:
    told = share_told(0.0)
    assert told[HOLDS] + told[FAILS] <= 0.05


def test_an_effect_of_a_point_and_a_half_is_found_in_nine_studies_of_ten() -> None:
    told = share_told(1.5)
    assert told[HOLDS] >= 0.9 and told[FAILS] == 0
    assert share_told(-1.5)[FAILS] >= 0.9


def test_identical_systems_are_equal() -> None:
    (contrast,) = compare_systems([[np.zeros((3, 20)), np.zeros((3, 9))]])
    assert contrast.verdict == EQUAL and contrast.estimate == (0.0, 0.0, 0.0) and contrast.p_value == 1.0


def test_few_seeds_claim_nothing_however_large_the_effect() -> None:
    random = np.random.default_rng(1)
    for seeds in (1, 3, 5):
        (contrast,) = compare_systems([simulated(random, 50.0, seeds)])
        assert contrast.verdict == UNTOLD and contrast.estimate.low > 40
        assert contrast.p_value == pytest.approx(2 / 2**seeds)


def test_the_sign_flip_is_scipys() -> None:
    differences = np.random.default_rng(3).normal(0.4, 1.0, 8)
    theirs = permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=False
    ).pvalue  # fmt: skip
    assert sign_flip_p_value(differences) == pytest.approx(theirs)


def test_many_seeds_are_drawn_near_to_scipys() -> None:
    differences = np.random.default_rng(3).normal(0.3, 1.0, 20)
    theirs = permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=20000, rng=0).pvalue
    assert sign_flip_p_value(differences) == pytest.approx(theirs, abs=0.02)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.9]) == [1.0, 1.0]


def test_the_interval_is_the_normal_one_of_seeds_and_segments() -> None:
    """Crossed effects of known size: the variance is that of the seeds' mean plus that of the segments' mean."""
    random = np.random.default_rng(5)
    block = random.normal(0, 1.0, (40, 1)) + random.normal(0, 2.0, (1, 200))
    found = hierarchical_bootstrap([block])
    error = np.sqrt(block.mean(axis=1).var() / 40 + block.mean(axis=0).var() / 200)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert found.mean == pytest.approx(block.mean())
