"""Stage 1 -> stage 2 as a checkpoint: the MT group starts as a copy of the LM group (eq. 1-2; option `mt_router_init`).

Training does the same by itself when stage 2 starts from a stage 1 checkpoint; this is for those who want the files.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mixmoe_megatron.checkpoint.bits import Bits, from_float32
from mixmoe_megatron.checkpoint.fingerprint import HashedSource
from mixmoe_megatron.checkpoint.health import whole_iteration
from mixmoe_megatron.checkpoint.megatron_checkpoint import TorchDistReader, vocabulary_rows
from mixmoe_megatron.checkpoint.metadata import Metadata, read_metadata, require_stage
from mixmoe_megatron.checkpoint.output_dir import check_output_dir
from mixmoe_megatron.checkpoint.ranks import ALONE, Ranks
from mixmoe_megatron.checkpoint.stored import Region
from mixmoe_megatron.conversion.hf_config import check_architecture
from mixmoe_megatron.conversion.hf_import import write_checkpoint
from mixmoe_megatron.conversion.plan import LazyTensor, check_dtype, describe_tensors, expand
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.model.mapping import TABLES, Sizes
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.model.router_rows import new_router_weight
from mixmoe_megatron.model.sizes import model_sizes


@dataclass(frozen=True)
class Stage2Request:
    """What `add_mt_experts.py` is asked to do.

    Attributes:
        checkpoint_dir: of stage 1.
        output_dir: the stage 2 checkpoint to make.
        iteration: None: the one that the tracker file names.
        seed: of the MT routers when `mt_router_init` is `random`.
        force: replace an output directory that has content.
    """

    checkpoint_dir: str
    output_dir: str
    iteration: int | None = None
    seed: int = 1234
    force: bool = False


@dataclass(frozen=True)
class PreparedStage2:
    """A checked request: everything but the weights is settled."""

    request: Stage2Request
    metadata: Metadata
    sizes: Sizes
    plan: list[LazyTensor]
    source: HashedSource

    def describe(self) -> str:
        """Return the plan for --dry-run."""
        return describe_tensors(self.plan, self.request.output_dir)


def prepare_stage2(request: Stage2Request) -> PreparedStage2:
    """Read the stage 1 checkpoint's headers and plan the stage 2 one. Writes nothing.

    Raises:
        MixMoEError: it is of another stage, lacks a tensor, or the output may not be written.
    """
    check_output_dir(request.output_dir, request.force)
    metadata = read_metadata(request.checkpoint_dir)
    require_stage(metadata, "stage1", "train stage 1 first (tools/pretrain_mixmoe.py --mixmoe-stage 1).")
    options = MixMoEOptions.from_dict(metadata.options or {})
    check_architecture(metadata)
    directory = whole_iteration(request.checkpoint_dir, request.iteration, flag="--iteration")
    stored = TorchDistReader(directory)
    reader = HashedSource(stored)
    rows = vocabulary_rows(stored, directory)
    sizes = model_sizes(metadata.megatron_args, options, "stage2", padded_vocab=rows)
    plan = []
    for name, shape in (tensor for unit in expand(TABLES["same"], sizes) for tensor in unit.megatron):
        source = name.replace(".mt_experts.", ".lm_experts.").replace(".router.mt.", ".router.lm.")
        if source not in reader.names() or reader.shape(source) != shape:
            raise MixMoEError(f"{request.checkpoint_dir} lacks {source} of shape {list(shape)}.")
        dtype = reader.dtype(source)
        check_dtype(source, dtype)
        if options.mt_router_init == "random" and ".router.mt." in name:
            read = functools.partial(_new_router, name, shape, sizes.init_std, request.seed, dtype)
        else:
            read = functools.partial(reader.read_region, source)
        plan.append(LazyTensor(name, shape, dtype, read))
    child = replace(metadata, stage="stage2", versions={}, created_by="add_mt_experts.py")
    return PreparedStage2(request, child, sizes, plan, reader)


def _new_router(name: str, shape: tuple[int, ...], init_std: float, seed: int, dtype: str, region: Region) -> Bits:
    is_bias = name.endswith("bias")
    start = np.zeros(shape, np.float32) if is_bias else new_router_weight(name, shape, init_std, seed)
    return from_float32(start, dtype)[region]


def run_stage2(prepared: PreparedStage2, ranks: Ranks = ALONE) -> None:
    """Write the stage 2 checkpoint, all or nothing.

    Args:
        prepared: the same on every rank.
        ranks: those that share the work; all of them must call this.

    Raises:
        MixMoEError: the output directory may not be replaced, the disk is full, or a stored tensor is damaged.
    """
    request, parent = prepared.request, Path(prepared.request.checkpoint_dir)
    write_checkpoint(
        prepared.plan, prepared.metadata, prepared.sizes, prepared.source, parent, "stage1", request, ranks
    )
