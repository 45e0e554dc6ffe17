"""Packing: every document once an epoch, whole; capacity, order, the row of a micro-batch, shares of padding."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mixmoe_megatron.data.packing import PackedDataset, collate_packs, pack_lengths, padding_shares
from mixmoe_megatron.data.parallel import ParallelDataset
from mixmoe_megatron.data.parallel_build import ParallelOptions, build_parallel
from mixmoe_megatron.data.tokenizers import open_tokenizer
from tests.helpers.tiny_tokenizers import make_tokenizer

CAPACITY = 300


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of 100 pairs of very different lengths."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [f"{number} {'tree ' * (number * 37 % 50)}\t{number} Baum" for number in range(100)]
    (folder / "pairs.tsv").write_text("en\tde\n" + "\n".join(rows) + "\n")
    tokenizer = open_tokenizer(make_tokenizer("bpe", folder))
    build_parallel([folder / "pairs.tsv"], tokenizer, folder / "pairs", ParallelOptions("de", "en"))
    return folder / "pairs"


def packed(prefix: Path, num_samples: int = 10**6, seed: int = 3) -> PackedDataset:
    documents = ParallelDataset(prefix, seed=seed, max_length=CAPACITY)
    return PackedDataset(documents, num_samples, CAPACITY)


@pytest.mark.parametrize("seed", range(5))
def test_packed_lengths_are_the_lengths_and_fit(seed: int) -> None:
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(20, 300))
    lengths = np.minimum(generator.geometric(0.03, 5000), capacity)
    places, bounds = pack_lengths(lengths, capacity)
    assert np.array_equal(np.sort(places), np.sort(lengths))
    assert bounds[0] == 0 and bounds[-1] == len(lengths) and (np.diff(bounds) > 0).all()
    sizes = np.add.reduceat(places, bounds[:-1])
    assert sizes.max() <= capacity
    # at most one pack is half empty, and all together are near the least number that could hold the tokens
    assert (sizes <= capacity // 2).sum() <= 1
    assert len(sizes) <= 1.03 * lengths.sum() / capacity + 2


@pytest.mark.parametrize(
    ("lengths", "packs"),
    [([7], [[7]]), ([10, 10], [[10], [10]]), ([6, 4, 3, 3, 2, 1], [[6, 4], [3, 3, 2, 1]]),
     ([1] * 12, [[1] * 10, [1] * 2])],
)  # fmt: skip
def test_small_packs(lengths: list[int], packs: list[list[int]]) -> None:
    places, bounds = pack_lengths(np.array(lengths), 10)
    assert [part.tolist() for part in np.split(places, bounds[1:-1])] == packs


def test_two_million_documents_fill_their_packs() -> None:
    lengths = np.minimum(20 + np.random.default_rng(0).geometric(0.02, 2_000_000), 2048)
    places, bounds = pack_lengths(lengths, 2048)
    assert len(places) == len(lengths)
    assert lengths.sum() / ((len(bounds) - 1) * 2048) > 0.995


def test_an_epoch_holds_each_document_once_and_whole(prefix: Path) -> None:
    data = packed(prefix)
    for epoch in range(3):
        packs = [data.pack(epoch * data.num_packs + number) for number in range(data.num_packs)]
        assert sorted(np.concatenate(packs)) == list(range(100))
    pack, numbers = data[5], data.pack(5)
    assert len(pack["tokens"]) <= CAPACITY and len(numbers) > 1
    starts = np.flatnonzero(pack["position_ids"] == 0)
    for number, start in zip(numbers, starts, strict=True):
        document = data.documents.document(int(number))
        part = slice(start, start + len(document["tokens"]))
        for key in ("tokens", "labels", "loss_mask"):
            assert np.array_equal(pack[key][part], document[key])
        assert pack["position_ids"][part].tolist() == list(range(len(document["tokens"])))


def test_the_order_depends_on_the_seed_alone(prefix: Path) -> None:
    data, longer, other = packed(prefix, 50), packed(prefix, 60), packed(prefix, 50, seed=4)
    orders = [[tuple(each.pack(index)) for index in range(50)] for each in (data, longer, other)]
    assert orders[0] == orders[1] != orders[2]
    late = [tuple(packed(prefix, 60).pack(index)) for index in (49, 3, 49)]  # as a resumed run, or a worker, asks
    assert late == [orders[0][49], orders[0][3], orders[0][49]]
    assert tuple(pickle.loads(pickle.dumps(data)).pack(7)) == orders[0][7]
    epochs = [set(orders[0][start : start + data.num_packs]) for start in (0, data.num_packs)]
    assert epochs[0] != epochs[1], "an epoch deals its documents anew"
    with pytest.raises(IndexError):
        data[50]


def test_a_micro_batch_is_one_row(prefix: Path) -> None:
    data = packed(prefix)
    packs = [data[0], data[1]]
    tokens = sum(len(pack["tokens"]) for pack in packs)
    batch = collate_packs(packs, pad_id=9, pad_multiple=64)
    width = -(-tokens // 64) * 64
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "tokens": ((1, width), torch.int64),
        "labels": ((1, width), torch.int64),
        "position_ids": ((1, width), torch.int64),
        "loss_mask": ((1, width), torch.float32),
        "padding_mask": ((1, width), torch.bool),
    }
    assert batch["tokens"][0, :tokens].tolist() == [*packs[0]["tokens"], *packs[1]["tokens"]]
    assert (batch["tokens"][0, tokens:] == 9).all() and batch["padding_mask"][0].nonzero().min() == tokens
    assert batch["loss_mask"][0, tokens:].sum() == 0
    assert batch["position_ids"][0, tokens:].tolist() == list(range(width - tokens))
    assert collate_packs(packs, pad_id=9)["tokens"].shape == (1, tokens)
    full = collate_packs(packs, pad_id=9, max_length=2 * CAPACITY, pad_to_max=True)
    assert full["tokens"].shape == (1, 2 * CAPACITY)
    assert collate_packs(packs, pad_id=9, pad_multiple=512, max_length=tokens + 1)["tokens"].shape == (1, tokens + 1)


def test_shares_of_padding() -> None:
    lengths = np.array([2, 8, 4, 6, 10])
    # padded to 10: 20 of 50; pairs (2, 4), (8, 10), (6): 4 of 34; packs (10), (8, 2), (6, 4): none
    shares = padding_shares(lengths, np.array([0, 2, 1, 4, 3]), 2, 10)
    assert shares == pytest.approx((20 / 50, 4 / 34, 0.0))
    # to multiples of 4, at most 10: (2, 4), (8, 10), (6) take 4 + 4, 10 + 10, 8
    assert padding_shares(lengths, np.array([0, 2, 1, 4, 3]), 2, 10, 4)[1] == pytest.approx(6 / 36)
