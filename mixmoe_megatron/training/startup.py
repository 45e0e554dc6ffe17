"""What happens once before the first step: load the parent checkpoint, freeze, report, guard the first gradients.

`run.add_hooks` gives these functions to Megatron, which calls them when it has built the model.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.training import get_args

from mixmoe_megatron.checkpoint.fingerprint import weights_xxh128
from mixmoe_megatron.checkpoint.hf_files import copy_side_files
from mixmoe_megatron.checkpoint.megatron_checkpoint import TorchDistReader, iteration_directory
from mixmoe_megatron.checkpoint.metadata import METADATA_FILE, Metadata, read_metadata, write_metadata
from mixmoe_megatron.checkpoint.torch_dist_writer import CONTENT_METADATA
from mixmoe_megatron.dtypes import AUTO, choose_device, choose_dtype, training_note
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.base import Phase
from mixmoe_megatron.methods.mixmoe import GROUPS
from mixmoe_megatron.model.freezing import freeze_parameters, parameter_report
from mixmoe_megatron.model.frozen_prefix import run_frozen_layers_ahead
from mixmoe_megatron.model.moe_layer import MixMoELayer
from mixmoe_megatron.training.hf_directories import is_hf_directory, load_from_hf, open_hf_start

logger = logging.getLogger(__name__)

ModelChunks = list[Any]


def load_parent(chunks: ModelChunks, directory: Path, phase: Phase) -> ModelChunks:
    """Fill a fresh model from its parent, under whatever parallel layout this run has.

    A phase with both groups starts from one with LM experts alone: the MT group starts from the LM group (option
    `mt_router_init`). What several data-parallel ranks need is read by one of them, which sends it to the others.

    Args:
        chunks: this rank's parts of the model, not wrapped yet.
        directory: the parent, see `methods`; or a Hugging Face directory, see `hf_directories`.
        phase: to train.

    Returns:
        `chunks`.

    Raises:
        MixMoEError: the parent lacks a tensor or cannot be read.
    """
    from_hf = is_hf_directory(directory)
    path = directory if from_hf else iteration_directory(directory)
    plan = open_hf_start(directory, phase, get_args().upcycle_options).plan if from_hf else []
    # a Hugging Face directory cannot be asked: it is read as our own writer would have written it
    stored_as = CONTENT_METADATA if from_hf else dist_checkpointing.load_content_metadata(str(path))
    replicas = mpu.get_data_parallel_group(with_context_parallel=True)
    adds_mt_group = phase.groups == GROUPS  # no phase with both groups starts from another one
    for chunk in chunks:
        state = chunk.sharded_state_dict(metadata=stored_as)
        if adds_mt_group:
            state = {key: value for key, value in state.items() if not _is_mt(key)}
        if from_hf:
            loaded = load_from_hf(state, plan, replicas)
        else:
            strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), replicas)
            loaded = dist_checkpointing.load(state, str(path), strategy)
        absent = chunk.load_state_dict(loaded, strict=False).missing_keys
        if missing := [key for key in absent if not (_is_mt(key) or key.endswith("_extra_state"))]:
            raise MixMoEError(f"{path} lacks {missing[0]} ({len(missing)} tensors are missing).")
        if adds_mt_group:
            for module in chunk.modules():
                if isinstance(module, MixMoELayer):
                    module.initialize_mt_from_lm()
    _log(f"weights loaded from {path}")
    return chunks


def _is_mt(key: str) -> bool:
    return ".router.mt." in key or ".mt_experts." in key


def leave_out_padding_rows(chunks: ModelChunks, vocab_size: int) -> ModelChunks:
    """Keep rows which a layout or a flag adds to the vocabulary out of the softmax.

    They are zero and frozen: each would count as a token of logit 0, and the loss would depend on their number.

    Args:
        chunks: this rank's parts of the model, not wrapped yet.
        vocab_size: rows of the model.

    Returns:
        `chunks`.
    """
    for chunk in chunks:
        if (layer := getattr(chunk, "output_layer", None)) is None:
            continue  # another pipeline stage
        width = layer.output_size_per_partition
        rows = max(0, vocab_size - width * mpu.get_tensor_model_parallel_rank())
        if rows < width:
            layer.register_forward_hook(functools.partial(_lower_logits, rows))
    return chunks


@torch.no_grad()  # their gradient is 0 anyway; recorded, the write would cost a copy of the gradient of all logits
def _lower_logits(rows: int, layer: torch.nn.Module, inputs: Any, output: Any) -> None:
    logits = output[0]  # [S, B, vocabulary of this rank]
    logits[..., rows:] = torch.finfo(logits.dtype).min


def freeze_and_report(chunks: ModelChunks, phase: Phase, *, dry_run: bool) -> ModelChunks:
    """Freeze what the phase does not train (Table I), run what is frozen below ahead, and log what trains.

    Args:
        chunks: this rank's parts of the model, not wrapped yet.
        phase: to train.
        dry_run: stop the process after the report, with status 0.

    Returns:
        `chunks`.
    """
    freeze_parameters(chunks, phase)
    run_frozen_layers_ahead(chunks, phase)
    dtype = str(get_args().params_dtype).removeprefix("torch.")
    _log(training_note(dtype, choose_dtype(AUTO, choose_device())))
    _log(f"{phase.name}: parameters\n{parameter_report(chunks, phase).table()}")
    if phase.groups and get_args().spectral_transform != "none":
        _log(f"routers: {get_args().spectral_transform} folded into their weights; no activation is transformed")
    if dry_run:
        raise SystemExit(0)
    return chunks


def guard_first_gradient(phase: Phase) -> Callable[..., Any]:
    """Megatron's `finalize_model_grads`, which on its first call also demands a gradient that is not zero.

    A frozen base with activation recompute can lose its whole backward pass without a word; training would go on and
    change nothing.

    Args:
        phase: for the message.

    Returns:
        A replacement for `config.finalize_model_grads_func`.

    Raises (when called):
        MixMoEError: on every rank, when no trainable parameter of any rank has a gradient.
    """
    checked = False

    def finalize(model: ModelChunks, *args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        result = finalize_model_grads(model, *args, **kwargs)
        if not checked:
            checked = True
            _demand_gradient(model, phase)
        return result

    return finalize


def _demand_gradient(model: ModelChunks, phase: Phase) -> None:
    args = get_args()
    largest = torch.zeros(1, device=torch.cuda.current_device())
    trained = [parameter for chunk in model for parameter in chunk.parameters() if parameter.requires_grad]
    for parameter in trained:
        largest = torch.maximum(largest, parameter.main_grad.abs().max().float())
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    if largest.item() == 0.0:
        raise MixMoEError(
            f"the gradient of the first step is zero on every rank ({phase.name}, {len(trained)} trainable tensors "
            f"here, recompute {args.recompute_granularity or 'off'}): nothing would be trained. Check that the batch "
            "has tokens that count in the loss (--loss-on), or run without activation recompute."
        )


def check_save_directory(save: str | None, phase: Phase) -> None:
    """Check that checkpoints of this run may be written to a directory; writes nothing.

    Args:
        save: --save, None when nothing is saved.
        phase: that this run trains.

    Raises:
        MixMoEError: `save` holds a checkpoint of another phase, or cannot be written to.
    """
    if save is None:
        return
    directory = Path(save)
    if (directory / METADATA_FILE).is_file() and (found := read_metadata(directory).phase) != phase:
        raise MixMoEError(f"--save {save} holds a checkpoint of stage {found.name!r}: choose another directory.")
    existing = next(place for place in (directory.absolute(), *directory.absolute().parents) if place.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise MixMoEError(f"--save {save}: {existing} is not a directory that can be written to.")


def prepare_save_directory(
    save: str | None, source: Path, metadata: Metadata, phase: Phase, data: Sequence[dict[str, Any]] = ()
) -> None:
    """Write `mixmoe_metadata.json` and the tokenizer next to the checkpoints of this run (rank 0 only).

    Args:
        save: --save, None when nothing is saved.
        source: the checkpoint or Hugging Face directory that the run starts from, or goes on from.
        metadata: of `source`.
        phase: that this run trains.
        data: the token files of this run (datasets.training_data).

    Raises:
        MixMoEError: as `check_save_directory`.
    """
    if save is None:
        return
    check_save_directory(save, phase)
    directory = Path(save)
    if (directory / METADATA_FILE).is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "tokenizer").is_dir():
        temporary = directory / ".tokenizer.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        copy_side_files(source if is_hf_directory(source) else source / "tokenizer", temporary)
        temporary.rename(directory / "tokenizer")
    parent = metadata.parent
    if metadata.phase != phase or phase.name in phase.starts_from:
        if is_hf_directory(source):
            start = open_hf_start(source, phase, get_args().upcycle_options)
            digest, parent_phase = start.source.weights_digest(), start.parent_phase
        else:
            digest = weights_xxh128(TorchDistReader(iteration_directory(source)))
            parent_phase = metadata.phase.name
        parent = {"path": str(source), "phase": parent_phase, "weights_xxh128": digest}
    child = Metadata(
        phase=phase,
        options=metadata.options,
        megatron_args=metadata.megatron_args,
        hf_config=metadata.hf_config,
        parent=parent,
        created_by="tools/pretrain_mixmoe.py",
        data=[*metadata.data, *data],
    )
    write_metadata(directory, child)


def _log(message: str) -> None:
    if torch.distributed.get_rank() == 0:
        logger.info(message)
