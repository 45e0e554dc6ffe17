"""What a tokenizer does to each language's text, and whether its special tokens are what training relies on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import batched, islice
from pathlib import Path

from mixmoe_megatron.data.corpus import clean, read_lines, reading
from mixmoe_megatron.data.languages import check_language
from mixmoe_megatron.data.prompts import PromptTemplate, encode_pairs
from mixmoe_megatron.data.tokenizers import Prompt, TextTokenizer
from mixmoe_megatron.errors import MixMoEError

BATCH_LINES = 1000


@dataclass
class LanguageFigures:
    """Counts over a language's lines.

    Attributes:
        lines: Lines that do not look empty.
        bytes: Their UTF-8 bytes.
        tokens: Their tokens, without BOS and EOS.
        unknown: Tokens that stand for something the vocabulary lacks.
        restored: Lines that decoding their tokens gives back.
        joined: Lines whose tokens as a translation follow those of its prompt; the others' would have merged with them.
    """

    lines: int = 0
    bytes: int = 0
    tokens: int = 0
    unknown: int = 0
    restored: int = 0
    joined: int = 0


def language_figures(
    tokenizer: TextTokenizer, language: str, path: str | Path, max_lines: int, template: PromptTemplate
) -> LanguageFigures:
    """Measure a tokenizer on the first lines of a text.

    Args:
        tokenizer: The tokenizer.
        language: Language code of the text.
        path: Plain text, a document a line; compressed or not.
        max_lines: Read so many lines at most.
        template: The prompt, for the boundary between it and a translation.

    Raises:
        MixMoEError: The code is unknown, the file is unreadable, or no line is left.
    """
    check_language(language)
    figures = LanguageFigures()
    texts = (clean(line) for _, line in islice(read_lines(path), max_lines))
    usable = (text for text in texts if reading(text) and not tokenizer.holds_control_token(text))
    unknown = tokenizer.hf.unk_token_id
    for batch in batched(usable, BATCH_LINES):
        ids = tokenizer.encode(batch, add_special_tokens=False)
        figures.lines += len(batch)
        figures.bytes += sum(len(text.encode()) for text in batch)
        figures.tokens += sum(map(len, ids))
        figures.unknown += 0 if unknown is None else sum(line.count(unknown) for line in ids)
        figures.restored += sum(
            tokenizer.decode(line).removeprefix(" ") == text for line, text in zip(ids, batch, strict=True)
        )
        prompts = [template.render(text, language, language) for text in batch]
        figures.joined += len(batch) - encode_pairs(tokenizer, prompts, batch).encoded_alone
    if not figures.tokens:
        raise MixMoEError(f"{path} holds no text to measure the tokenizer on.")
    return figures


def special_token_facts(tokenizer: TextTokenizer) -> list[str]:
    """Say what the special tokens are, one line each; lines of what may do harm begin with "CHECK"."""
    hf = tokenizer.hf
    facts = [f"EOS {_name(tokenizer, tokenizer.eos_id)} ends every document and every translation"]
    spelled = tokenizer.encode([Prompt((hf.eos_token, True))], add_special_tokens=False)[0]
    if spelled != [tokenizer.eos_id]:
        facts.append(f"CHECK: the text {hf.eos_token!r} is encoded as {spelled}: EOS is not marked as a special token")
    if tokenizer.eos_id == hf.unk_token_id and not _is_complete(tokenizer):
        facts.append("CHECK: EOS is the unknown token too: a character that the vocabulary lacks would end a text")
    if tokenizer.bos_id is not None:
        facts.append(f"BOS {_name(tokenizer, tokenizer.bos_id)} is put before every text")
    elif hf.bos_token_id is None:
        facts.append("BOS: none")
    else:
        facts.append(f"BOS {_name(tokenizer, hf.bos_token_id)} is named but not put before a text")
    if tokenizer.bos_id == tokenizer.eos_id:
        facts.append("CHECK: every text begins with EOS, which is BOS too")
    if hf.pad_token_id is None:
        facts.append("PAD: none; EOS fills up, which is harmless: padding is masked by its place, not by its id")
    elif hf.pad_token_id == tokenizer.eos_id:
        facts.append("PAD is EOS, which is harmless: padding is masked by its place, not by its id")
    else:
        facts.append(f"PAD {_name(tokenizer, tokenizer.pad_id)}")
    space = "with a space before it (sentencepiece)" if tokenizer.adds_prefix_space else "as it stands"
    return [*facts, f"a text's first word is encoded {space}"]


def describe_check(tokenizer: TextTokenizer, figures: Mapping[str, LanguageFigures]) -> str:
    """Write the facts and a Markdown table of the languages.

    Args:
        tokenizer: The tokenizer.
        figures: Language code -> its figures.
    """
    lines = [f"{type(tokenizer.hf).__name__}, {tokenizer.vocab_size} ids"]
    lines += [f"- {fact}" for fact in special_token_facts(tokenizer)]
    if figures:
        lines += ["", "| language | lines | bytes a token | unknown tokens | lines restored | prompt boundary kept |"]
        lines += ["|---|---:|---:|---:|---:|---:|"]
    for language, f in figures.items():
        lines.append(
            f"| {language} | {f.lines} | {f.bytes / f.tokens:.2f} | {f.unknown / f.tokens:.3%} | "
            f"{f.restored / f.lines:.1%} | {f.joined / f.lines:.1%} |"
        )
    return "\n".join(lines)


def _name(tokenizer: TextTokenizer, token_id: int) -> str:
    return f"{tokenizer.hf.convert_ids_to_tokens(token_id)!r} ({token_id})"


def _is_complete(tokenizer: TextTokenizer) -> bool:
    """Whether characters that no vocabulary has a token for are still encoded, by their bytes."""
    return tokenizer.hf.unk_token_id not in tokenizer.encode(["\U000e0041\U00012345"], add_special_tokens=False)[0]
