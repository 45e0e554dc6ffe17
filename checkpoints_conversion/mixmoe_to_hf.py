#!/usr/bin/env python3
"""Export a Megatron checkpoint to a Hugging Face directory.

A dense checkpoint gives a plain Llama or Qwen2 model. The others give a Mix-MoE model with its modeling code
(`trust_remote_code=True`), whose routers are folded into plain linear layers. The checkpoint may have been saved under
any parallel layout; no GPU and no model is needed. OUT appears when it is complete. Under torchrun the processes share
the work; the result is the same to the byte.
"""

from __future__ import annotations

import argparse
import sys

from mixmoe_megatron.checkpoint.ranks import joined_ranks
from mixmoe_megatron.checkpoint.safetensors_io import parse_size
from mixmoe_megatron.cli import make_main
from mixmoe_megatron.conversion.hf_export import ExportRequest, prepare_export, run_export


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint-dir", required=True, help="directory with mixmoe_metadata.json")
    parser.add_argument("--output-dir", required=True, help="Hugging Face directory to make")
    parser.add_argument("--iteration", type=int, help="default: the latest")
    parser.add_argument(
        "--format",
        choices=("mixmoe", "qwen2_moe", "merged", "adapter"),
        help="of a model with experts: with code of its own, or transformers' Qwen2Moe, for one expert group without a "
        "router bias (default: as the checkpoint's method has it); of one with LoRA: merged into the base (default), "
        "or a PEFT adapter",
    )
    parser.add_argument("--dtype", choices=("keep", "fp32", "bf16"), default="keep", help="routers stay in fp32")
    parser.add_argument("--max-shard-size", default="5GB", help="of a weight file (default 5GB)")
    parser.add_argument("--base-model", help="name of the dense base model, for the model card")
    parser.add_argument("--check-finite", action="store_true", help="refuse weights with NaN or infinite values")
    parser.add_argument("--force", action="store_true", help="replace OUT if it has content")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, write nothing")
    return parser


def run(args: argparse.Namespace) -> None:
    """Write the Hugging Face directory, or say what would be written."""
    request = ExportRequest(
        checkpoint_dir=args.checkpoint_dir,
        output_dir=args.output_dir,
        iteration=args.iteration,
        format=args.format,
        dtype=args.dtype,
        max_shard_bytes=parse_size(args.max_shard_size),
        base_model=args.base_model,
        check_finite=args.check_finite,
        force=args.force,
    )
    with joined_ranks() as ranks:
        prepared = prepare_export(request)
        done = f"{prepared.metadata.phase.name} model of {len(prepared.plan)} tensors in {args.output_dir}"
        if not args.dry_run:
            run_export(prepared, ranks)
        if ranks.rank == 0:
            print(prepared.describe() if args.dry_run else done)


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
