#!/usr/bin/env python3
"""Time and peak memory of a training step: Mix-MoE stages 1 and 2, and full fine-tuning of the same dense base.

All run in this package's engine, random weights, side by side. Next to them: the least operations that each step has
to do; both stages with a graph from the bottom in place of the graph-free frozen layers; and, without CUDA, the dense
model in plain transformers (float32, the faster of torch's AdamWs counts), which shows what CPU mode costs. With
--loss-share full fine-tuning and stage 2 alone, on pairs whose targets alone carry loss, beside logits of all rows.

Example:
    OMP_NUM_THREADS=1 mixmoe benchmark-step --output runs/benchmark.json
    mixmoe benchmark-step --hf-dir Llama-3.2-1B --batch-size 4 --seq-length 2048 --flags=--bf16
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
    parser.add_argument(
        "--phases", nargs="+", default=[], metavar="PHASE", help="also the steps of these, such as lora and llama_pro"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step (default: 8)")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens a sequence (default: 256)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each system (default: 20)")
    parser.add_argument(
        "--loss-share", type=float, default=1.0, help="share of a pair's tokens that carry loss (default: 1)"
    )
    parser.add_argument("--flags", default="", help="more flags of the training command, in one word")
    parser.add_argument("--output", metavar="FILE", help="write the JSON there too")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure and print; what Megatron prints goes to stderr.

    Raises:
        MixMoEError: a number is not positive, --loss-share is above 1, or config.json is not of a supported dense
            model.
    """
    if min(args.steps, args.batch_size, args.seq_length) < 1:
        raise MixMoEError("--steps, --batch-size and --seq-length must be positive.")
    if not 0 < args.loss_share <= 1:
        raise MixMoEError("--loss-share must be above 0 and at most 1.")
    import torch

    from mixmoe_megatron.conversion.hf_config import megatron_args_from_hf, read_hf_config
    from mixmoe_megatron.evaluation.provenance import evaluation_versions, record_benchmark
    from mixmoe_megatron.methods.registry import trained_phases
    from mixmoe_megatron.planning.step_benchmark import ENGINE, LOGITS, PLAIN, System, Task, measure_steps

    megatron_args_from_hf(read_hf_config(args.hf_dir))  # refuses what is not supported before any process starts
    if unknown := sorted(set(args.phases) - set(trained_phases())):
        raise MixMoEError(f"--phases: {unknown[0]} is none of {', '.join(trained_phases())}.")
    others = tuple(System(phase, phase) for phase in args.phases)
    cuda = torch.cuda.is_available()
    systems = measure_steps(
        (LOGITS if args.loss_share < 1 else ENGINE if cuda else PLAIN + ENGINE) + others,
        Task(args.hf_dir, args.batch_size, args.seq_length, args.flags, args.loss_share),
        args.steps,
    )
    full = systems[ENGINE[0].name]
    print(
        f"{'system':<32}{'seconds':>9}{'ratio':>7}{'peak MB':>9}{'ratio':>7}{'GFLOP':>9}{'ratio':>7}"
        f"{'trained':>9}{'active':>9}{'all, M':>9}"
    )
    for name, row in systems.items():
        columns = zip(("seconds", "peak_bytes", "flops"), (1.0, 1e6, 1e9), (3, 1, 1), strict=True)
        texts = [f"{row[key] / unit:>9.{digits}f}{row[key] / full[key]:>7.2f}" for key, unit, digits in columns]
        millions = [f"{row[key] / 1e6:>9.2f}" for key in ("trained", "active", "parameters")]
        print(f"{name:<32}" + "".join([*texts, *millions]))
    print(json.dumps(record_benchmark({"systems": systems}, evaluation_versions(), args)))


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
