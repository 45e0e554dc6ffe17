"""Datasets for Megatron: TextDataset for monolingual token files, ParallelDataset for translation pairs."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.training import get_args
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from megatron.training.utils import get_blend_and_blend_per_split

from mixmoe_megatron.data.packing import PackedDataset, collate_packs, padding_shares
from mixmoe_megatron.data.parallel import ParallelDataset, collate, epoch_order, target_share
from mixmoe_megatron.data.storage import check_same_tokenizer, read_manifest
from mixmoe_megatron.data.text import TextDataset, TextDatasetConfig, TextTokens, parts_of_split
from mixmoe_megatron.data.tokenizers import check_number_of_ids, open_tokenizer
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.training.megatron_args import MegatronArgs

logger = logging.getLogger(__name__)
_ORDER = 2  # of the documents; in order 1 it depended on the batch size and on the number of steps
_DEFAULT_SPLIT = "969, 30, 1"  # Megatron's
Splits = tuple[Any, Any, Any]

#: Widths of batches on a GPU are multiples of this. Transformer Engine has cuDNN plan the attention of each width that
#: it meets, forward and backward, once in a run, and keeps the plans by the exact width. Sentences of 68 tokens on
#: average, of 8 to 512, in micro-batches of 4 have 323 widths and 0.2% padding; in multiples of 16, 32 widths and 10%;
#: of 64, 8 widths and 30%, in every step. A CPU plans nothing.
GPU_WIDTHS = 16


def data_prefixes(args: MegatronArgs) -> list[str]:
    """The path prefixes that the data flags name, blend weights left out.

    Raises:
        MixMoEError: no data flag was given, or a weight that is not positive.
    """
    blend, per_split = get_blend_and_blend_per_split(args)
    blends = [blend] if blend else [part for part in per_split or [] if part]
    if not blends:
        raise MixMoEError("no training data: give --data-path P (see tools/preprocess_data.py).")
    if any(weights is not None and not min(weights) > 0 for _, weights in blends):
        raise MixMoEError("the weights of --data-path must be greater than 0.")
    return [prefix for prefixes, _ in blends for prefix in prefixes]


def original_prefixes(args: MegatronArgs) -> tuple[str, ...]:
    """Those of the data flags' path prefixes that --lpr-original-data-path names; none without it.

    Raises:
        MixMoEError: it names another.
    """
    by_place = {os.path.abspath(prefix): prefix for prefix in data_prefixes(args)}
    wanted = args.lpr_original_data_path or []
    if unknown := [prefix for prefix in wanted if os.path.abspath(prefix) not in by_place]:
        raise MixMoEError(f"--lpr-original-data-path {unknown[0]} is none of the --data-path prefixes.")
    return tuple(by_place[os.path.abspath(prefix)] for prefix in wanted)


def training_data(args: MegatronArgs, phase: str) -> list[dict[str, Any]]:
    """What a run trains on, for the metadata of its checkpoints: one entry a token file.

    Args:
        args: Megatron's namespace with the data flags.
        phase: the phase's name.

    Raises:
        MixMoEError: as `data_kind`.
    """
    found, originals = [], original_prefixes(args)
    for prefix in data_prefixes(args):
        manifest = read_manifest(prefix)
        digest = hashlib.sha256(Path(f"{prefix}.json").read_bytes()).hexdigest()
        entry = {"phase": phase, "prefix": Path(prefix).name, "kind": manifest["kind"], "tokens": manifest["tokens"]}
        told = {"original": True} if prefix in originals else {}
        found.append({**entry, **told, "manifest_sha256": digest, "order": _ORDER})
    return found


def tell_of_another_order(data: Sequence[dict[str, Any]], phase: str) -> None:
    """Warn that a run was begun in the order of documents of an earlier version.

    Args:
        data: of its checkpoint's metadata, see `training_data`.
        phase: the phase's name.
    """
    if any(entry.get("phase") == phase and entry.get("order") != _ORDER for entry in data):
        logger.warning(
            "this run was begun by an earlier version, whose documents came in another order: of the epoch that it is "
            "in some may come twice and some not at all; each later epoch holds each document once"
        )


def data_kind(args: MegatronArgs) -> str:
    """What the token files hold, "monolingual" or "parallel"; checks that the model's tokenizer made them.

    Raises:
        MixMoEError: a file is missing, both kinds are mixed, or another tokenizer built them.
    """
    manifests = {prefix: read_manifest(prefix) for prefix in data_prefixes(args)}
    kinds = {manifest["kind"] for manifest in manifests.values()}
    if len(kinds) > 1:
        raise MixMoEError(f"--data-path mixes {' and '.join(sorted(kinds))} data: {', '.join(manifests)}.")
    for prefix, manifest in manifests.items():
        check_number_of_ids(f"The tokenizer that made {prefix}", manifest["tokenizer"]["vocab_size"], args.vocab_size)
    if args.tokenizer_type == "HuggingFaceTokenizer":
        tokenizer = open_tokenizer(args.tokenizer_model, args.vocab_size)
        for prefix, manifest in manifests.items():
            check_same_tokenizer(prefix, manifest, tokenizer)
    return kinds.pop()


def configure_data(args: MegatronArgs) -> None:
    """Set what the data demand of Megatron's arguments. Call before they are validated.

    Parallel samples have their own lengths: they come by an own loader ("external"). Without a document for validation
    there is none.

    Raises:
        MixMoEError: the data are not what the flags ask for, no document is left for training,
            --calculate-per-token-loss with a loss on the target only, --pack with what it does not go with, or the
            LPR loss without monolingual text of original languages.
    """
    if args.dataloader_type == "cyclic":
        raise MixMoEError(
            "--dataloader-type cyclic is not supported: its order depends on the batch size; leave it out, documents "
            "are shuffled anyway."
        )
    kind = data_kind(args)
    _check_lpr_data(args, kind)
    _settle_validation(args, kind)
    if kind != "parallel":
        if args.pack:
            raise MixMoEError("--pack is for parallel data; Megatron packs monolingual data by itself: leave it out.")
        args.dataloader_type = "single"
        return
    args.dataloader_type = "external"
    if args.pack:
        _check_packing(args)
    if args.calculate_per_token_loss and args.loss_on == "target":
        raise MixMoEError(
            "--calculate-per-token-loss divides the aux losses by the target tokens alone, while they are taken over "
            "all tokens: leave it out, or count the loss on all tokens (--loss-on all)."
        )


def _check_lpr_data(args: MegatronArgs, kind: str) -> None:
    if not args.lpr_coeff:
        if args.lpr_original_data_path:
            raise MixMoEError("--lpr-original-data-path goes with --lpr-coeff above 0: leave it out.")
        return
    if kind != "monolingual":
        raise MixMoEError("--lpr-coeff goes with monolingual data: each of its files is of one language.")
    if not original_prefixes(args):
        raise MixMoEError(
            "--lpr-original-data-path is missing: name the --data-path prefixes of original languages (with "
            "--lpr-coeff 0 there is no such loss)."
        )


def _settle_validation(args: MegatronArgs, kind: str) -> None:
    """Refuse training without a document; leave validation out without one."""
    blend, per_split = get_blend_and_blend_per_split(args)
    if per_split:
        if not per_split[0] and not args.skip_train:
            raise MixMoEError("--train-data-path is missing.")
        lacking = "" if per_split[1] else "there is no --valid-data-path"
    elif kind == "parallel":
        lacking = "--data-path of parallel data is all for training"
    else:
        args.split = (args.split or _DEFAULT_SPLIT).replace(" ", "")
        without = _without_documents(args.split, blend[0])
        lacking = f"--split {args.split} leaves no document of {', '.join(without[1])}" if without[1] else ""
        if without[0] and not args.skip_train:
            raise MixMoEError(f"--split {args.split} leaves no document of {', '.join(without[0])} for training.")
    if args.eval_iters and lacking:
        if args.skip_train:
            raise MixMoEError(f"--skip-train leaves nothing to do: {lacking} for validation.")
        logger.warning("no validation, and no test: %s (--eval-iters 0 leaves them out)", lacking)
        args.eval_iters = 0


def _without_documents(split: str, prefixes: Sequence[str]) -> list[list[str]]:
    """For training, validation and test: the files of which --split gives no document to it."""
    parts = {prefix: parts_of_split(split, read_manifest(prefix)["documents"]) for prefix in prefixes}
    return [[prefix for prefix in prefixes if not parts[prefix][place]] for place in range(3)]


def _check_packing(args: MegatronArgs) -> None:
    """Refuse layouts for which packed documents are not exact, or not of the one length that they need."""
    if args.context_parallel_size > 1:
        raise MixMoEError(
            "--pack needs --context-parallel-size 1: context parallelism splits a whole row, not each of its documents."
        )
    if args.micro_batch_size > 1 and args.pipeline_model_parallel_size > 1 and _pads_to_max(args):
        raise MixMoEError(
            f"--pack with pipeline parallelism and --moe-token-dispatcher-type {args.moe_token_dispatcher_type} needs "
            "--micro-batch-size 1: take it, or the dispatcher alltoall."
        )


def loss_share(args: MegatronArgs) -> float:
    """Return which share of the training tokens carries loss: of others no logits are computed.

    Args:
        args: Megatron's validated namespace; a stock script's has logits of all.
    """
    if args.dataloader_type != "external" or args.skip_train or getattr(args, "loss_on", "all") == "all":
        return 1.0
    blend, per_split = get_blend_and_blend_per_split(args)
    return target_share((per_split[0] if per_split else blend)[0])


def has_variable_lengths(args: MegatronArgs) -> bool:
    """Whether micro-batches differ in length, so that pipeline stages must tell each other their tensors' shapes.

    Megatron's `variable_seq_lengths`, which its validation of the arguments resets.
    """
    return args.dataloader_type == "external" and not _pads_to_max(args)


def _pads_to_max(args: MegatronArgs) -> bool:
    """Some dispatchers need one length: on all ranks that share experts, and (Megatron, allgather) in a pipeline."""
    shares = args.expert_model_parallel_size > 1 or args.pipeline_model_parallel_size > 1
    dispatcher = args.moe_token_dispatcher_type
    uneven = dispatcher == "alltoall" or (dispatcher == "flex" and args.moe_flex_dispatcher_backend == "deepep")
    return shares and not uneven


def datasets_provider(num_samples: Sequence[int], vp_stage: int | None = None) -> Splits:
    """Build (train, valid, test) for Megatron's `pretrain`, on every rank (see step.py).

    Args:
        num_samples: samples wanted of each split.
        vp_stage: virtual pipeline stage, not used: every stage reads the same batch.

    Returns:
        Monolingual: map-style datasets. Parallel: iterators of micro-batches.
    """
    args = get_args()
    num_samples = _samples_to_the_end(args, num_samples)
    if args.dataloader_type == "external":
        return _parallel_loaders(args, num_samples)
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = TextDatasetConfig(
        original_prefixes=original_prefixes(args),
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=_weighted(blend),
        blend_per_split=[_weighted(part) for part in blend_per_split] if blend_per_split else None,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=TextTokens(read_manifest(data_prefixes(args)[0])["tokenizer"]["eos_id"]),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )
    if blend:  # a split without a document is none: Megatron would count its epochs for ever
        without = _without_documents(args.split, blend[0])
        config.split_matrix = [
            None if lacking else part for part, lacking in zip(config.split_matrix, without, strict=True)
        ]
    builder = BlendedMegatronDatasetBuilder(TextDataset, num_samples, lambda: True, config)
    train, valid, test = (split if wanted else None for split, wanted in zip(builder.build(), num_samples, strict=True))
    return train, valid, test


def _samples_to_the_end(args: MegatronArgs, num_samples: Sequence[int]) -> list[int]:
    """Samples of each split that the run has used or will use, whatever batch sizes it had before; 0: it needs none.

    Megatron counts (`num_samples`) as if this batch size had been that of all steps. With --train-samples, the steps
    are set to those that the samples left are enough for.
    """
    train, valid, test = num_samples
    if args.skip_train:
        return [0, valid, test]
    if args.step_batch_size_schedule is not None:
        return [train, valid, test]
    if args.train_samples:
        left = args.train_samples - args.consumed_train_samples
        args.train_iters = args.iteration + left // args.global_batch_size
    else:
        train = args.consumed_train_samples + (args.train_iters - args.iteration) * args.global_batch_size
    evaluations = args.train_iters // args.eval_interval - args.iteration // args.eval_interval + 1
    valid = args.consumed_valid_samples + evaluations * args.eval_iters * args.eval_global_batch_size
    return [train, valid if args.eval_iters else 0, test]


def _weighted(blend: Any) -> Any:
    """Give a blend without weights the files' token counts: without any, Megatron reads each file once and stops."""
    if not blend or blend[1] is not None:
        return blend
    return blend[0], [float(read_manifest(prefix)["tokens"]) for prefix in blend[0]]


