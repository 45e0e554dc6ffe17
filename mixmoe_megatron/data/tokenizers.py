"""Open a Hugging Face tokenizer directory and check what training and generation rely on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from mixmoe_megatron.checkpoint.metadata import METADATA_FILE, read_metadata
from mixmoe_megatron.errors import MixMoEError

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
PROBE_TEXT = "Grüße, 世界! 123 \tČeština\nüks öö"


class Prompt(str):
    """A text of which some parts may spell special tokens and mean them; those in the other parts are plain text.

    Attributes:
        parts: Each part, and whether its special tokens are meant; joined they are the text.
    """

    parts: tuple[tuple[str, bool], ...]

    def __new__(cls, *parts: tuple[str, bool]) -> Prompt:
        """Join the parts."""
        prompt = super().__new__(cls, "".join(text for text, _ in parts))
        prompt.parts = parts
        return prompt

    def __add__(self, text: str) -> Prompt:
        """Append plain text."""
        return Prompt(*self.parts, (text, False))


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A checked Hugging Face tokenizer; build it with `open_tokenizer`.

    Attributes:
        hf: The transformers tokenizer (fast, or slow sentencepiece).
        directory: Where it was read from.
        vocab_size: Highest token id plus one, added tokens included.
        eos_id: The end-of-sequence id.
        bos_id: The id the tokenizer puts before every text, None when it adds none.
        pad_id: The padding id; eos_id when the tokenizer names none (padding is masked everywhere).
        adds_prefix_space: Whether a text's first word is encoded as if a space stood before it (sentencepiece).
        special_tokens: Every string with a control id.
        inseparable_tokens: Those that become control ids even where they are plain text, for they are not marked as
            special in the tokenizer's files; empty for a tokenizer that is in order.
    """

    hf: Any
    directory: Path
    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int
    adds_prefix_space: bool
    special_tokens: tuple[str, ...]
    inseparable_tokens: tuple[str, ...]

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Encode texts; a special token that is spelled out is plain text, save where a `Prompt` means it.

        Args:
            texts: Any number of texts.
            add_special_tokens: Whether to put BOS first, if this tokenizer does so by itself.

        Returns:
            Token ids, one list a text.
        """
        ids: list[list[int]] = []
        for meant, run in groupby(texts, key=self._meanings):
            if meant == {True, False}:
                ids += [self._encode_parts(cast(Prompt, text), add_special_tokens) for text in run]
            else:
                ids += _encode(self.hf, list(run), add_special_tokens, plain=meant != {True})
        return ids

    def _meanings(self, text: str) -> set[bool]:
        """Tell whether the special tokens that a text spells are meant, or plain text, or both."""
        meanings = {meant for part, meant in getattr(text, "parts", ()) if self.spells_special_token(part)}
        return meanings if True in meanings else set()

    def _encode_parts(self, prompt: Prompt, add_special_tokens: bool) -> list[int]:
        """Encode a prompt that means some special tokens and quotes others, piece by piece between the former."""
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        ids = [self.bos_id] if add_special_tokens and self.bos_id is not None else []
        text = ""
        for part, meant in prompt.parts:
            for piece in special.split(part) if meant else [part]:
                if meant and piece in self.special_tokens:
                    ids += [*_encode(self.hf, [text], False)[0], self.hf.convert_tokens_to_ids(piece)]
                    text = ""
                else:
                    text += piece
        return ids + _encode(self.hf, [text], False)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text, leaving special tokens out and spaces as they are."""
        return self.hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def spells_special_token(self, text: str) -> bool:
        """Tell whether a text spells out a special token."""
        return any(token in text for token in self.special_tokens)

    def holds_control_token(self, text: str) -> bool:
        """Tell whether a text would be encoded with a control id in it, see `inseparable_tokens`."""
        return any(token in text for token in self.inseparable_tokens)

    def describe(self) -> dict[str, Any]:
        """Return what a data manifest records: sizes, ids and a fingerprint of the tokenizer's behaviour."""
        return {
            "class": type(self.hf).__name__,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "bos_id": self.bos_id,
            "sha256": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Hash vocabulary, special ids and a probe text's tokens.

        Files are not hashed: saving a tokenizer again may change their bytes and not their meaning.

        Returns:
            A sha256 as 64 hexadecimal digits.
        """
        probe = [_encode(self.hf, [PROBE_TEXT], flag)[0] for flag in (True, False)]
        facts = [sorted(self.hf.get_vocab().items()), self.eos_id, self.bos_id, probe]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def leave_torch_out() -> None:
    """Let transformers 4 do without torch, in a process that only tokenizes: the import would take most of its start.

    Nothing is changed where one of them is loaded already, or where USE_TORCH is set.
    """
    if sys.modules.keys().isdisjoint(("torch", "transformers")) and "USE_TORCH" not in os.environ:
        os.environ.update(USE_TORCH="0", TRANSFORMERS_NO_ADVISORY_WARNINGS="1")


def open_tokenizer(directory: str | Path, model_rows: int | None = None) -> TextTokenizer:
    """Open and check the tokenizer in a local directory.

    Args:
        directory: A directory with Hugging Face tokenizer files; sentencepiece models (Llama) included.
        model_rows: Vocabulary of the model, where it is known; None: of the model that the tokenizer lies beside.

    Raises:
        MixMoEError: No tokenizer there, it cannot be read, it has no EOS, it ends every text with a token, or it has
            more ids than the model has rows.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise MixMoEError(f"The tokenizer directory {directory} does not exist.")
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise MixMoEError(f"No tokenizer in {directory}: expected one of {', '.join(TOKENIZER_FILES)}.")
    from transformers import AutoTokenizer

    # who knows the model's rows has read its config.json, which is opened once
    config = _read_object(directory / "config.json") if model_rows is None else {}
    try:
        hf = AutoTokenizer.from_pretrained(directory, local_files_only=True, **_no_false_alarm(config))
    except Exception as error:  # transformers raises many types for unreadable files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MixMoEError(f"Cannot read the tokenizer in {directory}: {reason}") from error
    if hf.eos_token_id is None:
        raise MixMoEError(
            f"The tokenizer in {directory} has no end-of-sequence token; set eos_token in tokenizer_config.json."
        )
    special_tokens = _special_tokens(hf)
    tokenizer = TextTokenizer(
        hf=hf,
        directory=directory,
        vocab_size=max(hf.get_vocab().values()) + 1,
        eos_id=hf.eos_token_id,
        bos_id=_added_bos(hf, directory),
        pad_id=hf.eos_token_id if hf.pad_token_id is None else hf.pad_token_id,
        adds_prefix_space=_adds_prefix_space(hf),
        special_tokens=special_tokens,
        inseparable_tokens=tuple(
            token for token in special_tokens if hf.convert_tokens_to_ids(token) in _encode(hf, [token], False)[0]
        ),
    )
    rows = model_rows or _rows_of_model(directory, config)
    if rows is not None:
        check_tokenizer_fits_model(tokenizer, rows)
    _warn_of_another_reading(hf, directory)
    return tokenizer


def _warn_of_another_reading(hf: Any, directory: Path) -> None:
    """Warn where transformers does not encode as tokenizer.json says.

    It builds some tokenizers (Llama's above all) anew from class and settings, and not all versions alike: a model that
    was trained on the tokens of one may be served those of another.
    """
    if not (directory / "tokenizer.json").is_file():
        return
    import tokenizers
    import transformers

    ids = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).encode(PROBE_TEXT, add_special_tokens=False)
    if ids.ids != _encode(hf, [PROBE_TEXT], False)[0]:
        logger.warning(
            "%s: transformers %s encodes otherwise than tokenizer.json says, and other versions may not: settle it in "
            "tokenizer_config.json (add_prefix_space, legacy), as the model was trained",
            directory,
            transformers.__version__,
        )


