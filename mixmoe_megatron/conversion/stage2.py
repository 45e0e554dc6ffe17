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
from mixmoe_megatron.checkpoint.metadata import read_metadata, require_phase
from mixmoe_megatron.checkpoint.output_dir import check_output_dir
from mixmoe_megatron.checkpoint.stored import Region
from mixmoe_megatron.checkpoint.tensors import LazyTensor
from mixmoe_megatron.conversion.plan import check_dtype, expand
from mixmoe_megatron.conversion.prepared import PreparedCheckpoint, describe_model
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.mixmoe import STAGE1, STAGE2
from mixmoe_megatron.model.mapping import TABLES
from mixmoe_megatron.model.router_rows import new_router_weight


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


def prepare_stage2(request: Stage2Request) -> PreparedCheckpoint:
    """Read the stage 1 checkpoint's headers and plan the stage 2 one. Writes nothing.

    Raises:
        MixMoEError: it is of another stage, lacks a tensor, or the output may not be written.
    """
    check_output_dir(request.output_dir, request.force)
    metadata = read_metadata(request.checkpoint_dir)
    require_phase(metadata, STAGE2.starts_from)
    directory = whole_iteration(request.checkpoint_dir, request.iteration, flag="--iteration")
    stored = TorchDistReader(directory)
    reader = HashedSource(stored)
    model = replace(describe_model(metadata, vocabulary_rows(stored, directory)), phase=STAGE2)
    assert model.options is not None, "stage 1 has options"
    plan = []
    for name, shape in (tensor for unit in expand(TABLES["same"], model.sizes) for tensor in unit.megatron):
        source = name.replace(".mt_experts.", ".lm_experts.").replace(".router.mt.", ".router.lm.")
        if source not in reader.names() or reader.shape(source) != shape:
            raise MixMoEError(f"{request.checkpoint_dir} lacks {source} of shape {list(shape)}.")
        dtype = reader.dtype(source)
        check_dtype(source, dtype)
        if model.options.mt_router_init == "random" and ".router.mt." in name:
            read = functools.partial(_new_router, name, shape, model.sizes.init_std, request.seed, dtype)
        else:
            read = functools.partial(reader.read_region, source)
        plan.append(LazyTensor(name, shape, dtype, read))
    child = replace(metadata, phase=STAGE2, versions={}, created_by="add_mt_experts.py")
    parent = Path(request.checkpoint_dir)
    return PreparedCheckpoint(request.output_dir, request.force, model, child, plan, reader, parent, STAGE1.name)


def _new_router(name: str, shape: tuple[int, ...], init_std: float, seed: int, dtype: str, region: Region) -> Bits:
    is_bias = name.endswith("bias")
    start = np.zeros(shape, np.float32) if is_bias else new_router_weight(name, shape, init_std, seed)
    return from_float32(start, dtype)[region]
