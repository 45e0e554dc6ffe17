#!/usr/bin/env python3
"""Tokens a second of greedy generation: exported Mix-MoE models of both stages beside their dense base.

Random weights, batches of equal prompts, in this process on its CPU or GPU; the models take turns.

Example:
    OMP_NUM_THREADS=2 mixmoe benchmark-generation --hf-dir SmolLM2-135M --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import sys

from mixmoe_megatron.cli import make_main
from mixmoe_megatron.errors import MixMoEError


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf-dir", default="examples/quickstart/base", help="holds config.json (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences at a time (default: 16)")
    parser.add_argument("--prompt-length", type=int, default=32, help="tokens of a prompt (default: 32)")
    parser.add_argument("--new-tokens", type=int, default=32, help="generated for each prompt (default: 32)")
    parser.add_argument("--turns", type=int, default=5, help="turns, of which the fastest counts (default: 5)")
    parser.add_argument("--output", metavar="FILE", help="write the JSON there too")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        MixMoEError: a number is not positive, or config.json is not of a supported dense model.
    """
    if min(args.batch_size, args.prompt_length, args.new_tokens, args.turns) < 1:
        raise MixMoEError("--batch-size, --prompt-length, --new-tokens and --turns must be positive.")
    import torch

    from mixmoe_megatron.checkpoint.metadata import package_versions
    from mixmoe_megatron.conversion.hf_config import megatron_args_from_hf, read_hf_config
    from mixmoe_megatron.evaluation.provenance import record_benchmark
    from mixmoe_megatron.planning.generation_benchmark import build_models, measure_generation

    megatron_args_from_hf(read_hf_config(args.hf_dir))  # refuses what is not supported
    models = build_models(args.hf_dir, getattr(torch, args.dtype))
    rates = measure_generation(models, args.batch_size, args.prompt_length, args.new_tokens, args.turns)
    print(f"{'model':<10}{'tokens/s':>10}{'of dense':>10}")
    for name, rate in rates.items():
        print(f"{name:<10}{rate:>10.1f}{rate / rates['dense']:>10.3f}")
    print(json.dumps(record_benchmark({"tokens_per_second": rates}, package_versions(), args)))


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
