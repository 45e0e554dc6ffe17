#!/usr/bin/env python3
"""Make a Megatron checkpoint from a Hugging Face directory.

  mixmoe hf-to-megatron --hf-dir BASE --output-dir DIR            upcycle a dense model: LM experts are slices of FFNs
  mixmoe hf-to-megatron --hf-dir BASE --output-dir DIR --dense    keep it dense, for full fine-tuning
  mixmoe hf-to-megatron --hf-dir BASE --output-dir DIR --method NAME    start another method, such as lora
  mixmoe hf-to-megatron --hf-dir EXPORT --output-dir DIR          take back a model that `mixmoe to-hf` exported

Reads safetensors only. DIR appears when it is complete. Under torchrun the processes share the work; the result is the
same to the byte.
"""

from __future__ import annotations

import argparse
import sys

from mixmoe_megatron.checkpoint.ranks import joined_ranks
from mixmoe_megatron.cli import make_main
from mixmoe_megatron.conversion.hf_config import read_hf_config
from mixmoe_megatron.conversion.hf_import import ImportRequest, prepare_import
from mixmoe_megatron.conversion.import_arguments import (
    EXPORTS,
    lora_from_arguments,
    method_from_arguments,
    options_from_arguments,
)
from mixmoe_megatron.conversion.measured_start import measure_start
from mixmoe_megatron.conversion.prepared import write_checkpoint
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.registry import METHODS
from mixmoe_megatron.model.options import add_option_arguments


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser; one flag for each Mix-MoE option, defaults from the preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-dir", required=True, help="directory with config.json and safetensors weights")
    parser.add_argument("--output-dir", required=True, help="checkpoint directory to make")
    parser.add_argument(
        "--method",
        choices=list(METHODS),
        help="; ".join(f"{method.name}: {method.meaning}" for method in METHODS.values()) + " (default mixmoe)",
    )
    parser.add_argument("--dense", action="store_true", help="keep a dense model dense: --method full")
    parser.add_argument("--new-blocks", type=int, metavar="P", help="llama_pro: P copies (default: a quarter as many)")
    parser.add_argument("--lora-rank", type=int, metavar="R", help="lora: rows of A and columns of B (default: 8)")
    parser.add_argument("--lora-alpha", type=float, metavar="X", help="lora: B A x counts X / R times (default: 2 R)")
    parser.add_argument("--adapter", metavar="DIR", help="lora: take the matrices of this PEFT adapter of --hf-dir")
    parser.add_argument("--seed", type=int, default=1234, help="of new routers and LoRA matrices (default 1234)")
    parser.add_argument(
        "--dtype",
        choices=("keep", "fp32", "bf16"),
        default="keep",
        help="of weights other than routers (default keep)",
    )
    parser.add_argument("--make-vocab-size-divisible-by", type=int, help="pad the vocabulary with zero rows")
    parser.add_argument("--check-finite", action="store_true", help="refuse weights with NaN or infinite values")
    parser.add_argument("--force", action="store_true", help="replace DIR if it has content")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, write nothing")
    parser.add_argument(
        "--preset", choices=("recommended", "paper"), help="the Mix-MoE options to start from (default recommended)"
    )
    parser.add_argument(
        "--measure",
        nargs="+",
        metavar="FILE",
        help="text, one a line: print what upcycling costs on it; MoE layers and neurons are chosen by it unless "
        "--expert-init, --moe-layer-placement or --preset say otherwise",
    )
    add_option_arguments(parser.add_argument_group("Mix-MoE options, over those of the preset"))
    return parser


def run(args: argparse.Namespace) -> None:
    """Write the Megatron checkpoint, or say what would be written.

    Raises:
        MixMoEError: the model, or what is asked for, is not supported.
    """
    if args.make_vocab_size_divisible_by is not None and args.make_vocab_size_divisible_by < 1:
        raise MixMoEError("--make-vocab-size-divisible-by must be positive.")
    config, method = read_hf_config(args.hf_dir), method_from_arguments(args)
    request = ImportRequest(
        hf_dir=args.hf_dir,
        output_dir=args.output_dir,
        options=options_from_arguments(args, method, config.get("model_type") in EXPORTS),
        method=method.name,
        new_blocks=args.new_blocks,
        lora=lora_from_arguments(args),
        adapter=args.adapter,
        seed=args.seed,
        dtype=args.dtype,
        make_vocab_size_divisible_by=args.make_vocab_size_divisible_by,
        check_finite=args.check_finite,
        force=args.force,
        config=config,
    )
    with joined_ranks() as ranks:
        if args.measure:
            found = ranks.on_first(lambda: measure_start(request, args.measure))
            request = found.request
            if ranks.rank == 0:
                print(found.table)
                if found.caveat:
                    print(found.caveat)
        prepared = prepare_import(request)
        done = f"{prepared.metadata.phase.name} checkpoint of {len(prepared.plan)} tensors in {args.output_dir}"
        if not args.dry_run:
            write_checkpoint(prepared, ranks)
        if ranks.rank == 0:
            print(prepared.describe() if args.dry_run else done)


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
