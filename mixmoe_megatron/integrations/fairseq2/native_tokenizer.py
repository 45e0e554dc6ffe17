"""The tokenizer family: the tokenizer of an exported model as this package reads it, in fairseq2's interface.

fairseq2's own family for Hugging Face's tokenizers adds neither BOS nor EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq2.data.tokenizers import TokenDecoder, TokenEncoder, Tokenizer, VocabularyInfo
from torch import Tensor

from mixmoe_megatron.data.tokenizers import TextTokenizer, open_tokenizer
from mixmoe_megatron.errors import MixMoEError

#: mode of an encoder -> whether it puts the tokenizer's BOS before a text, and EOS behind it
_MODES: dict[str | None, tuple[bool, bool]] = {
    None: (True, True),
    "default": (True, True),
    "prompt": (True, False),
    "prompt_response": (False, True),
    "as_is": (False, False),
}


@dataclass(kw_only=True)
class MixMoETokenizerConfig:
    """There is nothing to choose: the files say it all."""


class MixMoETokenizer(Tokenizer):
    """A Hugging Face tokenizer.

    Args:
        text_tokenizer: opened and checked.
    """

    def __init__(self, text_tokenizer: TextTokenizer) -> None:
        self.text_tokenizer = text_tokenizer

    def create_encoder(
        self,
        *,
        task: str | None = None,
        lang: str | None = None,
        mode: str | None = None,
        device: Any = None,
        pin_memory: bool = False,
    ) -> TokenEncoder:
        """Return an encoder.

        Args:
            task: not read.
            lang: not read: a prompt names the languages.
            mode: `prompt`: BOS, if the tokenizer adds one, and the text. `prompt_response`: the text and EOS. `as_is`:
                the text alone. `default`, or None: BOS, the text and EOS.
            device: of the tensors.
            pin_memory: whether they are in pinned memory.

        Raises:
            MixMoEError: the mode is unknown.
        """
        if mode not in _MODES:
            raise MixMoEError(f"The mode of an encoder must be one of {', '.join(filter(None, _MODES))}, not {mode}.")
        return MixMoETokenEncoder(self.text_tokenizer, *_MODES[mode], device=device, pin_memory=pin_memory)

    def create_raw_encoder(self, *, device: Any = None, pin_memory: bool = False) -> TokenEncoder:
        """Return an encoder that adds no token."""
        return self.create_encoder(mode="as_is", device=device, pin_memory=pin_memory)

    def create_decoder(self, *, skip_special_tokens: bool = False) -> TokenDecoder:
        """Return a decoder."""
        return MixMoETokenDecoder(self.text_tokenizer, skip_special_tokens)

    @property
    def vocab_info(self) -> VocabularyInfo:
        """Size and ids; there is no padding where EOS would pad."""
        hf, ours = self.text_tokenizer.hf, self.text_tokenizer
        return VocabularyInfo(ours.vocab_size, hf.unk_token_id, ours.bos_id, ours.eos_id, ours.pad_id)


class MixMoETokenEncoder(TokenEncoder):
    """Text -> ids; what spells a special token is plain text.

    Args:
        tokenizer: the tokenizer.
        with_bos: put the BOS first that the tokenizer adds by itself, if any.
        with_eos: put EOS last.
        device: of the tensors.
        pin_memory: whether they are in pinned memory.
    """

    def __init__(
        self, tokenizer: TextTokenizer, with_bos: bool, with_eos: bool, *, device: Any, pin_memory: bool
    ) -> None:
        self._tokenizer, self._with_bos = tokenizer, with_bos
        self._prefix = [tokenizer.bos_id] if with_bos and tokenizer.bos_id is not None else []
        self._suffix = [tokenizer.eos_id] if with_eos else []
        self._device, self._pin_memory = device, pin_memory

    def __call__(self, text: str) -> Tensor:
        """Return the ids, [length] int64."""
        ids = self._tokenizer.encode([text], add_special_tokens=self._with_bos)[0]
        return self._tensor([*ids, *self._suffix])

    def encode_as_tokens(self, text: str) -> list[str]:
        """Return the tokens as text."""
        tokens: list[str] = self._tokenizer.hf.convert_ids_to_tokens(self(text).tolist())
        return tokens

    @property
    def prefix_indices(self) -> Tensor | None:
        """What stands before every text, [length] int64."""
        return self._tensor(self._prefix) if self._prefix else None

    @property
    def suffix_indices(self) -> Tensor | None:
        """What stands behind every text, [length] int64."""
        return self._tensor(self._suffix) if self._suffix else None

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._device, pin_memory=self._pin_memory)


class MixMoETokenDecoder(TokenDecoder):
    """Ids -> text, spaces as they are.

    Args:
        tokenizer: the tokenizer.
        skip_special_tokens: leave special tokens out.
    """

    def __init__(self, tokenizer: TextTokenizer, skip_special_tokens: bool) -> None:
        self._hf, self._skip_special_tokens = tokenizer.hf, skip_special_tokens

    def __call__(self, token_indices: Tensor) -> str:
        """Return the text of ids.

        Args:
            token_indices: [length] int64.
        """
        return self._decode(token_indices.tolist())

    def decode_from_tokens(self, tokens: Sequence[str]) -> str:
        """Return the text of tokens."""
        return self._decode(self._hf.convert_tokens_to_ids(list(tokens)))

    def _decode(self, ids: list[int]) -> str:
        text: str = self._hf.decode(
            ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text


def load_mixmoe_tokenizer(path: Path, config: MixMoETokenizerConfig) -> MixMoETokenizer:
    """Open the tokenizer of a local directory, see `data.tokenizers.open_tokenizer`.

    Raises:
        MixMoEError: there is none, or none that suits a translation model.
    """
    return MixMoETokenizer(open_tokenizer(path))
