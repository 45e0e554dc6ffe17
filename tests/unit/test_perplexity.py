"""Perplexity predicts every token once, whatever the batches and windows, and bits per byte are the same sum."""

from __future__ import annotations

import math

import pytest
import torch

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.batches import batches_by_length, split_windows
from mixmoe_megatron.evaluation.models import LoadedModel, load_model
from mixmoe_megatron.evaluation.perplexity import measure_perplexity
from tests.helpers.tiny_hf import SENTENCES, save_tiny_dense

TEXTS = list(SENTENCES)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> LoadedModel:
    path = tmp_path_factory.mktemp("model")
    save_tiny_dense(path)
    return load_model("base", path)


def reference_loss(loaded: LoadedModel, text: str) -> tuple[float, int]:
    """Summed loss by transformers' own labels, one text, no padding."""
    ids = loaded.tokenizer.encode([text], add_special_tokens=True)[0]
    inputs = torch.tensor([ids])
    with torch.inference_mode():
        loss = loaded.model(input_ids=inputs, labels=inputs).loss.item()
    return loss * (len(ids) - 1), len(ids) - 1


def test_equals_transformers_loss(loaded) -> None:
    sums = [reference_loss(loaded, text) for text in TEXTS]
    total, tokens = sum(loss for loss, _ in sums), sum(count for _, count in sums)
    result = measure_perplexity(loaded, TEXTS, tokens_per_batch=200)
    assert (result.tokens, result.texts) == (tokens, len(TEXTS))
    assert result.loss == pytest.approx(total / tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)
    num_bytes = len("".join(TEXTS).encode())
    assert result.bytes == sum(result.text_bytes) == num_bytes
    assert result.text_bits == pytest.approx([loss / math.log(2) for loss, _ in sums], rel=1e-4)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)


def test_batches_do_not_matter_and_windows_keep_the_count(loaded) -> None:
    whole = measure_perplexity(loaded, TEXTS)
    assert measure_perplexity(loaded, TEXTS, tokens_per_batch=1).loss == pytest.approx(whole.loss, rel=1e-5)
    cut = measure_perplexity(loaded, TEXTS, max_window=8)
    assert (cut.tokens, cut.bytes) == (whole.tokens, whole.bytes)
    assert cut.loss != pytest.approx(whole.loss, rel=1e-5)


def test_windows_predict_each_token_once() -> None:
    ids = list(range(1, 24))
    for window in (2, 5, 11, 100):
        pieces = split_windows(ids, 0, window)
        assert [token for piece in pieces for token in piece[1:]] == ids
        assert all(2 <= len(piece) <= window for piece in pieces)
        assert [piece[0] for piece in pieces[1:]] == [piece[-1] for piece in pieces[:-1]]
    assert split_windows([], 0, 5) == []


def test_batches_hold_everything_once() -> None:
    sequences = [[index] * (index % 7 + 1) for index in range(30)]
    batches = list(batches_by_length(sequences, 20))
    assert sorted(index for batch in batches for index in batch) == list(range(30))
    assert all(len(batch) * max(len(sequences[index]) for index in batch) <= 20 for batch in batches)


def test_without_bos_the_context_is_eos(tmp_path) -> None:
    import json

    save_tiny_dense(tmp_path, tokenizer="bpe")
    path = tmp_path / "tokenizer.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["post_processor"] = None
    path.write_text(json.dumps(settings), encoding="utf-8")
    loaded = load_model("base", tmp_path)
    assert (loaded.tokenizer.bos_id, loaded.start_id) == (None, 2)
    assert measure_perplexity(loaded, TEXTS[:2]).tokens == sum(
        map(len, loaded.tokenizer.encode(TEXTS[:2], add_special_tokens=False))
    )


def test_nothing_to_measure(loaded) -> None:
    with pytest.raises(MixMoEError, match="no text"):
        measure_perplexity(loaded, [])
