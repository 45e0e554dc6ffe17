"""A conversion to Megatron of which all but the weights is settled, and how it is written."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mixmoe_megatron.checkpoint.fingerprint import HashedSource
from mixmoe_megatron.checkpoint.hf_files import TOKENIZER_DIR, copy_side_files
from mixmoe_megatron.checkpoint.megatron_checkpoint import TorchDistReader
from mixmoe_megatron.checkpoint.metadata import Metadata, package_versions, write_metadata
from mixmoe_megatron.checkpoint.output_dir import check_space, whole_directory
from mixmoe_megatron.checkpoint.ranks import ALONE, Ranks
from mixmoe_megatron.checkpoint.tensors import LazyTensor, verify_written
from mixmoe_megatron.checkpoint.torch_dist_writer import write_torch_dist
from mixmoe_megatron.conversion.byte_progress import progress
from mixmoe_megatron.conversion.hf_config import CONFIG_FILE, check_architecture
from mixmoe_megatron.conversion.plan import describe_tensors
from mixmoe_megatron.model.extra_state import extra_state_keys
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.model.sizes import ModelDescription


def describe_model(metadata: Metadata, embedding_rows: int) -> ModelDescription:
    """Return the description of the model that a checkpoint holds.

    Args:
        metadata: of the checkpoint.
        embedding_rows: of its word embedding, padding included.

    Raises:
        MixMoEError: the metadata contradicts itself, or an option is out of range.
    """
    check_architecture(metadata)
    options = MixMoEOptions.from_dict(metadata.options or {}) if metadata.phase.groups else None
    return ModelDescription(
        metadata.hf_config,
        metadata.megatron_args,
        options,
        metadata.phase,
        embedding_rows,
        metadata.new_layers,
        metadata.lora,
    )


@dataclass(frozen=True)
class PreparedCheckpoint:
    """A checked conversion to Megatron: everything but the weights is settled.

    Attributes:
        output_dir: the checkpoint to make.
        force: replace a directory that has content.
        model: that the checkpoint is to hold.
        metadata: of the checkpoint; its parent is filled in when it is written.
        plan: the tensors, by per-layer name.
        source: of the weights, which the plan reads.
        parent: their directory: a Hugging Face one, or a checkpoint's.
        parent_phase: name of the phase of those weights.
    """

    output_dir: str
    force: bool
    model: ModelDescription
    metadata: Metadata
    plan: list[LazyTensor]
    source: HashedSource
    parent: Path
    parent_phase: str

    def describe(self) -> str:
        """Return the plan for --dry-run."""
        return describe_tensors(self.plan, self.output_dir)


def write_checkpoint(prepared: PreparedCheckpoint, ranks: Ranks = ALONE) -> None:
    """Write a `release` checkpoint directory: torch_dist weights, tokenizer files and metadata, all or nothing.

    Args:
        prepared: the same on every rank.
        ranks: those that share the work; all of them must call this.

    Raises:
        MixMoEError: the output directory may not be replaced, the disk is full, or a weight file is damaged.
    """
    plan, sizes, metadata, parent = prepared.plan, prepared.model.sizes, prepared.metadata, prepared.parent
    total = sum(tensor.num_bytes for tensor in plan)
    ranks.on_first(lambda: check_space(prepared.output_dir, total))
    with (
        ThreadPoolExecutor(1) as beside,
        whole_directory(prepared.output_dir, prepared.force, ranks) as directory,
        progress(total // ranks.size, "to Megatron", ranks.rank) as advance,
    ):
        versions = beside.submit(package_versions)
        stacked = sizes.num_layers if sizes.is_stacked else 0
        args, empty = prepared.model.checkpoint_args(), extra_state_keys(sizes)
        iteration = write_torch_dist(directory, plan, args, stacked, empty, advance, ranks)
        digest = prepared.source.weights_digest(ranks)

        def finish() -> None:
            verify_written(plan, TorchDistReader(iteration))
            is_hf = (parent / CONFIG_FILE).is_file()
            copy_side_files(parent if is_hf else parent / TOKENIZER_DIR, directory / TOKENIZER_DIR)
            metadata.parent = {"path": str(parent), "phase": prepared.parent_phase, "weights_xxh128": digest}
            metadata.versions = versions.result()
            write_metadata(directory, metadata)

        ranks.on_first(finish)
