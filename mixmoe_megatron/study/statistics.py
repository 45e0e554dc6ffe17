"""What a study may say of two systems trained several times and tested on the same segments. Pure functions of NumPy.

A score is an array [seeds, segments]: what a system trained with a seed got on a segment; a block is the array of one
direction or language. Two systems are compared by the difference of their blocks, seed by seed and segment by segment
(paired: the same seed means the same data order). The estimate is the mean over blocks of each block's mean.

Source: hierarchical bootstrap, Davison and Hinkley 1997 section 3.8; sign-flip test, Fisher 1935; Holm 1979.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
SIGNIFICANCE_LEVEL = 0.05
MAX_EXACT_SEEDS = 16  # up to here every pattern of signs is tried, above NUM_RANDOM_SIGNS drawn ones
NUM_RANDOM_SIGNS = 20000
HOLDS, FAILS, UNTOLD, EQUAL = "holds", "fails", "can't be told", "equal"
_SEED = 12345

Block = NDArray[np.float64]


class Estimate(NamedTuple):
    """A mean with its 95 % interval.

    Attributes:
        mean: Over blocks, seeds and segments.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float


class Contrast(NamedTuple):
    """A claim "first is better than second" by one endpoint.

    Attributes:
        estimate: The difference, first minus second, in units where more is better.
        p_value: Of the sign-flip test over seeds, not adjusted.
        adjusted: The p-value after Holm's correction within its table.
        verdict: `HOLDS`, `FAILS`, `UNTOLD` or `EQUAL`.
    """

    estimate: Estimate
    p_value: float
    adjusted: float
    verdict: str


def seed_means(blocks: Sequence[Block]) -> Block:
    """Return the mean over blocks of each seed's mean, [seeds]."""
    return np.mean([block.mean(axis=1) for block in blocks], axis=0)


def hierarchical_bootstrap(blocks: Sequence[Block], num_resamples: int = NUM_RESAMPLES) -> Estimate:
    """Return the mean and the percentile interval of resampled seeds and, in each block, resampled segments.

    The same seeds are drawn for all blocks, and the same segments for all seeds: both are shared, so both are crossed.
    With one seed the interval tells of other segments alone.

    Args:
        blocks: Arrays [seeds, segments] of as many seeds.
        num_resamples: Bootstrap resamples.
    """
    random = np.random.default_rng(_SEED)
    seeds = blocks[0].shape[0]
    seed_weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), num_resamples) / seeds
    total = np.zeros(num_resamples)
    for block in blocks:
        count = block.shape[1]
        weights = random.multinomial(count, np.full(count, 1 / count), num_resamples) / count
        total += ((seed_weights @ block) * weights).sum(axis=1)
    low, high = np.quantile(total / len(blocks), (0.025, 0.975))
    return Estimate(float(seed_means(blocks).mean()), float(low), float(high))


def sign_flip_p_value(differences: Block) -> float:
    """Return the two-sided p-value of "these differences are symmetric around 0", by flipping their signs.

    Args:
        differences: One a seed, [seeds]. The smallest p-value of n seeds is 2 / 2**n: below 6 seeds nothing can be
            significant.
    """
    count = len(differences)
    if count <= MAX_EXACT_SEEDS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=count)))
    else:
        signs = np.random.default_rng(_SEED).choice((1.0, -1.0), (NUM_RANDOM_SIGNS, count))
        signs[0] = 1.0
    means = np.abs(signs @ differences)
    return float(np.mean(means >= abs(differences.sum()) * (1 - 1e-12)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down method, in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def compare_systems(contrasts: Sequence[Sequence[Block]]) -> list[Contrast]:
    """Judge all claims of one table together.

    Args:
        contrasts: For each claim the blocks of differences, first system minus second, more is better.

    Returns:
        For each claim its estimate and verdict. A claim holds, or fails, where the sign-flip test over seeds is
        significant after Holm's correction and the interval over seeds and segments excludes 0 on that side; it is
        equal where every difference is 0; else it can't be told.
    """
    p_values = [sign_flip_p_value(seed_means(blocks)) for blocks in contrasts]
    judged = []
    for blocks, p_value, adjusted in zip(contrasts, p_values, holm(p_values), strict=True):
        estimate = hierarchical_bootstrap(blocks)
        verdict = UNTOLD
        if not any(block.any() for block in blocks):
            verdict = EQUAL
        elif adjusted < SIGNIFICANCE_LEVEL and estimate.low * estimate.high > 0:
            verdict = HOLDS if estimate.low > 0 else FAILS
        judged.append(Contrast(estimate, p_value, adjusted, verdict))
    return judged
