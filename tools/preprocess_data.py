#!/usr/bin/env python3
"""Turn text into token files for training: `mono` for stage 1, `parallel` for stage 2. See examples/data/README.md.

`blend` prints what --data-path takes to mix monolingual files: --data-path $(mixmoe preprocess blend P1 P2)
"""

from __future__ import annotations

import argparse
import sys

from mixmoe_megatron.cli import make_main


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of both kinds of data."""
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="text files: plain, gzip, xz, bzip2 or zstd"
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face tokenizer directory")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.json")
    parser.add_argument("--keep-duplicates", action="store_true", help="keep documents or pairs that came before")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    mono = commands.add_parser("mono", help="monolingual text, one document a line", allow_abbrev=False)
    add_common_arguments(mono)
    mono.add_argument("--min-tokens", type=int, default=10, metavar="N", help="keep documents of more than N tokens")
    mono.add_argument(
        "--columns",
        "--column",
        metavar="A[,B]",
        help="read TSV (with a header) or JSONL and take this column; several: their texts in turn",
    )
    mono.add_argument("--group-by", metavar="COLUMN", help="join consecutive rows of equal COLUMN to one document")
    beside = "text to train on together with pairs (`parallel`), in documents of at most N tokens; seq-length + 1"
    mono.add_argument("--beside-pairs", type=int, metavar="N", help=beside)
    mono.set_defaults(run=run_mono)

    parallel = commands.add_parser("parallel", help="translation pairs of TSV or JSONL", allow_abbrev=False)
    add_common_arguments(parallel)
    parallel.add_argument("--source-language", required=True, metavar="XX", help="language code, such as de")
    parallel.add_argument("--target-language", required=True, metavar="XX", help="language code, such as en")
    parallel.add_argument("--source-column", metavar="NAME", help="default: the source language's code")
    parallel.add_argument("--target-column", metavar="NAME", help="default: the target language's code")
    parallel.add_argument("--both-directions", action="store_true", help="write each pair in both directions")
    parallel.add_argument(
        "--min-words", type=int, default=1, metavar="N", help="least words a side (zh, ja: characters)"
    )
    parallel.add_argument("--max-words", type=int, default=200, metavar="N", help="most words a side")
    parallel.add_argument(
        "--max-tokens", type=int, metavar="N", help="drop pairs of more tokens (prompt + target + EOS); seq-length + 1"
    )
    parallel.add_argument("--prompt-template", metavar="FILE", help="default: ALMA's wording")
    parallel.set_defaults(run=run_parallel)

    blend = commands.add_parser("blend", help="weights of monolingual files by temperature", allow_abbrev=False)
    blend.add_argument("prefixes", nargs="+", metavar="P", help="output prefixes of `mono`")
    blend.add_argument("--temperature", type=float, default=1.0, metavar="T", help="weight: tokens ** (1 / T)")
    blend.set_defaults(run=run_blend)
    return parser


def run_mono(args: argparse.Namespace) -> None:
    """Build monolingual data."""
    from mixmoe_megatron.data.monolingual import MonolingualOptions, build_monolingual
    from mixmoe_megatron.data.parallel_build import build_text_beside_pairs
    from mixmoe_megatron.data.tokenizers import leave_torch_out, open_tokenizer

    leave_torch_out()
    options = MonolingualOptions(
        min_tokens=args.min_tokens,
        columns=tuple(args.columns.split(",")) if args.columns else None,
        group_by=args.group_by,
        keep_duplicates=args.keep_duplicates,
    )
    tokenizer = open_tokenizer(args.tokenizer)
    if args.beside_pairs is None:
        build_monolingual(args.input, tokenizer, args.output_prefix, options)
    else:
        build_text_beside_pairs(args.input, tokenizer, args.output_prefix, args.beside_pairs, options)


def run_parallel(args: argparse.Namespace) -> None:
    """Build parallel data."""
    from mixmoe_megatron.data.parallel_build import ParallelOptions, build_parallel
    from mixmoe_megatron.data.prompts import load_template
    from mixmoe_megatron.data.tokenizers import leave_torch_out, open_tokenizer

    leave_torch_out()
    given = {name: getattr(args, name) for name in ParallelOptions.__dataclass_fields__ if name != "template"}
    options = ParallelOptions(**given, template=load_template(args.prompt_template))
    build_parallel(args.input, open_tokenizer(args.tokenizer), args.output_prefix, options)


def run_blend(args: argparse.Namespace) -> None:
    """Print "WEIGHT P WEIGHT P ..."."""
    from mixmoe_megatron.data.monolingual import blend_weights

    weights = blend_weights(args.prefixes, args.temperature)
    print(*(f"{weight:.6f} {prefix}" for weight, prefix in zip(weights, args.prefixes, strict=True)))


def run(args: argparse.Namespace) -> None:
    """Build what the subcommand says."""
    args.run(args)


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
