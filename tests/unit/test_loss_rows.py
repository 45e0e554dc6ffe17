"""Losses and gradients of the rows that carry loss are those of all rows, and no other logits are computed."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_model import GPTModel

from mixmoe_megatron.data.packing import collate_packs
from mixmoe_megatron.data.parallel import collate
from mixmoe_megatron.model.loss_rows import losses_of_rows, rows_with_loss
from mixmoe_megatron.training import step
from mixmoe_megatron.training.step import document_bounds, packed_documents
from tests.helpers.megatron import gradients, initialize_megatron, make_config, make_model, make_options
from tests.parity.test_packing_parity import documents

LENGTHS = (9, 2, 5, 7)
BATCHES = {
    "padded": partial(collate, documents(LENGTHS), pad_id=0),
    "no padding": partial(collate, documents((8, 8)), pad_id=0),
    "packed": partial(collate_packs, documents(LENGTHS), pad_id=0),
    "packed, padding behind": partial(collate_packs, documents(LENGTHS), pad_id=0, pad_multiple=32),
}


@pytest.fixture(autouse=True)
def megatron() -> None:
    initialize_megatron()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the logits of each forward pass."""
    counts: list[int] = []
    loss = LanguageModule.compute_language_model_loss

    def counted(self: Any, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        counts.append(logits.flatten(0, 1).shape[0])
        return loss(self, labels, logits)

    monkeypatch.setattr(LanguageModule, "compute_language_model_loss", counted)
    return counts


def losses(model: GPTModel, batch: dict[str, torch.Tensor], packed: bool, rows: torch.Tensor | None) -> torch.Tensor:
    """The losses [B, S] as `forward_step` asks the model for them."""
    return model(
        batch["tokens"], batch["position_ids"], None, labels=batch["labels"], padding_mask=batch["padding_mask"],
        packed_seq_params=packed_documents(document_bounds(batch["position_ids"]), on_device=False) if packed else None,
        output_processor=None if rows is None else losses_of_rows, output_processor_context=rows,
    )  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("multiple", [1, 8])
def test_losses_and_all_gradients_are_those_of_all_rows(
    computed: list[int], stage: int, name: str, multiple: int
) -> None:
    model = make_model(make_config(make_options(moe_every=2), stage, moe_aux_loss_coeff=0.5)).train()
    batch, packed = BATCHES[name](), name.startswith("packed")
    mask = batch["loss_mask"]
    rows = rows_with_loss(mask, multiple)
    assert rows is not None
    actual = losses(model, batch, packed, rows)
    expected = losses(model, batch, packed, None)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype and actual.is_contiguous()
    torch.testing.assert_close(actual * mask, expected * mask, rtol=1e-6, atol=1e-6)
    assert (actual != 0).sum() == len(rows)
    expected_gradients = gradients(model, lambda: (losses(model, batch, packed, None) * mask).sum())
    actual_gradients = gradients(model, lambda: (losses(model, batch, packed, rows) * mask).sum())
    assert actual_gradients.keys() == expected_gradients.keys()
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[parameter], gradient, rtol=1e-5, atol=1e-5, msg=parameter)
    assert computed == [len(rows), mask.numel(), mask.numel(), len(rows)]


def test_an_output_layer_of_its_own_gets_the_same_gradient() -> None:
    config = make_config(make_options(moe_every=2), 2)
    model = make_model(config, share_embeddings_and_output_weights=False).train()
    batch = BATCHES["padded"]()
    rows = rows_with_loss(batch["loss_mask"])
    each = [gradients(model, lambda r=r: (losses(model, batch, False, r) * batch["loss_mask"]).sum())
            for r in (None, rows)]  # fmt: skip
    assert each[0]["output_layer.weight"].abs().max() > 0
    for parameter, gradient in each[0].items():
        torch.testing.assert_close(each[1][parameter], gradient, rtol=1e-5, atol=1e-5, msg=parameter)


@pytest.mark.parametrize(
    ("places", "multiple", "expected"),
    [([5, 1], 1, [1, 5]), ([5, 1], 3, [1, 5, 0]), ([1, 3, 5], 3, [1, 3, 5]), ([], 1, [0]), ([], 4, [0, 1, 2, 3]),
     ([0, 1, 2, 3, 4], 3, None), ([3], 6, None), ([3], 64, None), (range(6), 1, None)],
)  # fmt: skip
def test_which_rows(places: Any, multiple: int, expected: list[int] | None) -> None:
    """Places count in the order [S, B] of hidden states; the mask is [B, S]."""
    mask = torch.zeros(6)
    mask[list(places)] = 1.0
    rows = rows_with_loss(mask.view(3, 2).t(), multiple)
    assert (None if rows is None else rows.tolist()) == expected
    assert rows is None or rows.dtype == torch.int64


def test_a_few_rows_without_loss_are_not_worth_choosing_the_others() -> None:
    mask = torch.ones(4, 25)
    mask[0, :9] = 0.0
    assert rows_with_loss(mask) is None
    mask[0, :11] = 0.0
    assert len(rows_with_loss(mask)) == 89


def test_which_ranks_choose_rows_and_of_what(monkeypatch: pytest.MonkeyPatch) -> None:
    last, other = SimpleNamespace(post_process=True), SimpleNamespace(post_process=False)
    mask = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    assert step.rows_of_logits(mask, other) is None  # an earlier pipeline stage has no logits
    assert step.rows_of_logits(torch.ones(2, 4), last) is None  # monolingual text
    assert sorted(step.rows_of_logits(mask, last).tolist()) == [3, 4, 6]
    monkeypatch.setattr(step.mpu, "get_tensor_model_parallel_world_size", lambda: 2)
    assert sorted(step.rows_of_logits(mask, last).tolist()) == [0, 3, 4, 6]
