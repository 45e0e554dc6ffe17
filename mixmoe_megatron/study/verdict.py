"""What a report says first: is the trained model better than the untouched base, or worse than doing nothing?

Translation is judged by the paired bootstrap that evaluation.json holds (chrF++, or chrF where an earlier version did
not test chrF++), retention by the 95 % interval of the change of bits per byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.study.interference import bits_per_byte_change
from mixmoe_megatron.study.tables import METRIC_TITLES, p_value_text, signed

SIGNIFICANT = 0.05
MIN_TESTED_SEGMENTS = 30  # below, resampling knows too little of what other segments would give
BETTER, WORSE, UNDECIDED = "better", "worse", "not distinguishable"
DEFAULT_TRAINED, DEFAULT_FULL = "mixmoe", "sft"
_MAX_FIGURES = 4  # of more directions or languages the sentence gives the names alone


class Judgement(NamedTuple):
    """A system against another one in one direction or language.

    Attributes:
        place: The direction or the language.
        word: `BETTER`, `WORSE` or `UNDECIDED`.
        figure: The difference and what it rests on.
    """

    place: str
    word: str
    figure: str


def judge_test(test: dict[str, Any], metric: str, num_segments: int) -> str:
    """Judge a paired bootstrap test.

    Args:
        test: Content of `Comparison.to_dict`.
        metric: One of its metrics, of which more is better.
        num_segments: On how many segments it rests.

    Returns:
        `BETTER` or `WORSE` where p < 0.05, there are at least 30 segments and two digits show a difference; else
        `UNDECIDED`.
    """
    difference = float(signed(test[f"{metric}_difference"], 2))
    if difference == 0 or test[f"{metric}_p_value"] >= SIGNIFICANT or num_segments < MIN_TESTED_SEGMENTS:
        return UNDECIDED
    return BETTER if difference > 0 else WORSE


def judge_translation(evaluation: dict[str, Any], system: str, other: str) -> list[Judgement]:
    """Judge each direction in which a system was tested against another one, the baseline or the rival.

    Args:
        evaluation: Content of evaluation.json.
        system: The one that is judged.
        other: What it is compared with.
    """
    tests_of = evaluation["significance"]
    if other != evaluation["baseline"]:
        tests_of = evaluation.get("rival_significance", {}) if other == evaluation.get("rival") else {}
    judgements = []
    for direction, tests in tests_of.items():
        if test := tests.get(system):
            metric = "chrf_plus_plus" if "chrf_plus_plus_p_value" in test else "chrf"
            count = evaluation["num_test_segments"][direction]
            few = f", only {count} segments" if count < MIN_TESTED_SEGMENTS else ""
            difference = f"{signed(test[f'{metric}_difference'], 2)} {METRIC_TITLES[metric]}"
            figure = f"{difference}, {p_value_text(test[f'{metric}_p_value'])}{few}"
            judgements.append(Judgement(direction, judge_test(test, metric, count), figure))
    return judgements


def judge_retention(evaluation: dict[str, Any], system: str, other: str) -> list[Judgement]:
    """Judge each language whose monolingual text both systems read: `WORSE` where all of the interval is above 0.

    Args:
        evaluation: Content of evaluation.json.
        system: The one that is judged.
        other: What it is compared with.
    """
    judgements = []
    for language, measured in evaluation["perplexity"].items():
        if system in measured and other in measured:
            change, low, high = bits_per_byte_change(measured[other], measured[system])
            word = UNDECIDED
            if low is not None and high is not None and low * high > 0:
                word = WORSE if low > 0 else BETTER
            judgements.append(Judgement(language, word, f"{signed(change)} % bits per byte"))
    return judgements


def _listed(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def _told(judgements: list[Judgement], kind: str, name: Callable[[str], str]) -> str:
    """Say where a system is better, worse or neither, with the figures where there are few."""
    parts = []
    for word in (WORSE, BETTER, UNDECIDED):
        group = [judgement for judgement in judgements if judgement.word == word]
        places = [name(judgement.place) for judgement in group]
        if len(judgements) <= _MAX_FIGURES:
            places = [f"{place} ({judgement.figure})" for place, judgement in zip(places, group, strict=True)]
        elif len(group) == len(judgements):
            places = [f"all {len(group)} {kind}"]
        if places:
            parts.append(f"{word} in {_listed(places)}")
    return ", ".join(parts)


def judged_system(evaluation: dict[str, Any], trained: str = "") -> str | None:
    """Return the system that a report judges: the named one, else mixmoe, else the last; None if only a base is there.

    Raises:
        MixMoEError: The named system was not evaluated, or is the base.
    """
    candidates = [system for system in evaluation["systems"] if system != evaluation["baseline"]]
    if trained and trained not in candidates:
        raise MixMoEError(
            f"No trained system {trained!r} was evaluated: choose one of {', '.join(candidates) or 'none'}."
        )
    if not candidates:
        return None
    return trained or (DEFAULT_TRAINED if DEFAULT_TRAINED in candidates else candidates[-1])


def _against(evaluation: dict[str, Any], system: str, other: str, lead: str, name: Callable[[str], str]) -> str:
    """Say in one sentence how a system stands against another one."""
    translation = _told(judge_translation(evaluation, system, other), "directions", name)
    retention = _told(judge_retention(evaluation, system, other), "languages", name)
    return (
        f"{lead} ({name(other)}): translation {translation or 'not tested'}; retention {retention or 'not measured'}."
    )


def _against_base(evaluation: dict[str, Any], system: str, name: Callable[[str], str]) -> str:
    """Say how a system stands against the untouched base, a warning first where it is worse."""
    base = evaluation["baseline"]
    if base is None:
        return f"{name(system)} was evaluated without the untouched base: nothing says whether training helped."
    losses = []
    for task, judge in (("translation", judge_translation), ("retention", judge_retention)):
        places = [name(found.place) for found in judge(evaluation, system, base) if found.word == WORSE]
        if places:
            losses.append(f"{task} in {_listed(places)}")
    lead = f"{name(system)} against the untouched base"
    if losses:
        lead = f"WARNING: {name(system)} is worse than doing nothing: {', '.join(losses)}. Against the untouched base"
    return _against(evaluation, system, base, lead, name)


def verdict(
    evaluation: dict[str, Any], trained: str = "", full: str = DEFAULT_FULL, name: Callable[[str], str] = str
) -> str:
    """Say in one line how the trained model stands against the untouched base and against full fine-tuning.

    Args:
        evaluation: Content of evaluation.json.
        trained: The system that is judged, see `judged_system`.
        full: The system that is full fine-tuning.
        name: Turns names of systems, directions and languages into what is written.

    Returns:
        A line that begins with ``WARNING`` where the trained model is worse than the base in any direction or language.

    Raises:
        MixMoEError: `trained` was not evaluated.
    """
    system = judged_system(evaluation, trained)
    if system is None:
        return "No trained model was evaluated."
    line = _against_base(evaluation, system, name)
    if full == system:
        return line
    if full not in evaluation["systems"]:
        return f"{line} Full fine-tuning ({name(full)}) was not evaluated."
    return f"{line} {_against(evaluation, system, full, 'Against full fine-tuning', name)}"
