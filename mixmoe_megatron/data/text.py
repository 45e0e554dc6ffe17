"""Read monolingual token files as training samples: Megatron's GPTDataset with an order that a run can go on with.

Shape legend: T tokens of the documents, S sequence length.

What stock `GPTDataset` does and what is changed here:

- It shuffles all epochs but the last together, as many as the run will need: with more steps, or another batch size,
  every sample is another one, and a run that goes on sees documents twice and others never. Here the order is an
  endless stream of epochs, each a permutation of all documents that depends on the seed and the epoch alone. The stream
  is cut into samples of S tokens; a sample belongs to the epoch in which it begins, and those that end there too are
  shuffled. Epoch 0 is exactly what stock gives to a run of less than an epoch.
- It takes the tokenizer's padding token for padding wherever it stands in the text: BOS and UNK are one in many
  tokenizers. Here no token of the text is special; what fills up a sample is -1.
- It counts epochs for ever when a split holds no document: `parts_of_split` tells, before anything is built.
- It keeps the order in files beside the data. Here each process makes it anew: 1.6 s on one core for an epoch of ten
  million documents of 20 to 1,500 tokens, in samples of 2,048.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from mixmoe_megatron.errors import MixMoEError


class TextTokens:
    """What GPTDataset asks of a tokenizer: no token is padding, one may end documents (for --eod-mask-loss).

    Args:
        eos_id: Ends each document.
    """

    pad = -1
    vocab_size = None

    def __init__(self, eos_id: int) -> None:
        self.eod = eos_id
        self.unique_identifiers = {"eod": eos_id}


@dataclass
class TextDatasetConfig(GPTDatasetConfig):
    """Megatron's settings of a blend of token files, and which of them hold text in original languages (MoE-LPR).

    Args:
        original_prefixes: path prefixes of token files; their samples say so where there is one.
    """

    original_prefixes: tuple[str, ...] = ()


class TextDataset(GPTDataset):
    """Samples of S + 1 consecutive tokens of a monolingual token file; built by BlendedMegatronDatasetBuilder."""

    config: TextDatasetConfig

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """Return a sample as GPTDataset does, and with original prefixes "is_original", [] bool: whether it is of one.

        Args:
            idx: number of the sample; None: a sample that counts for nothing.
        """
        sample = super().__getitem__(idx)
        if self.config.original_prefixes:
            sample["is_original"] = torch.tensor(self.dataset_path in self.config.original_prefixes)
        return sample

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the documents in order, where each sample begins in them, and the samples in order.

        Returns:
            As stock GPTDataset: [documents of all epochs] int32; [samples + 1, 2] integers, place in the documents and
            token in that one; [samples] int64. There are as many samples as asked for, or more: whole epochs.
        """
        tokens, length = self._get_num_tokens_per_epoch(), self.config.sequence_length
        wanted = max(1, tokens // length if self.num_samples is None else self.num_samples)
        epochs = (wanted - 1) * length // tokens + 1
        read = epochs + (length + 1) // tokens + 1  # the last sample may end in later ones
        documents = np.tile(self.indices, (read, 1)).astype(np.int32, copy=False)
        samples = []
        for epoch, row in enumerate(documents):
            generator = np.random.RandomState((self.config.random_seed + epoch) % 2**32)
            generator.shuffle(row)
            if epoch < epochs:
                own = np.arange(-(-epoch * tokens // length), -(-(epoch + 1) * tokens // length))
                generator.shuffle(own[:-1])
                samples.append(own)
        order = np.concatenate(samples)
        starts = helpers.build_sample_idx(
            self.dataset.sequence_lengths, documents.reshape(-1), length, read, tokens, True, True
        )
        return documents.reshape(-1), starts[: len(order) + 1], order


def parts_of_split(split: str, documents: int) -> list[int]:
    """Return how many of a file's documents are for training, validation and test, as Megatron cuts it.

    Args:
        split: --split, three shares such as "969,30,1".
        documents: Of the file.

    Raises:
        MixMoEError: The shares are not numbers, or all are 0.
    """
    try:
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
        parts = [part and [round(edge * documents) for edge in part] for part in matrix]
    except (AssertionError, ValueError, ZeroDivisionError) as error:
        raise MixMoEError(
            f"--split {split} is not three shares of training, validation and test, as in 98,1,1."
        ) from error
    return [part[1] - part[0] if part else 0 for part in parts]
