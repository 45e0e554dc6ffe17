"""Read parallel token files as training samples, in a deterministic order grouped by length, and collate them.

Shape legend: T tokens of one sample, B samples of a micro-batch, S padded length.

A sample is a whole document x = prompt + target + EOS, never cut: tokens are x[:-1], labels x[1:]. With
`loss_on="target"` position t counts exactly when its *label* belongs to target + EOS: the prompt's last token predicts
the target's first, and EOS is predicted too. With `loss_on="all"` every position counts.

The order is an endless stream of epochs, each a permutation of all documents. An epoch's permutation is cut into
buckets of `GROUPS_PER_BUCKET * GROUP_SIZE` samples; a bucket is sorted by length and cut into groups of `GROUP_SIZE`
samples; all groups of the epoch are shuffled. So consecutive samples have similar lengths and little is padded (the one
group on the border of two epochs is left as it comes). Each epoch holds each document once, and the order depends on
the seed and the documents alone: not on the batch size, the rank, the worker or the number of samples asked for. A run
that goes on with another batch size takes up where it stopped, and a longer run begins like a shorter one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from mixmoe_megatron.data.storage import read_manifest
from mixmoe_megatron.errors import MixMoEError

#: How many consecutive samples have similar lengths: those of a step, or of a few. Never the batch size of a run, which
#: may go on with another one.
GROUP_SIZE = 64
GROUPS_PER_BUCKET = 64
KEPT_EPOCHS = 2


class ParallelDataset(torch.utils.data.Dataset):
    """Samples of one or several parallel token files.

    Args:
        prefixes: Path prefix or prefixes, as given to tools/preprocess_data.py; several are joined.
        num_samples: Length of the dataset: train_iters * global_batch_size, documents repeat epoch-wise. None: one
            epoch.
        seed: Seed of the order.
        group_size: Deprecated and not read: the order no longer depends on the batch size.
        max_length: The model's sequence length; None: no limit.
        loss_on: "target": target and EOS count; "all": every label counts.
        shuffle: False: the documents in file order, again and again, not grouped by length.

    Attributes:
        lengths: [num_documents] integers, tokens of each document as a sample.

    Raises:
        MixMoEError: A file is missing or not parallel data, the files were built with several tokenizers, a document
            is longer than max_length (rebuild with --max-tokens), or an argument is out of range.
    """

    def __init__(
        self,
        prefixes: str | Path | Sequence[str | Path],
        num_samples: int | None = None,
        *,
        seed: int = 0,
        group_size: int | None = None,
        max_length: int | None = None,
        loss_on: Literal["target", "all"] = "target",
        shuffle: bool = True,
    ) -> None:
        if group_size is not None:
            warnings.warn("group_size is not read: the order does not depend on it", DeprecationWarning, stacklevel=2)
        if num_samples is not None and num_samples < 1:
            raise MixMoEError(f"num_samples must be 1 or more, not {num_samples}.")
        if loss_on not in ("target", "all"):
            raise MixMoEError(f"loss_on must be 'target' or 'all', not '{loss_on}'.")
        self.prefixes = [prefixes] if isinstance(prefixes, str | Path) else list(prefixes)
        self.seed, self.loss_on, self.shuffle = seed, loss_on, shuffle
        self.manifests = _read_manifests(self.prefixes)
        self.directions = sorted({name for manifest in self.manifests for name in manifest["directions"]})
        self._files = [_open_documents(prefix) for prefix in self.prefixes]
        lengths = [file.sequence_lengths.reshape(-1, 2).sum(axis=1) - 1 for file in self._files]
        self._starts = np.cumsum([0, *map(len, lengths)])
        self.lengths = np.concatenate(lengths)
        self.num_samples = self.num_documents if num_samples is None else num_samples
        self._orders: dict[int, np.ndarray] = {}
        longest = int(self.lengths.max())
        if max_length is not None and longest > max_length:
            raise MixMoEError(
                f"{', '.join(map(str, self.prefixes))}: the longest sample has {longest} tokens but the sequence "
                f"length is {max_length}; build the data again with --max-tokens {max_length + 1}."
            )

    @property
    def num_documents(self) -> int:
        """How many documents the files hold: the samples of one epoch."""
        return len(self.lengths)

    def __len__(self) -> int:
        """Return num_samples."""
        return self.num_samples

    def document_index(self, index: int) -> int:
        """Return which document (0 .. num_documents - 1, through all files) sample `index` is.

        Raises:
            IndexError: index is not in 0 .. num_samples - 1.
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        epoch, offset = divmod(int(index), self.num_documents)
        return int(self._order(epoch)[offset]) if self.shuffle else offset

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sample, not padded.

        Args:
            index: 0 .. num_samples - 1.

        Returns:
            tokens: [T] int64. labels: [T] int64, the next tokens. loss_mask: [T] float32, 1 where the label counts.
            direction: int, the place of the sample's direction in `directions`.

        Raises:
            IndexError: index is out of range.
        """
        return self.document(self.document_index(index))

    def document(self, document: int) -> dict[str, Any]:
        """Return the sample, as `self[index]` does, of document 0 .. num_documents - 1."""
        place = int(np.searchsorted(self._starts, document, side="right")) - 1
        sequence = 2 * (document - int(self._starts[place]))
        (prompt, target), modes = self._files[place][sequence : sequence + 2]
        tokens = np.concatenate([prompt, target]).astype(np.int64)
        loss_mask = np.ones(len(tokens) - 1, dtype=np.float32)
        if self.loss_on == "target":
            loss_mask[: len(prompt) - 1] = 0
        direction = self.directions.index(self.manifests[place]["directions"][int(modes[0])])
        return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": loss_mask, "direction": direction}

    def _order(self, epoch: int) -> np.ndarray:
        """Return the documents of an epoch in training order, [num_documents] int64; the last epochs are kept."""
        if epoch not in self._orders:
            if len(self._orders) >= KEPT_EPOCHS:
                del self._orders[min(self._orders)]
            self._orders[epoch] = epoch_order(self.lengths, epoch, self.seed)
        return self._orders[epoch]


def target_share(prefixes: Sequence[str | Path]) -> float:
    """Return which share of the documents' labels is a target's, EOS included: those that carry loss.

    Args:
        prefixes: Of parallel token files.

    Raises:
        MixMoEError: A file is missing or not parallel data.
    """
    files = [_open_documents(prefix) for prefix in prefixes]  # their memory is gone with them
    lengths = np.concatenate([file.sequence_lengths.reshape(-1, 2) for file in files])
    return 1 - float(np.maximum(lengths[:, 0] - 1, 0).sum() / (lengths.sum() - len(lengths)))


def epoch_order(lengths: np.ndarray, epoch: int, seed: int, group_size: int = GROUP_SIZE) -> np.ndarray:
    """Shuffle the documents of one epoch in groups of similar length.

    Groups are counted through the whole stream of epochs, so that they stay aligned to the steps of a batch size that
    divides group_size when the number of documents is no multiple of it.

    Args:
        lengths: [N] integers, the documents' lengths in tokens.
        epoch: Number of the epoch, from 0.
        seed: Seed of the order.
        group_size: Samples of one group.

    Returns:
        [N] int64, a permutation.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    head = min(-epoch * len(lengths) % group_size, len(lengths))
    num_groups = (len(lengths) - head) // group_size
    inner = order[head : head + num_groups * group_size]
    bucket = GROUPS_PER_BUCKET * group_size
    chunks = [inner[start : start + bucket] for start in range(0, len(inner), bucket)]
    chunks = [chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks]
    if chunks:
        groups = np.concatenate(chunks).reshape(num_groups, group_size)
        order[head : head + len(inner)] = generator.permutation(groups, axis=0).reshape(-1)
    return order


