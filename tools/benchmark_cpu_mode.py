#!/usr/bin/env python3
"""Seconds of a training step on this CPU: the dense model in plain transformers, and the same model in our engine.

One process, the systems in turn, random weights, float32. A step is forward, backward, gradient clipping and AdamW; of
torch's AdamW the faster counts. Ours is Megatron's `train_step`: dense (stage 0), and Mix-MoE in stages 1 and 2.

Example:
    OMP_NUM_THREADS=1 python tools/benchmark_cpu_mode.py --output runs/benchmark.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from mixmoe_megatron.cli import run_command, setup_logging, write_json
from mixmoe_megatron.errors import MixMoEError

PLAIN = ("transformers, AdamW", "transformers, fused AdamW")
WARMUP = 2  # steps of each system that do not count
ENGINE = ("engine, dense", "engine, Mix-MoE stage 1", "engine, Mix-MoE stage 2")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf-dir", default="examples/quickstart/base", help="holds config.json (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step (default: 8)")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens a sequence (default: 256)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each system (default: 20)")
    parser.add_argument("--output", metavar="FILE", help="write the JSON there too")
    return parser


def plain_step(hf_dir: str, batch: dict[str, Any], fused: bool) -> Callable[[], Any]:
    """Return a training step of the dense model in plain transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hf_dir), dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused or None)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=batch["tokens"], labels=batch["tokens"], use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def make_steps(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return every system's training step, on one batch of random tokens.

    Raises:
        MixMoEError: a number is not positive, this machine has CUDA, or config.json is not of a supported dense model.
    """
    from mixmoe_megatron.cpu_mode import enable_cpu_mode

    if min(args.steps, args.batch_size, args.seq_length) < 1:
        raise MixMoEError("--steps, --batch-size and --seq-length must be positive.")
    if not enable_cpu_mode():
        raise MixMoEError("this machine has CUDA and no CPU mode to measure; hide the GPU: CUDA_VISIBLE_DEVICES=-1.")
    from mixmoe_megatron.conversion.hf_config import read_hf_config
    from mixmoe_megatron.training.engine_step import engine_step, random_batch

    config = read_hf_config(args.hf_dir)
    batch = random_batch(config["vocab_size"], args.batch_size, args.seq_length)
    steps = {name: plain_step(args.hf_dir, batch, fused="fused" in name) for name in PLAIN}
    return steps | {name: engine_step(config, batch, stage) for stage, name in enumerate(ENGINE)}


def measure(steps: dict[str, Callable[[], Any]], count: int) -> dict[str, dict[str, float]]:
    """Run the steps in turn; return medians and their ratios to the faster plain one, wall-clock and CPU time."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(WARMUP + count):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    medians = {name: [median(kind) for kind in zip(*rows[WARMUP:], strict=True)] for name, rows in seconds.items()}
    best, best_cpu = (min(medians[name][kind] for name in PLAIN) for kind in (0, 1))
    keys = ("seconds", "ratio", "cpu_seconds", "cpu_ratio")
    return {n: dict(zip(keys, (w, w / best, c, c / best_cpu), strict=True)) for n, (w, c) in medians.items()}


def run(args: argparse.Namespace) -> None:
    """Measure and print; what Megatron prints goes to stderr."""
    import torch

    from mixmoe_megatron.evaluation.provenance import cpu_model, git_commit, package_versions

    with contextlib.redirect_stdout(sys.stderr):
        systems = measure(make_steps(args), args.steps)
    print(f"{'system':<28}{'seconds':>9}{'ratio':>7}{'CPU s':>9}{'ratio':>7}")
    for name, row in systems.items():
        print(f"{name:<28}{row['seconds']:>9.3f}{row['ratio']:>7.2f}{row['cpu_seconds']:>9.3f}{row['cpu_ratio']:>7.2f}")
    origin = {"commit": git_commit(), "versions": package_versions(), "threads": torch.get_num_threads()}
    print(json.dumps(result := {"systems": systems, **origin, "cpu": cpu_model(), "arguments": vars(args)}))
    if args.output is not None:
        write_json(args.output, result)


def main() -> int:
    """Run the command and return its exit status."""
    args = build_parser().parse_args()
    setup_logging()
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
