"""Language codes: their English names for prompts, and how each language's text length is counted."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from mixmoe_megatron.errors import MixMoEError

LANGUAGE_NAMES: Final[Mapping[str, str]] = MappingProxyType({
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech", "da": "Danish", "de": "German",
    "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish", "fr": "French",
    "gu": "Gujarati", "ha": "Hausa", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian",
    "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "kk": "Kazakh", "ko": "Korean",
    "lt": "Lithuanian", "lv": "Latvian", "ms": "Malay", "nl": "Dutch", "no": "Norwegian", "pl": "Polish",
    "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sr": "Serbian",
    "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu",
    "uz": "Uzbek", "vi": "Vietnamese", "zh": "Chinese",
})  # fmt: skip
#: FLORES-200's codes of the paper's languages and English
FLORES_CODES: Final[Mapping[str, str]] = MappingProxyType({
    "cs": "ces_Latn", "de": "deu_Latn", "en": "eng_Latn", "et": "est_Latn", "fi": "fin_Latn", "ru": "rus_Cyrl",
    "tr": "tur_Latn", "zh": "zho_Hans",
})  # fmt: skip
CHARACTER_COUNTED: Final[frozenset[str]] = frozenset({"ja", "zh"})


def check_language(code: str) -> str:
    """Return the code itself when it is a known ISO 639-1 code.

    Raises:
        MixMoEError: The code is not in `LANGUAGE_NAMES`.
    """
    if code not in LANGUAGE_NAMES:
        raise MixMoEError(f"Unknown language code '{code}': give one of {', '.join(sorted(LANGUAGE_NAMES))}.")
    return code


def flores_code(code: str) -> str:
    """Return FLORES-200's code of a language: 'de' -> 'deu_Latn'.

    Raises:
        MixMoEError: The code is not in `FLORES_CODES`.
    """
    if code not in FLORES_CODES:
        raise MixMoEError(f"No FLORES code is known for '{code}': give one of {', '.join(sorted(FLORES_CODES))}.")
    return FLORES_CODES[code]


def language_name(code: str) -> str:
    """Return the English name of a language, as the prompt spells it: 'de' -> 'German'.

    Raises:
        MixMoEError: The code is unknown.
    """
    return LANGUAGE_NAMES[check_language(code)]


def count_words(text: str, code: str) -> int:
    """Count the length of a segment as the stage-2 filter does.

    Args:
        text: One segment.
        code: Its language code.

    Returns:
        Whitespace-separated words; for Chinese and Japanese, characters that are not whitespace.
    """
    if code in CHARACTER_COUNTED:
        return sum(not character.isspace() for character in text)
    return len(text.split())
