"""Translation prompts, and the token boundary between a prompt and its translation.

At generation a model is fed `tokens(prompt)` and nothing else. Training must show it the very same prompt tokens, so
they always come from the prompt text alone, with the special tokens that the tokenizer adds (a BOS, if it adds one).
The translation's tokens are what follows that prefix in `tokens(prompt + separator + target)`: the leading space of
the target thus belongs to the target, as the model will produce it. When the tokenizer merges across the boundary
(the prompt's tokens are not a prefix of the whole's), the target is encoded alone, without special tokens; the
prompt's tokens stay as they are at generation.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixmoe_megatron.data.languages import language_name
from mixmoe_megatron.data.tokenizers import Prompt, TextTokenizer
from mixmoe_megatron.errors import MixMoEError

ALMA_TEMPLATE = (
    "Translate this from {source_language} to {target_language}:\n{source_language}: {source}\n{target_language}:"
)
FIELDS = frozenset({"source_language", "target_language", "source"})


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with the fields {source_language}, {target_language} and {source}; the default is ALMA's wording.

    Raises:
        MixMoEError: The text has an unknown field, broken braces, or not exactly one {source}.
    """

    text: str = ALMA_TEMPLATE

    def __post_init__(self) -> None:
        try:
            parts = [part[1:] for part in string.Formatter().parse(self.text) if part[1] is not None]
        except ValueError as error:
            raise MixMoEError(f"The prompt template has broken braces ({error}); write {{{{ for a brace.") from error
        fields = [
            f"{field}{spec and ':' + spec}{'!' + conversion if conversion else ''}" for field, spec, conversion in parts
        ]
        unknown = sorted(set(fields) - FIELDS)
        if unknown:
            known = ", ".join(sorted(FIELDS))
            raise MixMoEError(f"The prompt template has the unknown field '{unknown[0]}'; the fields are {known}.")
        if fields.count("source") != 1:
            raise MixMoEError("The prompt template must hold {source} exactly once.")

    def render(self, source: str, source_language: str, target_language: str) -> Prompt:
        """Fill the template; special tokens that the template spells are meant, those of the source are plain text.

        Args:
            source: The text to translate.
            source_language: Language code of the source.
            target_language: Language code of the translation.

        Raises:
            MixMoEError: A language code is unknown.
        """
        names = {
            "source_language": language_name(source_language),
            "target_language": language_name(target_language),
        }
        parts = []
        for literal, field, _, _ in string.Formatter().parse(self.text):
            parts.append((literal, True))
            if field is not None:
                parts.append((source, False) if field == "source" else (names[field], True))
        return Prompt(*parts)


def load_template(path: str | Path | None) -> PromptTemplate:
    """Read a user's template file (UTF-8; one newline at its end is not part of it), or give the default for None.

    Raises:
        MixMoEError: The file is missing, not UTF-8, or not a valid template.
    """
    if path is None:
        return PromptTemplate()
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MixMoEError(f"Cannot read the prompt template {path}: {error}.") from error
    return PromptTemplate(text.removesuffix("\n"))


def target_separator(prompt: str) -> str:
    """Return what stands between a prompt and its translation: nothing after whitespace, else one space."""
    return "" if prompt[-1:].isspace() else " "


def encode_prompts(tokenizer: TextTokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Encode prompts exactly as they are fed at generation.

    Returns:
        One list of token ids a prompt, with BOS when the tokenizer adds it.
    """
    return tokenizer.encode(prompts, add_special_tokens=True)


@dataclass(frozen=True)
class EncodedPairs:
    """Token ids of prompts and of their translations (EOS included), and how many targets were encoded alone."""

    prompts: list[list[int]]
    targets: list[list[int]]
    encoded_alone: int


def encode_pairs(tokenizer: TextTokenizer, prompts: Sequence[str], targets: Sequence[str]) -> EncodedPairs:
    """Encode prompts and translations so that training equals generation (see the module's docstring).

    Args:
        tokenizer: The model's tokenizer.
        prompts: Rendered prompts.
        targets: Their translations, without outer whitespace.
    """
    prompt_ids = encode_prompts(tokenizer, prompts)
    texts = [prompt + target_separator(prompt) + target for prompt, target in zip(prompts, targets, strict=True)]
    target_ids, encoded_alone = [], 0
    for prompt, target, head, whole in zip(
        prompts, targets, prompt_ids, tokenizer.encode(texts, add_special_tokens=True), strict=True
    ):
        if whole[: len(head)] == head:
            tail = whole[len(head) :]
        else:
            encoded_alone += 1
            separator = "" if tokenizer.adds_prefix_space else target_separator(prompt)
            tail = tokenizer.encode([separator + target], add_special_tokens=False)[0]
        target_ids.append([*tail, tokenizer.eos_id])
    return EncodedPairs(prompt_ids, target_ids, encoded_alone)
