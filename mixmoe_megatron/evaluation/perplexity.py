"""Perplexity of monolingual text, per token and, to compare models with different tokenizers, in bits per byte.

Every token of a text is predicted once (`batches.py` says from what), the end-of-sequence token is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mixmoe_megatron.evaluation.batches import MAX_WINDOW, TOKENS_PER_BATCH, text_batches
from mixmoe_megatron.evaluation.models import LoadedModel

_IGNORED = -100


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts some texts.

    Attributes:
        texts: Number of texts.
        tokens: Tokens predicted, of the model's own tokenizer.
        bytes: UTF-8 bytes of the texts.
        loss: Mean negative log likelihood, nats per token.
        perplexity: exp(loss).
        bits_per_byte: Total negative log likelihood in bits over `bytes`; comparable across tokenizers.
        text_bits: Negative log likelihood of each text, bits; for confidence intervals.
        text_bytes: UTF-8 bytes of each text.
    """

    texts: int
    tokens: int
    bytes: int
    loss: float
    perplexity: float
    bits_per_byte: float
    text_bits: list[float]
    text_bytes: list[int]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return asdict(self)


@torch.inference_mode()
def _negative_log_likelihoods(loaded: LoadedModel, input_ids: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """Of each sequence, in nats; maths in float32 whatever the model's dtype."""
    logits = loaded.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    labels = input_ids[:, 1:].masked_fill(mask[:, 1:] == 0, _IGNORED)
    losses = (
        torch.nn.functional.cross_entropy(row_logits.float(), row_labels, ignore_index=_IGNORED, reduction="sum")
        for row_logits, row_labels in zip(logits[:, :-1], labels, strict=True)
    )
    return [loss.item() for loss in losses]


def measure_perplexity(
    loaded: LoadedModel, texts: Sequence[str], *, max_window: int = MAX_WINDOW, tokens_per_batch: int = TOKENS_PER_BATCH
) -> Perplexity:
    """Measure a model's perplexity on texts of one language.

    Args:
        loaded: The model.
        texts: One text an entry, each predicted by itself.
        max_window: Longest sequence in tokens; the model's own limit applies as well.
        tokens_per_batch: Padded tokens of one forward pass.

    Raises:
        MixMoEError: There is no text, or nothing in it but unknown space.
    """
    text_losses, tokens = [0.0] * len(texts), 0
    batches = text_batches(loaded, texts, "perplexity", max_window=max_window, tokens_per_batch=tokens_per_batch)
    for numbers, input_ids, mask in batches:
        for number, loss in zip(numbers, _negative_log_likelihoods(loaded, input_ids, mask), strict=True):
            text_losses[number] += loss
        tokens += int(mask[:, 1:].sum())
    text_bytes = [len(text.encode("utf-8")) for text in texts]
    loss = sum(text_losses) / tokens
    return Perplexity(
        texts=len(texts),
        tokens=tokens,
        bytes=sum(text_bytes),
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=sum(text_losses) / math.log(2) / sum(text_bytes),
        text_bits=[round(value / math.log(2), 4) for value in text_losses],
        text_bytes=text_bytes,
    )
