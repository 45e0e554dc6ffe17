#!/usr/bin/env python3
"""Seconds of a training step on this CPU: the dense model in plain transformers, and the same model in our engine.

One process, the systems in turn, random weights, float32. A step is forward, backward, gradient clipping and AdamW;
plain transformers runs with each AdamW of torch, and the faster one counts. Ours is Megatron's own `train_step` on a
model made as for `tools/pretrain_mixmoe.py`: dense (stage 0), and Mix-MoE in stages 1 and 2.

Example:
    OMP_NUM_THREADS=1 python tools/benchmark_cpu_mode.py --output-dir runs/benchmark
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixmoe_megatron.cli import run_command, setup_logging, write_json

REFERENCE = "transformers"
QUICKSTART_BASE = Path(__file__).resolve().parents[1] / "examples" / "quickstart" / "base"
Step = Callable[[], Any]


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf-dir", type=Path, default=QUICKSTART_BASE, help="holds a config.json (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step (default: 8)")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens a sequence (default: 256)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each system (default: 20)")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each system that are not counted (default: 3)")
    parser.add_argument("--moe-every", type=int, default=4, help="one Mix-MoE layer in so many (default: 4)")
    parser.add_argument("--output-dir", type=Path, help="write benchmark.json there")
    return parser


def transformers_steps(config: Any, tokens: Any, labels: Any) -> dict[str, Step]:
    """The dense model in plain transformers, once for each AdamW of torch."""
    import torch
    from transformers import AutoModelForCausalLM

    def make(fused: bool) -> Step:
        model = AutoModelForCausalLM.from_config(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused or None)

        def step() -> None:
            optimizer.zero_grad()
            model(input_ids=tokens, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return step

    return {f"{REFERENCE} AdamW": make(False), f"{REFERENCE} fused AdamW": make(True)}


def run(args: argparse.Namespace) -> None:
    """Measure, print the table and write the numbers."""
    from mixmoe_megatron.training.benchmark import engine_step, start_engine

    ...


def main() -> int:
    """Run the command and return its exit status."""
    args = build_parser().parse_args()
    setup_logging()
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
