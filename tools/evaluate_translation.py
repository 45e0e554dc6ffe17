#!/usr/bin/env python3
"""Compare Hugging Face models on translation (BLEU, chrF) and on monolingual text (perplexity, expert routing).

Example:
    mixmoe evaluate --system base=models/base --system mixmoe=models/mixmoe --baseline base \
        --test de-en=examples/data/de-en.test.tsv.gz --source-column xx --both-directions --limit 300 \
        --mono de=examples/data/mono.de.test.txt.gz --mono en=examples/data/mono.en.test.txt.gz --output-dir runs/eval
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mixmoe_megatron.cli import make_main


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    models = parser.add_argument_group("models")
    models.add_argument("--system", action="append", default=[], metavar="NAME=DIR", help="a model; repeatable")
    models.add_argument("--baseline", metavar="NAME", help="test the other systems against this one")
    models.add_argument(
        "--rival", metavar="NAME", help="test them against this one too: full fine-tuning, for instance"
    )
    models.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16, or auto (default): the fast one here"
    )
    models.add_argument(
        "--device", default="auto", help="a torch device; auto (default): the GPU if there is one, else cpu"
    )
    data = parser.add_argument_group("test data")
    data.add_argument(
        "--test",
        action="append",
        default=[],
        metavar="PAIR[@NAME]=FILE",
        help="test set: TSV, JSONL or Parquet, or sacrebleu:wmt17, or flores:DIR; repeatable",
    )
    data.add_argument("--source-column", metavar="NAME", help="in tables; default: the source language's code")
    data.add_argument("--target-column", metavar="NAME", help="in tables; default: the target language's code")
    data.add_argument("--both-directions", action="store_true", help="also translate target to source")
    data.add_argument("--mono", action="append", default=[], metavar="CODE=FILE", help="monolingual text; repeatable")
    data.add_argument("--limit", type=int, default=0, help="test segments, a seeded choice (default: 0, all)")
    data.add_argument("--mono-limit", type=int, default=0, help="lines of each monolingual file (default: 0, all)")
    data.add_argument("--seed", type=int, default=0, help="of the choice of segments (default: 0)")
    data.add_argument("--comet", default="auto", metavar="MODEL", help="name or path; off; auto: when it is here")
    decoding = parser.add_argument_group("decoding (defaults are the paper's)")
    decoding.add_argument("--decoding", choices=("beam", "greedy"), default="beam")
    decoding.add_argument("--num-beams", type=int, default=5)
    decoding.add_argument("--max-new-tokens", type=int, default=256)
    decoding.add_argument("--max-length-ratio", type=float, help="also stop at RATIO * source tokens + 16")
    decoding.add_argument("--batch-size", type=int, default=32, help="segments (default: 32)")
    decoding.add_argument("--prompt-template", type=Path, help="file with {source_language} {target_language} {source}")
    parser.add_argument("--output-dir", type=Path, required=True, help="results; an interrupted run continues there")
    parser.add_argument("--overwrite", action="store_true", help="discard results of another run found there")
    return parser


def read_directions(args: argparse.Namespace) -> list:
    """Read the test sets named on the command line, in one or both directions."""
    from mixmoe_megatron.evaluation.segments import read_test

    columns = (args.source_column, args.target_column)
    directions = [read_test(value, columns, limit=args.limit, seed=args.seed) for value in args.test]
    return directions + ([direction.reverse() for direction in directions] if args.both_directions else [])


def run(args: argparse.Namespace) -> None:
    """Evaluate and print the tables."""
    from mixmoe_megatron.data.prompts import load_template
    from mixmoe_megatron.dtypes import choose
    from mixmoe_megatron.evaluation.comet_scores import choose_comet
    from mixmoe_megatron.evaluation.generation import GenerationOptions
    from mixmoe_megatron.evaluation.segments import named_paths, read_monolingual
    from mixmoe_megatron.study.runner import EvaluationPlan, evaluate
    from mixmoe_megatron.study.tables import format_tables

    mono = named_paths(args.mono, "--mono")
    dtype, device = choose(args.dtype, args.device)
    plan = EvaluationPlan(
        systems=named_paths(args.system, "--system"),
        directions=read_directions(args),
        monolingual={
            name: read_monolingual(path, limit=args.mono_limit, seed=args.seed) for name, path in mono.items()
        },
        generation=GenerationOptions(
            args.decoding, args.num_beams, args.max_new_tokens, args.max_length_ratio, args.batch_size
        ),
        template=load_template(args.prompt_template),
        baseline=args.baseline,
        rival=args.rival,
        dtype=dtype,
        device=device,
        comet=choose_comet(args.comet) if args.test else None,
        selection={
            "test": args.test,
            "limit": args.limit,
            "monolingual": {name: str(path) for name, path in mono.items()},
            "monolingual_limit": args.mono_limit,
            "seed": args.seed,
        },
    )
    try:
        print(format_tables(evaluate(plan, args.output_dir, overwrite=args.overwrite)))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f": the same command goes on in {args.output_dir}.") from None


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