def _parallel_loaders(args: MegatronArgs, num_samples: Sequence[int]) -> Splits:
    """Iterators over padded micro-batches; they go on from the samples already consumed, --skip-train begins anew."""
    blend, per_split = get_blend_and_blend_per_split(args)
    parts = list(per_split) if per_split else [blend, None, None]
    consumed = [args.consumed_train_samples, 0 if args.skip_train else args.consumed_valid_samples, 0]
    sizes = [args.micro_batch_size, args.eval_micro_batch_size, args.eval_micro_batch_size]
    train, valid, test = (
        _parallel_loader(args, part, wanted, used, size) if part and wanted else None
        for part, wanted, used, size in zip(parts, num_samples, consumed, sizes, strict=True)
    )
    return train, valid, test


def _parallel_loader(
    args: MegatronArgs, blend: Any, num_samples: int, consumed: int, micro_batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    prefixes, weights = blend
    if weights is not None:
        raise MixMoEError("parallel data takes no blend weights: give the prefixes alone in --data-path.")
    documents = ParallelDataset(prefixes, num_samples, seed=args.seed, max_length=args.seq_length, loss_on=args.loss_on)
    if torch.distributed.get_rank() == 0:
        _log_padding(args, documents)
    sampler = MegatronPretrainingSampler(
        total_samples=num_samples,
        consumed_samples=consumed,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=mpu.get_data_parallel_rank(),
        data_parallel_size=mpu.get_data_parallel_world_size(),
    )
    loader = torch.utils.data.DataLoader(
        PackedDataset(documents, num_samples, args.seq_length) if args.pack else documents,
        batch_sampler=sampler,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_collate_function(args, micro_batch_size),
    )
    return iter(loader)


def _collate_function(
    args: MegatronArgs, micro_batch_size: int
) -> Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]:
    """What makes a micro-batch of samples."""
    function, samples_of_a_row = (collate_packs, micro_batch_size) if args.pack else (collate, 1)
    return partial(
        function,
        pad_id=open_tokenizer(args.tokenizer_model, args.vocab_size).eos_id,
        pad_multiple=pad_multiple(args),
        max_length=samples_of_a_row * args.seq_length,
        pad_to_max=_pads_to_max(args),
    )


def pad_multiple(args: MegatronArgs) -> int:
    """What the width of a micro-batch is a multiple of: this layout can split it, and a GPU sees few widths."""
    tensor_parallel = args.tensor_model_parallel_size if args.sequence_parallel else 1
    context_parallel = 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1
    return math.lcm(tensor_parallel * context_parallel, GPU_WIDTHS if torch.cuda.is_available() else 1)


def _log_padding(args: MegatronArgs, documents: ParallelDataset) -> None:
    order = epoch_order(documents.lengths, 0, args.seed)
    sizes = (args.micro_batch_size, args.seq_length, pad_multiple(args))
    full, grouped, packed = padding_shares(documents.lengths, order, *sizes)
    names = ", ".join(Path(prefix).name for prefix in documents.prefixes)
    this_run = "packed" if args.pack else "all padded" if _pads_to_max(args) else "similar lengths"
    logger.info(
        f"{names}: share of padding, {documents.num_documents} documents of {documents.lengths.mean():.0f} tokens: "
        f"{full:.1%} when all are padded to {args.seq_length} tokens, {grouped:.1%} in micro-batches of "
        f"{args.micro_batch_size} of similar lengths, at most {packed:.1%} packed; this run: {this_run}"
    )
