"""Which lines and pairs are kept, and why the others are not.

Imports the standard library only, so that worker processes start fast.

Source: Mix-MoE (arXiv:2605.24681) section IV-A: pairs of 1 to 200 words a side; the lower limit of monolingual text
counts tokens, so tools/preprocess_data.py keeps it. All else is off unless asked for, or takes out what is no text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from mixmoe_megatron.data.corpus import clean, drop, has_control_characters, is_utf8, reading
from mixmoe_megatron.data.languages import count_words
from mixmoe_megatron.errors import MixMoEError


@dataclass(frozen=True)
class FilterOptions:
    """What a line or a pair must satisfy.

    Attributes:
        min_words: Least words of each side of a pair (Chinese and Japanese: characters).
        max_words: Most words of each side of a pair.
        max_characters: Most characters of a line or side: a line of 100,000 characters without a blank is one word.
        max_length_ratio: Most characters of the longer side for each of the shorter one; 0: no limit.
        drop_copies: Drop pairs whose sides look alike.
        language_id: Drop texts that lingua (low accuracy mode, all its languages) takes for another language.
    """

    min_words: int = 1
    max_words: int = 200
    max_characters: int = 5000
    max_length_ratio: float = 0.0
    drop_copies: bool = False
    language_id: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            MixMoEError: A limit makes no sense, or lingua is not installed.
        """
        if not 1 <= self.min_words <= self.max_words:
            raise MixMoEError(f"min_words {self.min_words} and max_words {self.max_words} must be 1 or more, in order.")
        if self.max_characters < 1:
            raise MixMoEError(f"max_characters must be 1 or more, not {self.max_characters}.")
        if self.max_length_ratio and self.max_length_ratio < 1:
            raise MixMoEError(f"max_length_ratio must be 0 (no limit) or 1 or more, not {self.max_length_ratio}.")
        if self.language_id and find_spec("lingua") is None:
            raise MixMoEError(
                "language_id needs the package lingua-language-detector: pip install 'mixmoe-megatron[langid]'."
            )


def filter_rows(
    rows: Iterable[Sequence[str] | None], languages: Sequence[str], options: FilterOptions
) -> tuple[list[tuple[str, ...]], Counter[str]]:
    """Clean rows and keep the good ones.

    Args:
        rows: One text for each language; None for a row that could not be read.
        languages: One or two codes.
        options: The limits.

    Returns:
        The cleaned texts that are kept, in order, and counts: `read` and `dropped_<reason>`.
    """
    kept: list[tuple[str, ...]] = []
    counts: Counter[str] = Counter()
    for row in rows:
        counts["read"] += 1
        texts = () if row is None else tuple(clean(text) for text in row)
        reason = why_dropped(texts, languages, options)
        if reason is None:
            kept.append(tuple(text.replace("\t", " ") for text in texts))
        else:
            drop(counts, reason)
    return kept, counts


def why_dropped(texts: Sequence[str], languages: Sequence[str], options: FilterOptions) -> str | None:
    """Name the first test that cleaned texts fail, None when they pass all.

    Args:
        texts: One for each language; empty when the row could not be read.
        languages: Their codes.
        options: The limits.
    """
    if not texts:
        return "broken_row"
    if not all(map(is_utf8, texts)):
        return "wrong_encoding"
    seen = [reading(text) for text in texts]
    if not all(seen):
        return "empty"
    if any(has_control_characters(text, allowed="\t") for text in texts):
        return "control_character"
    lengths = [len(text) for text in texts]
    if max(lengths) > options.max_characters:
        return "too_many_characters"
    if len(texts) > 1:
        words = [count_words(text, language) for text, language in zip(seen, languages, strict=True)]
        if min(words) < options.min_words:
            return "too_few_words"
        if max(words) > options.max_words:
            return "too_many_words"
    if options.max_length_ratio and max(lengths) > options.max_length_ratio * min(lengths):
        return "length_ratio"
    if options.drop_copies and len(texts) > 1 and len(set(seen)) == 1:
        return "copy"
    if options.language_id and any(
        _language_identifier()(text) != language for text, language in zip(texts, languages, strict=True)
    ):
        return "other_language"
    return None


@cache
def _language_identifier() -> Callable[[str], str | None]:
    """Return a function from a text to its ISO 639-1 code, None when it is undecided."""
    from lingua import LanguageDetectorBuilder

    detector = LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()

    def identify(text: str) -> str | None:
        language = detector.detect_language_of(text)
        return None if language is None else language.iso_code_639_1.name.lower()

    return identify
