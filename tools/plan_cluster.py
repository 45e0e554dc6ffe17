#!/usr/bin/env python3
"""List the parallel layouts with which a phase fits a cluster: memory, traffic and expected time of each, best first.

Example:
    mixmoe plan --hf-config BASE --stage 2 --gpus 64 --gpu-type A100-40G --global-batch-size 32 \
        --micro-batch-size 1 --seq-length 1024
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mixmoe_megatron.cli import make_main
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.lora import LoRAOptions
from mixmoe_megatron.methods.registry import method_of, phase_of_stage, trained_phases
from mixmoe_megatron.model.options import add_option_arguments

GPU_TYPES = ("A100-40G", "A100-80G", "H100")
OPTIONS = ("num_experts_per_group", "topk_per_group", "moe_every", "moe_layer_placement")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf-config", type=Path, required=True, help="Hugging Face directory or its config.json")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--phase", choices=list(trained_phases()), help="what is trained, as `mixmoe train` calls it")
    which.add_argument("--stage", type=int, choices=(0, 1, 2), help="0 trains all of the dense model")
    parser.add_argument("--new-blocks", type=int, metavar="P", help="llama_pro: P copies (default: a quarter as many)")
    parser.add_argument("--lora-rank", type=int, metavar="R", help="lora (default: 8)")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--gpu-type", required=True, choices=GPU_TYPES)
    parser.add_argument("--global-batch-size", type=int, required=True, help="sequences of a step")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="sequences of a forward pass (default: 1)")
    parser.add_argument("--seq-length", type=int, required=True, help="tokens")
    parser.add_argument("--recompute", choices=("none", "full"), default="none", help="of activations (default: none)")
    parser.add_argument("--grad-reduce-in-bf16", action="store_true", help="Megatron's flag; default: float32")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="joined by NVLink (default: 8)")
    parser.add_argument("--utilization", type=float, default=0.4, help="share of the peak assumed (default: 0.4)")
    add_option_arguments(parser, OPTIONS)
    parser.add_argument("--show", type=int, default=10, metavar="N", help="layouts in the table (default: 10)")
    parser.add_argument("--json", action="store_true", help="print every layout that fits as JSON instead")
    return parser


def run(args: argparse.Namespace) -> None:
    """Make the plan and print it."""
    from mixmoe_megatron.conversion.hf_config import read_hf_config
    from mixmoe_megatron.conversion.starts import describe_start
    from mixmoe_megatron.model.options import MixMoEOptions
    from mixmoe_megatron.planning.cluster_plan import plan_layouts
    from mixmoe_megatron.planning.costs import GPUS, Cluster
    from mixmoe_megatron.planning.layouts import Batch
    from mixmoe_megatron.planning.plan_report import plan_text, plan_to_dict

    for name in ("gpus", "global_batch_size", "micro_batch_size", "seq_length", "gpus_per_node", "show"):
        if getattr(args, name) < 1:
            raise MixMoEError(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}.")
    if not 0 < args.utilization <= 1:
        raise MixMoEError(f"--utilization must be above 0 and at most 1, got {args.utilization}.")
    path = args.hf_config
    config = read_hf_config(path.parent if path.name == "config.json" else path)
    given = {name: value for name, value in vars(args).items() if name in OPTIONS}
    phase = phase_of_stage(args.stage) if args.phase is None else trained_phases()[args.phase]
    lora = LoRAOptions(args.lora_rank) if args.lora_rank is not None else None
    options = MixMoEOptions.from_dict({**method_of(phase).options, **given}) if phase.groups else None
    model = describe_start(config, phase, options=options, new_blocks=args.new_blocks, lora=lora)
    batch = Batch(
        args.micro_batch_size,
        args.global_batch_size,
        args.seq_length,
        recompute=args.recompute,
        grads_in_fp32=not args.grad_reduce_in_bf16,
    )
    cluster = Cluster(GPUS[args.gpu_type], args.gpus, args.gpus_per_node, args.utilization)
    plan = plan_layouts(model, batch, cluster)
    if args.json:
        print(json.dumps(plan_to_dict(model, batch, cluster, plan), indent=2))
    else:
        print(plan_text(model, batch, cluster, plan, args.show))


main = make_main(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
