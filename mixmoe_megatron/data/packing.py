"""Pack whole parallel documents into sequences: no document is cut, and next to nothing is padded.

Shape legend: N documents, P packs of one epoch, T tokens of one pack.

Which lengths share a pack is worked out once, from the histogram of lengths: the longest document that is left, then
again and again the longest one that still fits. An epoch deals its documents at random to the places of their length
and shuffles the packs. So every epoch has the same number of packs and holds each document once, and the order depends
on the seed, the documents and the capacity alone: a resumed run continues exactly.

A pack's position ids restart at 0 with each document: they alone tell where documents begin (see training/step.py).

Source: histogram packing, Krell et al. (arXiv:2107.02027); here the longest that fits, without a search.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mixmoe_megatron.data.parallel import KEPT_EPOCHS, ParallelDataset, collate


class PackedDataset(torch.utils.data.Dataset):
    """Packs of the documents of a ParallelDataset, whose seed counts here too; its order and length do not.

    Args:
        documents: The documents, none longer than capacity (its max_length sees to that).
        num_samples: Length of the dataset, in packs: train_iters * global_batch_size.
        capacity: The most tokens of a pack: the model's sequence length.
    """

    def __init__(self, documents: ParallelDataset, num_samples: int, capacity: int) -> None:
        self.documents, self.num_samples = documents, num_samples
        places, self._bounds = pack_lengths(documents.lengths, capacity)
        self._by_length = np.argsort(places, kind="stable")
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def num_packs(self) -> int:
        """How many packs hold each document once: the samples of one epoch."""
        return len(self._bounds) - 1

    def __len__(self) -> int:
        """Return num_samples."""
        return self.num_samples

    def pack(self, index: int) -> np.ndarray:
        """Return the numbers of the documents in pack `index`.

        Raises:
            IndexError: index is not in 0 .. num_samples - 1.
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        epoch, offset = divmod(int(index), self.num_packs)
        if epoch not in self._epochs:
            if len(self._epochs) >= KEPT_EPOCHS:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._deal(epoch)
        dealt, order = self._epochs[epoch]
        number = order[offset]
        return dealt[self._bounds[number] : self._bounds[number + 1]]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one pack, its documents end to end.

        Args:
            index: 0 .. num_samples - 1.

        Returns:
            tokens, labels, position_ids: [T] int64; positions restart with each document. loss_mask: [T] float32.

        Raises:
            IndexError: index is out of range.
        """
        samples = [self.documents.document(int(number)) for number in self.pack(index)]
        pack = {key: np.concatenate([sample[key] for sample in samples]) for key in ("tokens", "labels", "loss_mask")}
        return {**pack, "position_ids": np.concatenate([np.arange(len(sample["tokens"])) for sample in samples])}

    def _deal(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch's documents, pack after pack, [N] int64, and the order of the packs, [P] int64."""
        generator = np.random.default_rng([self.documents.seed, epoch])
        shuffled = generator.permutation(len(self._by_length))
        dealt = np.empty_like(shuffled)
        dealt[self._by_length] = shuffled[np.argsort(self.documents.lengths[shuffled], kind="stable")]
        return dealt, generator.permutation(self.num_packs)


def pack_lengths(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Work out which lengths share a pack.

    Args:
        lengths: [N] integers, tokens of each document: 1 .. capacity.
        capacity: The most tokens of a pack.

    Returns:
        The lengths again, pack after pack, [N] int64; where each pack begins in them, and N, [P + 1] int64.
    """
    counts = np.bincount(lengths, minlength=capacity + 1)
    packs: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    while counts.any():
        left, space = counts.copy(), capacity
        shape = []
        while (fitting := np.flatnonzero(left[: space + 1])).size:
            length = int(fitting[-1])
            times = min(int(left[length]), space // length)
            shape += [length] * times
            left[length] -= times
            space -= times * length
        used = Counter(shape)
        repeats = min(int(counts[length]) // times for length, times in used.items())
        for length, times in used.items():
            counts[length] -= times * repeats
        packs.append(np.tile(shape, repeats))
        sizes.append(np.full(repeats, len(shape)))
    return np.concatenate(packs), np.concatenate([[0], *sizes]).cumsum()


def padding_shares(
    lengths: np.ndarray, order: np.ndarray, micro_batch_size: int, seq_length: int, pad_multiple: int = 1
) -> tuple[float, float, float]:
    """Return which share of the places in an epoch's micro-batches no token takes, 0 .. 1, in three ways.

    Args:
        lengths: [N] integers, tokens of each document.
        order: [N] integers, the documents as they come.
        micro_batch_size: Documents of one micro-batch.
        seq_length: The model's sequence length.
        pad_multiple: As `parallel.collate`'s.

    Returns:
        Every document padded to seq_length; each micro-batch padded as `parallel.collate` does; packs padded to
        seq_length (the most that they ever are).
    """
    tokens = int(lengths.sum())
    _, bounds = pack_lengths(lengths, seq_length)
    missing = -len(order) % micro_batch_size
    rows = np.append(lengths[order], [0] * missing).reshape(-1, micro_batch_size)
    widths = np.minimum(-(-rows.max(axis=1) // pad_multiple) * pad_multiple, seq_length)
    padded = int(widths.sum()) * micro_batch_size - int(widths[-1]) * missing
    places = (len(lengths) * seq_length, padded, (len(bounds) - 1) * seq_length)
    full, grouped, packed = (1 - tokens / number for number in places)
    return full, grouped, packed


def collate_packs(
    packs: Sequence[dict[str, Any]],
    *,
    pad_id: int,
    pad_multiple: int = 1,
    max_length: int | None = None,
    pad_to_max: bool = False,
) -> dict[str, torch.Tensor]:
    """Lay packs end to end as one row; bind the options with functools.partial for a DataLoader.

    Args:
        packs: Samples of `PackedDataset`.
        pad_id: Fills tokens and labels behind the last pack, a document of its own with loss_mask 0.
        pad_multiple, max_length, pad_to_max: As `parallel.collate`'s, for the row.

    Returns:
        tokens, labels, position_ids: [1, S] int64. loss_mask: [1, S] float32. padding_mask: [1, S] bool, True where
        there is padding.

    Raises:
        MixMoEError: As `parallel.collate`.
    """
    row = {key: np.concatenate([pack[key] for pack in packs]) for key in packs[0]}
    batch = collate([row], pad_id=pad_id, pad_multiple=pad_multiple, max_length=max_length, pad_to_max=pad_to_max)
    tokens = len(row["tokens"])
    batch["position_ids"] -= tokens  # what fills up counts from 0, as a document does
    batch["position_ids"][0, :tokens] = torch.from_numpy(row["position_ids"])
    return batch
