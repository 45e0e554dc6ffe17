"""Corpus scores with sacreBLEU (BLEU, chrF, chrF++, TER) and its paired bootstrap test, signatures included.

Source: Post 2018 (sacreBLEU), Popović 2015 and 2017 (chrF, chrF++), Snover et al. 2006 (TER), Koehn 2004 (paired
bootstrap).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import cast

from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest, Result

from mixmoe_megatron.errors import MixMoEError

METRIC_NAMES = ("bleu", "chrf", "chrf_plus_plus", "ter")
NUM_RESAMPLES = 1000
_BLEU_TOKENIZERS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}  # sacreBLEU's own choice by target language


@dataclass(frozen=True)
class Scores:
    """Scores of one system in one direction, and the sacreBLEU signature of each.

    Attributes:
        bleu: BLEU, 0 to 100.
        chrf: ChrF2, character n-grams only, 0 to 100.
        chrf_plus_plus: ChrF2++, with word bigrams, 0 to 100.
        ter: TER, edits for each 100 words of the reference; lower is better.
        signatures: Metric name to signature.
    """

    bleu: float
    chrf: float
    chrf_plus_plus: float
    ter: float
    signatures: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """A system against a baseline on the same segments, by paired bootstrap resampling.

    The test is two-sided: a small p-value says that the scores differ; the sign of the difference says which is better.
    It is 1 for equal scores, and where all segments are the same one: no other text can be inferred from it.

    Attributes:
        baseline: Name of the baseline.
        system: Name of the system.
        bleu_difference: System minus baseline, BLEU points.
        bleu_p_value: Of the BLEU difference.
        chrf_difference: System minus baseline, chrF points.
        chrf_p_value: Of the chrF difference.
        chrf_plus_plus_difference: System minus baseline, chrF++ points.
        chrf_plus_plus_p_value: Of the chrF++ difference.
        chrf_baseline_interval: Half-width of the 95 % interval of the baseline's chrF.
        chrf_interval: Half-width of the 95 % interval of the system's chrF.
        signatures: Metric name to signature, with the resampling's seed and count.
    """

    baseline: str
    system: str
    bleu_difference: float
    bleu_p_value: float
    chrf_difference: float
    chrf_p_value: float
    chrf_plus_plus_difference: float
    chrf_plus_plus_p_value: float
    chrf_baseline_interval: float
    chrf_interval: float
    signatures: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        """Return a JSON-able dictionary."""
        return asdict(self)


def bleu_of(target_language: str) -> BLEU:
    """Return BLEU with the tokenizer for the target language: zh for Chinese, 13a for most.

    Raises:
        MixMoEError: The language's tokenizer is not installed.
    """
    try:
        return BLEU(tokenize=_BLEU_TOKENIZERS.get(target_language, "13a"))
    except (ImportError, RuntimeError) as error:
        raise MixMoEError(
            f"BLEU into {target_language!r} needs sacreBLEU's optional tokenizer: "
            f"pip install 'sacrebleu[{target_language}]'."
        ) from error


def check_counts(hypotheses: Sequence[str], references: Sequence[str], name: str) -> None:
    """Check that there is one hypothesis for each reference, and any at all.

    Raises:
        MixMoEError: There is not.
    """
    if len(hypotheses) != len(references):
        raise MixMoEError(f"{name} has {len(hypotheses)} hypotheses for {len(references)} references.")
    if not references:
        raise MixMoEError("There is no segment to score.")


def score(hypotheses: Sequence[str], references: Sequence[str], target_language: str) -> Scores:
    """Score a system's translations against one reference each.

    Args:
        hypotheses: Detokenised translations.
        references: Their references, same length and order.
        target_language: Language code; it chooses BLEU's tokenizer.

    Raises:
        MixMoEError: Counts differ, nothing to score, or the language's tokenizer is not installed.
    """
    check_counts(hypotheses, references, "The system")
    asian = target_language in _BLEU_TOKENIZERS  # TER counts words; there characters take their place
    metrics = (bleu_of(target_language), CHRF(), CHRF(word_order=2), TER(normalized=asian, asian_support=asian))
    values = [metric.corpus_score(list(hypotheses), [list(references)]).score for metric in metrics]
    signatures = {name: str(metric.get_signature()) for name, metric in zip(METRIC_NAMES, metrics, strict=True)}
    return Scores(values[0], values[1], values[2], values[3], signatures)


def _plain(value: float | None) -> float:
    """Return what a paired bootstrap has set as Python's float: under NumPy 2 it is a float32, which JSON refuses."""
    return float(cast(float, value))


def compare(
    baseline: tuple[str, Sequence[str]],
    system: tuple[str, Sequence[str]],
    references: Sequence[str],
    target_language: str,
    num_resamples: int = NUM_RESAMPLES,
) -> Comparison:
    """Test whether a system's BLEU, chrF and chrF++ differ from a baseline's (`sacrebleu --paired-bs`).

    Args:
        baseline: Name and hypotheses.
        system: Name and hypotheses.
        references: One reference a segment.
        target_language: Language code; it chooses BLEU's tokenizer.
        num_resamples: Bootstrap resamples; the smallest possible p-value is 1 / (num_resamples + 1).

    Raises:
        MixMoEError: Counts differ, nothing to score, or the language's tokenizer is not installed.
    """
    for name, hypotheses in (baseline, system):
        check_counts(hypotheses, references, f"System {name!r}")
    logging.getLogger("sacrebleu").setLevel(logging.WARNING)  # it tells of each resampling step
    signatures, results = PairedTest(
        [(name, list(hypotheses)) for name, hypotheses in (baseline, system)],
        {"BLEU": bleu_of(target_language), "chrF2": CHRF(), "chrF2++": CHRF(word_order=2)},
        [list(references)],
        test_type="bs",
        n_samples=num_resamples,
    )()
    (bleu_baseline, bleu), (chrf_baseline, chrf), (plus_baseline, plus) = (
        cast(list[Result], results[key]) for key in ("BLEU", "chrF2", "chrF2++")
    )
    one_segment = len(set(zip(references, baseline[1], system[1], strict=True))) == 1

    def p_value(theirs: Result, ours: Result) -> float:
        # sacreBLEU's is its smallest there: 0, what the resamples differ by, is never more than the real difference
        return 1.0 if one_segment or ours.score == theirs.score else _plain(ours.p_value)

    return Comparison(
        baseline=baseline[0],
        system=system[0],
        bleu_difference=bleu.score - bleu_baseline.score,
        bleu_p_value=p_value(bleu_baseline, bleu),
        chrf_difference=chrf.score - chrf_baseline.score,
        chrf_p_value=p_value(chrf_baseline, chrf),
        chrf_plus_plus_difference=plus.score - plus_baseline.score,
        chrf_plus_plus_p_value=p_value(plus_baseline, plus),
        chrf_baseline_interval=_plain(chrf_baseline.ci),
        chrf_interval=_plain(chrf.ci),
        signatures={
            name: str(signatures[key])
            for name, key in (("bleu", "BLEU"), ("chrf", "chrF2"), ("chrf_plus_plus", "chrF2++"))
        },
    )
