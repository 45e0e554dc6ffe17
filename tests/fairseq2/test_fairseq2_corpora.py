"""What the dataset families read: the documents of `mixmoe preprocess`, each once an epoch, packed or padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mixmoe_megatron.data.tokenizers import TextTokenizer, open_tokenizer
from mixmoe_megatron.errors import MixMoEError
from tests.helpers.fairseq2_models import REASON
from tests.helpers.tiny_hf import tiny_tokenizer
from tests.helpers.training import make_tiny_data

pytest.importorskip("fairseq2", reason=REASON)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, pairs.tsv and their token files."""
    directory = tmp_path_factory.mktemp("corpora")
    tiny_tokenizer(directory / "tokenizer")
    make_tiny_data(directory, directory / "tokenizer")
    return directory


@pytest.fixture(scope="module")
def tokenizer(world: Path) -> TextTokenizer:
    return open_tokenizer(world / "tokenizer")


def stored(prefix: Path) -> list[list[int]]:
    """Return the sequences of a token file."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    file = IndexedDataset(str(prefix), multimodal=prefix.name == "pairs")
    return [(file[i][0] if prefix.name == "pairs" else file[i]).tolist() for i in range(len(file))]


def gangs_of(rank: int, size: int) -> Any:
    """Return gangs of which only rank and size of data parallelism are read."""
    from types import SimpleNamespace

    return SimpleNamespace(dp=SimpleNamespace(rank=rank, size=size))


def reader_of(world: Path, tokenizer: TextTokenizer, kind: str, rank: int = 0, size: int = 1, **options: Any) -> Any:
    from mixmoe_megatron.integrations.fairseq2 import corpora

    read = corpora.ReadOptions(**{"max_seq_len": 200, "max_num_tokens": 400, **options})
    corpus: Any
    if kind == "mono":
        corpus = corpora.MonolingualCorpus(corpora.MonolingualCorpusConfig(paths=[world / "text.txt"], min_tokens=1))
    else:
        pairs = corpora.PairsConfig(
            paths=[world / "pairs.tsv"], source_language="de", target_language="en", both_directions=True
        )
        corpus = corpora.ParallelCorpus(corpora.ParallelCorpusConfig(pairs=[pairs]))
    return corpus.create_reader(tokenizer, gangs_of(rank, size), read)


def documents(batch: Any) -> list[list[int]]:
    """Return the documents of a batch, or the parts of them."""
    if batch.packed:
        return [part.tolist() for part in batch.seqs[: sum(batch.seq_lens)].split(list(batch.seq_lens))]
    return [row[:length].tolist() for row, length in zip(batch.seqs, batch.seq_lens, strict=True)]


def epoch(reader: Any) -> list[Any]:
    """Return the batches of an epoch, and go to the next one."""
    batches = [batch for step in reader for batch in step]
    reader.reset()
    return batches


def test_pairs_are_those_of_the_token_file(world: Path, tokenizer: TextTokenizer) -> None:
    sequences = stored(world / "pairs")
    expected = {
        tuple([*prompt, *target]): len(prompt) for prompt, target in zip(sequences[::2], sequences[1::2], strict=True)
    }
    batches = epoch(reader_of(world, tokenizer, "pairs"))
    found = {}
    for batch in batches:
        assert batch.seqs.numel() <= 400
        for row, mask, ids in zip(batch.seqs, batch.target_mask, documents(batch), strict=True):
            found[tuple(ids)] = int(mask.int().argmax())
            assert mask[found[tuple(ids)] : len(ids)].all() and not mask[len(ids) :].any()
            assert (row[len(ids) :] == tokenizer.pad_id).all()
    assert found == expected


def test_packed_text_is_that_of_the_token_file(world: Path, tokenizer: TextTokenizer) -> None:
    """Each token is a target once, but for the documents' first ones; cut documents go on with the token before."""
    expected = sorted(stored(world / "mono"))
    batches = epoch(reader_of(world, tokenizer, "mono", max_num_tokens=100, shuffle_window=1))
    found: list[list[int]] = []
    for batch in batches:
        assert len(batch.seqs) == 100
        for part in documents(batch):
            if found and found[-1][-1] != tokenizer.eos_id:
                assert part[0] == found[-1][-1]
                found[-1] += part[1:]
            else:
                found.append(part)
    assert sorted(found) == expected
    targets = sum(batch.num_target_elements for batch in batches)
    assert targets == sum(len(document) - 1 for document in expected)
    first = batches[0]
    starts = torch.tensor([0, *first.seq_lens[:-1]]).cumsum(0)
    assert not first.target_mask[starts].any() and int(first.target_mask.sum()) == 100 - len(starts)


@pytest.mark.parametrize("kind", ["mono", "pairs"])
def test_ranks_share_the_documents(world: Path, tokenizer: TextTokenizer, kind: str) -> None:
    whole = sorted(ids for batch in epoch(reader_of(world, tokenizer, kind)) for ids in documents(batch))
    pieces = []
    for rank in range(2):
        reader = reader_of(world, tokenizer, kind, rank, 2)
        pieces += [ids for batch in iter_pipeline(reader) for ids in documents(batch)]
    tokens = sum(map(len, pieces)) if kind == "pairs" else None
    assert len(pieces) >= len(whole) - 4
    assert tokens is None or sorted(pieces) == whole


def iter_pipeline(reader: Any) -> Any:
    """Yield a rank's batches without asking the others how many they have."""
    yield from reader._pipeline


@pytest.mark.parametrize("kind", ["mono", "pairs"])
def test_epochs_differ_and_a_reader_goes_on(world: Path, tokenizer: TextTokenizer, kind: str) -> None:
    reader, again = (reader_of(world, tokenizer, kind) for _ in range(2))
    first, second = epoch(reader), epoch(reader)
    order = [[ids for batch in batches for ids in documents(batch)] for batches in (first, second)]
    assert order[0] != order[1]
    if kind == "pairs":
        assert sorted(order[0]) == sorted(order[1])
    assert [documents(batch) for batch in epoch(again)] == [documents(batch) for batch in first]
    next(again)
    state, fresh = again.state_dict(), reader_of(world, tokenizer, kind)
    fresh.load_state_dict(state)
    assert [documents(batch) for step in fresh for batch in step] == [documents(batch) for batch in second[1:]]


def test_what_is_refused(world: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(MixMoEError, match=r"max_num_tokens is 100, which has no room for a sequence"):
        reader_of(world, tokenizer, "pairs", max_num_tokens=100)
    with pytest.raises(MixMoEError, match=r"holds no pairs and directions to learn from \(18 dropped too many tokens"):
        reader_of(world, tokenizer, "pairs", max_seq_len=8)
