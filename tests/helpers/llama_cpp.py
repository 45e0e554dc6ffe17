"""llama.cpp's byte-level BPE written down from its definition, to compare tokenizers with; slow and plain."""

from __future__ import annotations

from collections.abc import Sequence

import regex

from tests.helpers.tiny_hf import SENTENCES

# src/llama-vocab.cpp of llama.cpp: each expression cuts what the one before left.
WORDS = {
    "smollm": [r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"],
    "qwen2": [
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}
ODD = (
    "",
    " ",
    "  two  spaces ",
    "In 1969 we're",
    "IT'S\r\n\r\n\tø½²٣",
    "a\u0301 é\u200b\ufeff👩‍👩‍👧 𝔘",
    "x==y!=\n\n\n  z",
    "<|im_x|>",
)
#: one sentence in each of eight languages, and odd characters
TEXTS = (*SENTENCES[1:], *ODD)


def encoded(text: str, words: str, tokens: Sequence[str], merges: Sequence[str]) -> list[int]:
    """Return a text's ids: cut it into words, then join the pair of the lowest rank until no pair has one.

    Args:
        text: without special tokens.
        words: which rule cuts, a key of WORDS.
        tokens: by id.
        merges: `LEFT RIGHT`, the lowest rank first.
    """
    pieces = [text]
    for expression in WORDS[words]:
        pieces = [part for piece in pieces for part in _cut(piece, expression)]
    number_of, rank_of = ({text: i for i, text in enumerate(texts)} for texts in (tokens, merges))
    letters = letters_of_bytes()
    ids: list[int] = []
    for piece in pieces:
        symbols = [letters[byte] for byte in piece.encode()]
        while pairs := [" ".join(symbols[i : i + 2]) for i in range(len(symbols) - 1)]:
            best = min(pairs, key=lambda pair: rank_of.get(pair, len(merges)))
            if best not in rank_of:
                break
            place = pairs.index(best)
            symbols[place : place + 2] = [best.replace(" ", "")]
        ids += [number_of[symbol] for symbol in symbols]
    return ids


def _cut(piece: str, expression: str) -> list[str]:
    """What matches the expression, and what lies between."""
    parts, end = [], 0
    for match in regex.finditer(expression, piece):
        parts += [piece[end : match.start()], match[0]]
        end = match.end()
    return [part for part in [*parts, piece[end:]] if part]


def letters_of_bytes() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
