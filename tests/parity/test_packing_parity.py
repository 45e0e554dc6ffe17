"""Packed documents are padded ones: the same losses, aux losses and gradients of every parameter, in both stages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch.nn import functional

from mixmoe_megatron.data.packing import collate_packs
from mixmoe_megatron.data.parallel import collate
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model.attention import TorchCoreAttention
from mixmoe_megatron.training.step import document_bounds, packed_documents
from tests.helpers.megatron import VOCAB_SIZE, gradients, initialize_megatron, make_config, make_model, make_options

LENGTHS = (5, 11, 1, 8)
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(autouse=True)
def megatron() -> None:
    initialize_megatron()


def documents(lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return random samples of these lengths; the loss counts on their second halves."""
    generator = np.random.default_rng(5)
    samples = []
    for length in lengths:
        tokens = generator.integers(0, VOCAB_SIZE, length + 1)
        loss_mask = (np.arange(length) >= length // 2).astype(np.float32)
        positions = np.arange(length)
        samples.append({"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": loss_mask, "position_ids": positions})
    return samples


def token_losses(model: GPTModel, batch: dict[str, torch.Tensor], packed: bool) -> torch.Tensor:
    """Return the losses that count, one after the other."""
    params = packed_documents(document_bounds(batch["position_ids"]), on_device=False) if packed else None
    losses = model(
        batch["tokens"], batch["position_ids"], None, labels=batch["labels"], padding_mask=batch["padding_mask"],
        packed_seq_params=params,
    )  # fmt: skip
    return losses[batch["loss_mask"].bool()]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("lengths", "multiple", "settings"),
    [(LENGTHS, 1, {}), (LENGTHS, 16, {}), ((9,), 1, {}), (LENGTHS, 16, RECOMPUTE),
     (LENGTHS, 1, {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]})],
    ids=["full", "padding behind", "one document", "recompute full", "recompute attention"],
)  # fmt: skip
def test_packed_equals_padded(stage: int, lengths: tuple[int, ...], multiple: int, settings: dict[str, Any]) -> None:
    options = make_options(topk_per_group=1, moe_every=2)
    model = make_model(make_config(options, stage, moe_aux_loss_coeff=0.5, **settings)).train()
    samples = documents(lengths)
    padded = collate(samples, pad_id=0)
    packed = collate_packs(samples, pad_id=0, pad_multiple=multiple)
    assert packed["tokens"].shape == (1, -(-sum(lengths) // multiple) * multiple)

    torch.testing.assert_close(token_losses(model, packed, True), token_losses(model, padded, False), rtol=0, atol=1e-5)
    expected = gradients(model, lambda: token_losses(model, padded, False).mean())
    actual = gradients(model, lambda: token_losses(model, packed, True).mean())
    assert actual.keys() == expected.keys() and any("router" in name for name in expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_a_document_does_not_see_the_others() -> None:
    """Without the bounds the same row gives other losses: the comparison above would notice."""
    model = make_model(make_config(make_options(moe_every=2), 2))
    batch = collate_packs(documents(LENGTHS), pad_id=0)
    difference = token_losses(model, batch, True) - token_losses(model, batch, False)
    first = LENGTHS[0] - LENGTHS[0] // 2
    assert difference[:first].abs().max() < 1e-5 and difference[first:].abs().max() > 0.1


def test_attention_over_documents_is_a_block_diagonal_mask() -> None:
    attention = TorchCoreAttention(make_config(make_options(moe_every=2), 2), 1, AttnMaskType.causal, "self")
    lengths = torch.tensor(LENGTHS)
    query, key, value = (torch.randn(25, heads, 6) for heads in (4, 2, 2))
    document, place = torch.repeat_interleave(torch.arange(4), lengths), torch.arange(25)
    allowed = (document[:, None] == document) & (place[:, None] >= place)
    expected = functional.scaled_dot_product_attention(
        *(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)), attn_mask=allowed, enable_gqa=True
    )
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    packed = packed_documents(document_bounds(position_ids), on_device=False)
    actual = attention(query, key, value, None, packed_seq_params=packed)
    torch.testing.assert_close(actual.squeeze(1), expected[0].transpose(0, 1).flatten(1), rtol=0, atol=1e-5)


def test_packed_attention_that_is_not_causal_is_refused() -> None:
    attention = TorchCoreAttention(make_config(make_options(moe_every=2), 2), 1, AttnMaskType.no_mask, "self")
    packed = PackedSeqParams(cu_seqlens_q=torch.tensor([0, 3]))
    with pytest.raises(MixMoEError, match="packed documents are for causal attention"):
        attention(*torch.randn(3, 3, 4, 6).unbind(), None, packed_seq_params=packed)


def test_where_documents_begin() -> None:
    packed = packed_documents(document_bounds(torch.tensor([[0, 1, 2, 0, 0, 1]])), on_device=False)
    assert packed.cu_seqlens_q.tolist() == [0, 3, 4, 6] and packed.cu_seqlens_q.dtype == torch.int32
    assert packed.max_seqlen_q == 3 and packed.qkv_format == "thd"
