"""METEOR by NLTK, with WordNet's synonyms where its data is installed.

NLTK's METEOR matches words exactly, by the English Porter stemmer, and by English WordNet. It is defined for English;
into other languages it is a unigram score whose stems are wrong, and it is reported because the paper reports it.
Words are those of sacreBLEU's tokenizer for the target language (13a; characters for Chinese); case is ignored.

Source: Banerjee and Lavie 2005; the score is the mean over segments of `nltk.translate.meteor_score.meteor_score`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.scores import bleu_of, check_counts

logger = logging.getLogger(__name__)


def meteor_is_installed() -> bool:
    """Tell whether NLTK is there."""
    return find_spec("nltk") is not None


def report_missing_parts() -> None:
    """Log what METEOR lacks on this machine, and what to do about it: no NLTK, no METEOR; no WordNet, no synonyms."""
    if not meteor_is_installed():
        logger.warning("no METEOR: NLTK is not installed; pip install 'mixmoe-megatron[meteor]' adds it")
    elif _wordnet() is None:
        logger.warning("METEOR without synonyms: WordNet is not here; python -m nltk.downloader wordnet fetches it")


@cache
def _wordnet() -> Any | None:
    """NLTK's WordNet reader, None where its data is not installed."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None
    return wordnet


def score_meteor(hypotheses: Sequence[str], references: Sequence[str], target_language: str) -> tuple[float, str]:
    """Score translations.

    Args:
        hypotheses: Detokenised translations.
        references: Their references, same length and order.
        target_language: Language code; it chooses the tokenizer.

    Returns:
        METEOR, 0 to 1, and a signature with NLTK's version, the tokenizer, and whether WordNet took part.

    Raises:
        MixMoEError: NLTK is not installed, counts differ, or there is nothing to score.
    """
    if not meteor_is_installed():
        raise MixMoEError("METEOR needs NLTK: pip install 'mixmoe-megatron[meteor]'.")
    from nltk.translate.meteor_score import meteor_score

    check_counts(hypotheses, references, "The system")
    tokenizer = bleu_of(target_language).tokenizer
    wordnet = _wordnet()
    synonyms = wordnet or SimpleNamespace(synsets=lambda word: [])  # without WordNet no word has a synonym
    total = 0.0
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        words, wanted = (tokenizer(text.rstrip()).split() for text in (hypothesis, reference))
        total += meteor_score([wanted], words, wordnet=synonyms)
    has_wordnet = "yes" if wordnet else "no"
    signature = f"nltk:{version('nltk')}|tok:{tokenizer.signature()}|stem:porter|wordnet:{has_wordnet}"
    return total / len(references), signature
