#!/usr/bin/env python3
"""Speed of a Mix-MoE layer, forward and backward, beside dense GEMMs of the same sizes: in this process, CPU or GPU.

For each number of experts, stage and experts' backend: the layer's time; its rate; the layer's and the experts' share
of the dense GEMMs' rate; the router's share of the time; the FLOP floor and the bytes floor, and the layer's time over
the larger of them; on a GPU, how often the host waits for it.

Example:
    OMP_NUM_THREADS=2 mixmoe benchmark-layer --shape 1b
    mixmoe benchmark-layer --shape 8b --dtype bfloat16 --backends torch te --output runs/layer.json
    mixmoe benchmark-layer --shape 1b --moe-ffn-hidden-size 512 --experts 2 8 64
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import warnings
from typing import Any

from mixmoe_megatron.cli import make_main
from mixmoe_megatron.errors import MixMoEError

SHAPES = {"1b": (2048, 8192), "8b": (4096, 14336), "14b": (5120, 13824)}  # hidden_size, ffn_hidden_size
BACKENDS = ("sequential", "torch", "te")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shape", default="1b", choices=SHAPES, help="Llama-3.2-1B, Llama-3.1-8B, Qwen2.5-14B")
    parser.add_argument("--hidden-size", type=int, help="in place of the shape's")
    parser.add_argument("--ffn-hidden-size", type=int, help="in place of the shape's")
    parser.add_argument("--experts", type=int, nargs="+", default=[4], help="experts of a group (default: 4)")
    parser.add_argument("--moe-ffn-hidden-size", type=int, help="width of an expert (default: the FFN's / experts)")
    parser.add_argument("--topk", type=int, default=1, help="experts chosen per token and group (default: 1)")
    parser.add_argument("--tokens", type=int, help="default: 2048 on a CPU, 8192 on a GPU")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default: %(default)s")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2], choices=(1, 2), help="default: both")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="default: all there are")
    parser.add_argument("--no-bias-swiglu-fusion", action="store_true", help="SwiGLU not compiled on a GPU either")
    parser.add_argument("--turns", type=int, default=5, help="turns, of which the fastest counts (default: 5)")
    parser.add_argument("--output", metavar="FILE", help="write the JSON there too")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        MixMoEError: a number is not positive, or a backend is missing or does not go with the sizes.
    """
    numbers = (args.hidden_size, args.ffn_hidden_size, args.moe_ffn_hidden_size, args.tokens, args.topk, args.turns)
    if any(number is not None and number < 1 for number in (*numbers, *args.experts)):
        raise MixMoEError("sizes, --experts, --topk, --tokens and --turns must be positive.")
    import torch

    from mixmoe_megatron.megatron_patches.cpu_mode import enable_cpu_mode

    cuda = torch.cuda.is_available()
    enable_cpu_mode()
    warnings.filterwarnings("ignore", message="full scope is deprecated")  # Megatron, of its own default
    with warnings.catch_warnings():  # Megatron's optional packages, on import
        warnings.simplefilter("ignore")
        from mixmoe_megatron.model.backends import HAVE_TE
        from mixmoe_megatron.planning.layer_benchmark import LayerCase, measure_layer, start_megatron
    from mixmoe_megatron.checkpoint.metadata import package_versions
    from mixmoe_megatron.evaluation.provenance import record_benchmark

    hidden_size = args.hidden_size or SHAPES[args.shape][0]
    start_megatron()
    columns = ("layer ms", "TFLOP/s", "of GEMM", "experts", "router", "FLOP ms", "bytes ms", "x floor", "syncs")
    print(f"{'experts':>7}{'stage':>6}  {'backend':<10}" + "".join(f"{column:>10}" for column in columns))
    rows = []
    backends = args.backends or [name for name in BACKENDS if name != "te" or HAVE_TE]
    for experts, stage, backend in itertools.product(args.experts, args.stages, backends):
        width = args.moe_ffn_hidden_size or (args.ffn_hidden_size or SHAPES[args.shape][1]) // experts
        tokens = args.tokens or (8192 if cuda else 2048)
        dtype, fused = getattr(torch, args.dtype), cuda and not args.no_bias_swiglu_fusion
        case = LayerCase(stage, backend, hidden_size, width, experts, args.topk, tokens, dtype, fused)
        row = measure_layer(case, args.turns)
        rows.append({**dataclasses.asdict(case), **row, "dtype": args.dtype})
        print(f"{experts:>7}{stage:>6}  {backend:<10}" + "".join(f"{text:>10}" for text in texts(row)), flush=True)
    print(json.dumps(record_benchmark({"cases": rows}, package_versions(), args)))


def texts(row: dict[str, Any]) -> list[str]:
    """Return the columns of one case."""
    return [
        f"{1e3 * row['layer_seconds']:.1f}",
        f"{row['tflops']:.3f}",
        *(f"{row[name]:.1%}" for name in ("layer_share", "experts_share", "router_share")),
        *(f"{1e3 * row[name]:.1f}" for name in ("flop_floor_seconds", "bytes_floor_seconds")),
        f"{row['floor_ratio']:.2f}",
        "-" if row["host_syncs"] is None else f"{row['host_syncs']}",
    ]


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
