"""The tokenizer kinds that data code must serve: Llama 2's sentencepiece, byte-level BPE with and without a BOS."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.tiny_hf import tiny_tokenizer

KINDS = ("sentencepiece", "bpe", "bpe_without_bos")


def make_tokenizer(kind: str, directory: Path) -> Path:
    """Write a tokenizer of one of KINDS (pad 0, BOS 1, EOS 2) below `directory` and return its folder."""
    target = directory / kind
    tokenizer = tiny_tokenizer(target, "sentencepiece" if kind == "sentencepiece" else "bpe")
    if kind == "bpe_without_bos":
        from tokenizers import processors

        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        tokenizer.save_pretrained(target)
    return target