def check_tokenizer_fits_model(
    tokenizer: TextTokenizer, vocab_size: int, eos_ids: Collection[int] | None = None
) -> None:
    """Check a tokenizer against the model that will read its ids.

    Args:
        tokenizer: The tokenizer.
        vocab_size: Rows of the model's token embedding, as trained: those that a layout adds do not count. A model with
            more rows than ids is fine.
        eos_ids: The model's end-of-sequence ids (config.json or generation_config.json), None to skip the check.

    Raises:
        MixMoEError: Some ids have no embedding row, or the model does not stop at the tokenizer's EOS.
    """
    check_number_of_ids(f"The tokenizer in {tokenizer.directory}", tokenizer.vocab_size, vocab_size)
    if eos_ids is not None and tokenizer.eos_id not in eos_ids:
        raise MixMoEError(
            f"The tokenizer in {tokenizer.directory} ends a text with id {tokenizer.eos_id} but the model's "
            f"end-of-sequence ids are {sorted(eos_ids)}; make eos_token and eos_token_id agree."
        )


def check_number_of_ids(name: str, ids: int, rows: int) -> None:
    """Check that each id of a tokenizer has a row in the model's embedding.

    Args:
        name: What the message begins with: of the tokenizer.
        ids: Its highest id plus one.
        rows: Of the embedding, as trained.

    Raises:
        MixMoEError: There are more ids than rows.
    """
    if ids > rows:
        raise MixMoEError(
            f"{name} has {ids} ids but the model's embedding has only {rows} rows; use the tokenizer that belongs to "
            "this model."
        )


