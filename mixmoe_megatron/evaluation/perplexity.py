"""Perplexity of monolingual text, per token and, to compare models with different tokenizers, in bits per byte.

Every token of a text is predicted once, the end-of-sequence token is not counted, and a text's first token is predicted
from BOS, or from EOS where the tokenizer adds no BOS (what precedes a document in packed training).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.models import LoadedModel
from mixmoe_megatron.evaluation.progress import Progress

MAX_WINDOW = 1024  # tokens; longer texts are cut into windows
TOKENS_PER_BATCH = 4096
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


def split_windows(ids: Sequence[int], start_id: int, window: int) -> list[list[int]]:
    """Cut a text into sequences that predict each of its tokens exactly once.

    A sequence's first token is context only: `start_id`, or the last token of the sequence before.

    Args:
        ids: The text's tokens.
        start_id: Context of the first one.
        window: Most tokens of a sequence, context included; at least 2.
    """
    whole = [start_id, *ids]
    return [whole[start : start + window] for start in range(0, len(ids), window - 1)]


def batches_by_length(sequences: Sequence[list[int]], tokens_per_batch: int) -> Iterator[list[int]]:
    """Yield batches of similar length, longest first, that hold about `tokens_per_batch` padded tokens.

    Args:
        sequences: Token ids.
        tokens_per_batch: A batch of one sequence may hold more.

    Yields:
        Indices of sequences.
    """
    batch: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda index: len(sequences[index]), reverse=True):
        if batch and (len(batch) + 1) * len(sequences[batch[0]]) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad_right(batch: Sequence[list[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad sequences on the right.

    Args:
        batch: B lists of token ids.
        pad_id: Fills up.
        device: Where the tensors go.

    Returns:
        input_ids: [B, T] int64. attention_mask: [B, T] int64, 1 on tokens and 0 on padding.
    """
    width = max(map(len, batch))
    input_ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids in batch], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in batch], device=device)
    return input_ids, mask


@torch.inference_mode()
def _negative_log_likelihoods(loaded: LoadedModel, batch: list[list[int]]) -> list[float]:
    """Of each sequence, in nats; maths in float32 whatever the model's dtype."""
    input_ids, mask = pad_right(batch, loaded.tokenizer.pad_id, loaded.device)
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
    window = max_window if loaded.max_positions is None else min(max_window, loaded.max_positions)
    encoded = loaded.tokenizer.encode(list(texts), add_special_tokens=False)
    pieces = [
        (index, piece) for index, ids in enumerate(encoded) for piece in split_windows(ids, loaded.start_id, window)
    ]
    tokens = sum(map(len, encoded))
    if tokens == 0:
        raise MixMoEError("There is no text to measure perplexity on.")
    text_losses = [0.0] * len(texts)
    sequences = [piece for _, piece in pieces]
    with Progress(f"{loaded.name} perplexity", len(sequences), work=tokens, unit="texts") as progress:
        for batch in batches_by_length(sequences, tokens_per_batch):
            losses = _negative_log_likelihoods(loaded, [sequences[place] for place in batch])
            for place, loss in zip(batch, losses, strict=True):
                text_losses[pieces[place][0]] += loss
            read = sum(len(sequences[place]) - 1 for place in batch)
            progress.advance(len(batch), read, read)
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