def collate(
    samples: Sequence[dict[str, Any]],
    *,
    pad_id: int,
    pad_multiple: int = 1,
    max_length: int | None = None,
    pad_to_max: bool = False,
) -> dict[str, torch.Tensor]:
    """Pad samples on the right to one micro-batch; bind the options with functools.partial for a DataLoader.

    Args:
        samples: Samples of `ParallelDataset`.
        pad_id: Fills tokens and labels behind a sample; these positions have loss_mask 0 and padding_mask True.
        pad_multiple: S is a multiple of this, unless max_length cuts the rounding short.
        max_length: S is never more.
        pad_to_max: S is max_length, whatever the samples (fixed shapes, for pipeline parallelism).

    Returns:
        tokens, labels, position_ids: [B, S] int64. loss_mask: [B, S] float32. padding_mask: [B, S] bool, True where
        there is padding.

    Raises:
        MixMoEError: A sample is longer than max_length, or pad_to_max comes without max_length.
    """
    longest = max(len(sample["tokens"]) for sample in samples)
    width = padded_width(longest, pad_multiple, max_length, pad_to_max)
    shape = (len(samples), width)
    batch = {
        "tokens": torch.full(shape, pad_id, dtype=torch.int64),
        "labels": torch.full(shape, pad_id, dtype=torch.int64),
        "loss_mask": torch.zeros(shape, dtype=torch.float32),
        "position_ids": torch.arange(width).repeat(len(samples), 1),
        "padding_mask": torch.ones(shape, dtype=torch.bool),
    }
    for row, sample in enumerate(samples):
        length = len(sample["tokens"])
        for key in ("tokens", "labels", "loss_mask"):
            batch[key][row, :length] = torch.from_numpy(sample[key])
        batch["padding_mask"][row, :length] = False
    return batch


def padded_width(tokens: int, pad_multiple: int, max_length: int | None, pad_to_max: bool) -> int:
    """Return how wide a row of so many tokens is made; the arguments are `collate`'s.

    Raises:
        MixMoEError: There are more tokens than max_length, or pad_to_max comes without max_length.
    """
    if max_length is not None and tokens > max_length:
        raise MixMoEError(f"A sample has {tokens} tokens, more than the sequence length {max_length}.")
    if pad_to_max:
        if max_length is None:
            raise MixMoEError("pad_to_max needs max_length.")
        return max_length
    width = -(-tokens // pad_multiple) * pad_multiple
    return width if max_length is None else min(width, max_length)


def _read_manifests(prefixes: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Read the manifests and check that one tokenizer made all of the files.

    Raises:
        MixMoEError: No prefix, a wrong file, or several tokenizers.
    """
    if not prefixes:
        raise MixMoEError("No parallel data is given.")
    manifests = [read_manifest(prefix, kind="parallel") for prefix in prefixes]
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if manifest["tokenizer"]["sha256"] != manifests[0]["tokenizer"]["sha256"]:
            raise MixMoEError(f"{prefixes[0]} and {prefix} were built with different tokenizers.")
    return manifests


def _open_documents(prefix: str | Path) -> IndexedDataset:
    """Open a token file of two sequences a document.

    Raises:
        MixMoEError: Megatron cannot read it, or some document has another number of sequences.
    """
    try:
        file = IndexedDataset(str(prefix), multimodal=True)
    except (AssertionError, ValueError) as error:
        raise MixMoEError(f"{prefix}.idx is not the index of parallel data ({error}).") from error
    if not np.array_equal(file.document_indices, np.arange(0, len(file) + 1, 2)):
        raise MixMoEError(
            f"{prefix} does not hold two sequences a document; build it with preprocess_data.py parallel."
        )
    return file