def count_ids(directory: str | Path) -> int | None:
    """Return the highest id plus one that a tokenizer's files give, as `open_tokenizer` does, without transformers.

    Args:
        directory: A directory that may hold tokenizer files.

    Raises:
        MixMoEError: A file cannot be read.
    """
    try:
        names, named = _ids_of_files(Path(directory))
        return max(names.values()) + 1 + len(named - names.keys()) if names else None
    except MixMoEError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise MixMoEError(
            f"The tokenizer files in {directory} are not as transformers writes them "
            f"({type(error).__name__}: {error}): save the tokenizer again with transformers."
        ) from error


def _ids_of_files(directory: Path) -> tuple[dict[str, int], set[str | None]]:
    """Return token -> id, and the tokens that the settings name: such a one gets an id of its own if it has none."""
    whole, slow, config, added, special = (
        _read_object(directory / f"{name}.json")
        for name in ("tokenizer", "vocab", "tokenizer_config", "added_tokens", "special_tokens_map")
    )
    vocabulary = (whole.get("model") or {}).get("vocab") or slow
    names = vocabulary if isinstance(vocabulary, dict) else {piece[0]: id for id, piece in enumerate(vocabulary)}
    if not names and (directory / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        names = {pieces.IdToPiece(id): id for id in range(len(pieces))}
    if not names:
        return {}, set()
    names = {**names, **{token["content"]: token["id"] for token in whole.get("added_tokens") or ()}, **added}
    names |= {token["content"]: int(id) for id, token in (config.get("added_tokens_decoder") or {}).items()}
    named = [{**config, **special}.get(name) for name in _NAMED_TOKENS]
    return names, {token.get("content") if isinstance(token, dict) else token for token in named if token}


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is no file.

    Raises:
        MixMoEError: It is not one.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MixMoEError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise MixMoEError(f"{path} does not hold a JSON object.")
    return value


def _rows_of_model(directory: Path, config: dict[str, Any]) -> int | None:
    """Return the vocabulary of the model that a tokenizer lies beside: a Hugging Face one, or a checkpoint's."""
    rows = config.get("vocab_size")
    if rows is None and (directory.parent / METADATA_FILE).is_file():
        rows = read_metadata(directory.parent).megatron_args.get("vocab_size")
    return rows if isinstance(rows, int) else None


def _no_false_alarm(config: dict[str, Any]) -> dict[str, bool]:
    """Return arguments for a tokenizer whose model is not Mistral's.

    transformers 4.57.3 to 4.57.6 warn of a wrong pattern of Mistral's beside every config.json whose
    transformers_version is neither old nor 5.
    """
    return {} if "mistral" in str(config) else {"fix_mistral_regex": False}


def _encode(hf: Any, texts: Sequence[str], add_special_tokens: bool, plain: bool = True) -> list[list[int]]:
    """Encode texts with a transformers tokenizer, without its length warning; plain: special tokens are text."""
    if not texts:
        return []
    hf.split_special_tokens = plain
    return hf(
        [str(text) for text in texts], add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )["input_ids"]


def _added_bos(hf: Any, directory: Path) -> int | None:
    """Return the id that the tokenizer puts before a text by itself, None when it puts none.

    Raises:
        MixMoEError: It also puts something behind the text: a prompt would be over before the translation.
    """
    bare, special = (_encode(hf, ["a"], flag)[0] for flag in (False, True))
    if special == bare:
        return None
    if special[1:] == bare:
        return special[0]
    raise MixMoEError(
        f"The tokenizer in {directory} adds more than one BOS token around a text; a decoder's tokenizer must not "
        "(set add_eos_token to false in tokenizer_config.json)."
    )


def _adds_prefix_space(hf: Any) -> bool:
    """Tell whether 'word' alone is encoded as 'word' after a space is."""
    alone, colon, both = (_encode(hf, [text], False)[0] for text in ("word", ":", ": word"))
    return both == colon + alone


def _special_tokens(hf: Any) -> tuple[str, ...]:
    """List every string with a control id."""
    added = [token.content for token in hf.added_tokens_decoder.values() if token.special]
    return tuple(sorted({*added, *hf.all_special_tokens}))
