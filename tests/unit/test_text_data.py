"""Monolingual samples: an order that a run can go on with, whatever the number of samples, and no special tokens."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset

from mixmoe_megatron.data.storage import TokenFileWriter
from mixmoe_megatron.data.text import TextDataset, TextDatasetConfig, TextTokens, parts_of_split
from mixmoe_megatron.errors import MixMoEError

LENGTH = 8
EOS = 2


def write_documents(prefix: Path, lengths: list[int]) -> str:
    """Write documents whose tokens are all different: 1000 * number + place."""
    with TokenFileWriter(prefix, 100_000) as writer:
        for number, length in enumerate(lengths):
            writer.add([[1000 * number + place for place in range(length)]])
        writer.commit({"kind": "monolingual", "tokenizer": {"vocab_size": 100_000}})
    return str(prefix)


def build(
    prefixes: list[str], num_samples: int, kind: type = TextDataset, seed: int = 5, **config: object
) -> GPTDataset:
    weights = None if len(prefixes) == 1 else [1.0] * len(prefixes)
    settings = TextDatasetConfig(
        random_seed=seed, sequence_length=LENGTH, blend=(prefixes, weights), split="1,0,0",
        tokenizer=TextTokens(EOS), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False, **config,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(kind, [num_samples, 0, 0], lambda: True, settings).build()[0]


def tokens(dataset: GPTDataset, samples: range) -> np.ndarray:
    return np.stack([dataset[index]["tokens"].numpy() for index in samples])


@pytest.mark.parametrize("lengths", [[5, 9, 1, 30, 7, 12], [3], [40, 41], [2, 1, 2]])
def test_the_stream_holds_each_token_once_an_epoch(tmp_path: Path, lengths: list[int]) -> None:
    dataset = build([write_documents(tmp_path / "a", lengths)], 50)
    epochs = 50 * LENGTH // sum(lengths)
    stream = [place for index in np.argsort(dataset.shuffle_index[:50]) for place in dataset[index]["tokens"].tolist()]
    expected = sorted(1000 * number + place for number, length in enumerate(lengths) for place in range(length))
    for epoch in range(epochs):
        part = stream[epoch * sum(lengths) : (epoch + 1) * sum(lengths)]
        assert sorted(part) == expected
        assert all(b == a + 1 for a, b in pairwise(part) if b % 1000), "documents are not torn apart"


@pytest.mark.parametrize("lengths", [[5, 9, 1, 30, 7, 12], [3], [100, 90]])
def test_a_longer_run_begins_like_a_shorter_one(tmp_path: Path, lengths: list[int]) -> None:
    """So more steps, or another batch size, take up where the run stopped."""
    prefix = write_documents(tmp_path / "a", lengths)
    longest = tokens(build([prefix], 300), range(300))
    for num_samples in (1, 2, 7, 8, 31, 100):
        assert np.array_equal(tokens(build([prefix], num_samples), range(num_samples)), longest[:num_samples])
    other = tokens(build([prefix], 300, seed=6), range(300))
    assert len(lengths) == 1 or not np.array_equal(other, longest)


def test_less_than_an_epoch_is_what_stock_gives(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "a", [5, 9, 1, 30, 7, 12, 33, 20])
    stock = build([prefix], 10, GPTDataset, path_to_cache=str(tmp_path / "cache"))
    assert np.array_equal(tokens(build([prefix], 10), range(10)), tokens(stock, range(10)))


def test_no_token_of_the_text_is_special(tmp_path: Path) -> None:
    """Neither EOS, nor what the tokenizer calls BOS, UNK or PAD: all are learned, and none is replaced."""
    prefix = write_documents(tmp_path / "a", [40, 40])
    dataset = build([prefix], 10)
    for sample in (dataset[index] for index in range(10)):
        assert sample["loss_mask"].tolist() == [1.0] * LENGTH
        assert (sample["labels"][:-1] == sample["tokens"][1:]).all()
    assert {0, 1, EOS} <= set(tokens(dataset, range(10)).flatten().tolist())


@pytest.mark.parametrize("sizes", [[3, 50], [1, 2, 3], [30] * 7, [5, 500, 8, 40]])
@pytest.mark.parametrize("num_samples", [1, 2, 9, 64, 333])
def test_blends_never_ask_for_more_than_there_is(tmp_path: Path, sizes: list[int], num_samples: int) -> None:
    prefixes = [write_documents(tmp_path / str(number), [size]) for number, size in enumerate(sizes)]
    dataset = build(prefixes, num_samples)
    assert len(dataset) >= num_samples and len(dataset[num_samples - 1]["tokens"]) == LENGTH


def test_a_split_that_nothing_is_asked_of(tmp_path: Path) -> None:
    assert len(build([write_documents(tmp_path / "a", [40, 40])], 0)) >= 0


def test_nothing_is_written_beside_the_data(tmp_path: Path) -> None:
    build([write_documents(tmp_path / "a", [40, 40])], 50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


@pytest.mark.parametrize(
    ("split", "documents", "parts"),
    [("969, 30, 1", 20, [19, 1, 0]), ("98,1,1", 10, [10, 0, 0]), ("0,1,0", 10, [0, 10, 0]), ("1,1,1", 9, [3, 3, 3])],
)
def test_parts_of_a_split(split: str, documents: int, parts: list[int]) -> None:
    assert parts_of_split(split, documents) == parts


@pytest.mark.parametrize("split", ["", "all", "0,0,0"])
def test_a_split_that_is_none(split: str) -> None:
    with pytest.raises(MixMoEError, match="is not three shares of training, validation and test"):
        parts_of_split(split, 10)


def test_samples_tell_whether_they_are_of_original_languages(tmp_path: Path) -> None:
    old, new = (write_documents(tmp_path / name, [40, 50]) for name in ("old", "new"))
    dataset = build([old, new], 12, original_prefixes=(old,))
    tells = [bool(dataset[index]["is_original"]) for index in range(12)]
    assert tells == [dataset[index]["dataset_id"] == 0 for index in range(12)] and len(set(tells)) == 2
    assert bool(build([old], 2, original_prefixes=(old,))[0]["is_original"]), "one file is no blend"
    assert "is_original" not in build([old, new], 12)[0]
