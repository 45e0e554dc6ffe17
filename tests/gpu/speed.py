"""Checks 7 and 8: how fast the experts and a whole training step are, and whether the plan knew the memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.gpu.harness import DEVICE, ROOT, Check, NotRun, Rows

LAYERS, BATCH, LENGTH = 8, 2, 2048
STEP_RATIO = 0.8
BACKEND_RATIO = 0.6  # of torch's rate that Transformer Engine must reach at least
LAYER_SYNCS = 1  # Megatron's dispatcher brings the experts' counts to the host
#: Megatron's own: the gradient norm, its check of the loss, learning rates and steps of the optimizer's groups, and an
#: MoE layer's counts of tokens, forward and backward.
STEP_SYNCS = 16
PLAN_ERROR = 0.10


def run_layer(rows: Rows) -> None:
    """Check 7: tools/benchmark_layer.py at the cluster examples' shapes."""
    for shape in ("1b", "8b"):
        cases: list[dict[str, Any]] = []
        with rows.row(f"layer at {shape} shapes, bfloat16, runs on every backend") as facts:
            output = rows.scratch / f"{shape}.json"
            command = [sys.executable, "tools/benchmark_layer.py", "--shape", shape, "--dtype", "bfloat16"]
            command += ["--turns", "5", "--output", str(output)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
            cases = json.loads(output.read_text("utf-8"))["cases"]
            kept = ("tflops", "layer_share", "experts_share", "router_share", "floor_ratio", "host_syncs")
            for case in cases:
                facts[f"{case['backend']}, stage {case['stage']}"] = {name: case[name] for name in kept}
        for case in cases:
            with rows.row(f"{shape}, {case['backend']}, stage {case['stage']}: waits for the GPU") as facts:
                facts["host_syncs"] = case["host_syncs"]
                assert case["host_syncs"] <= LAYER_SYNCS
        speeds = {(case["backend"], case["stage"]): case["tflops"] for case in cases}
        for stage in (1, 2):
            with rows.row(f"{shape}, stage {stage}: Transformer Engine beside torch's grouped GEMM") as facts:
                if ("te", stage) not in speeds:
                    raise NotRun("Transformer Engine is not installed")
                facts["ratio"] = speeds["te", stage] / speeds["torch", stage]
                assert facts["ratio"] >= BACKEND_RATIO


def run_syncs(rows: Rows) -> None:
    """How often the host waits for the GPU in a training step, both stages, padded and packed batches."""
    import torch

    from mixmoe_megatron.conversion.hf_config import read_hf_config
    from mixmoe_megatron.megatron_patches.install import prepare_megatron
    from mixmoe_megatron.methods.registry import phase_of_stage

    if DEVICE == "cpu":
        raise NotRun("a CPU waits for nothing")
    prepare_megatron()
    from mixmoe_megatron.planning.layer_benchmark import host_syncs
    from mixmoe_megatron.training.engine_step import engine_step, random_batch

    config = read_hf_config(str(ROOT / "examples/quickstart/base"))
    for stage in (0, 1, 2):
        with rows.row(f"stage {stage}: the host waits for the GPU") as facts:
            step = engine_step(
                config, random_batch(config["vocab_size"], 4, 128), phase_of_stage(stage), "--bf16 --log-interval 1000"
            )
            for _ in range(3):
                step()
            torch.cuda.synchronize()
            places = host_syncs(step)
            facts |= {"host_syncs": places.total(), "places": dict(places)}
            ours = [place for place in places if "mixmoe_megatron" in place and "optimizer_kernels" not in place]
            assert not ours, f"this package makes the host wait at {ours}"
            assert places.total() <= STEP_SYNCS


def run_step(rows: Rows) -> None:
    """Check 8: a training step of both stages beside full fine-tuning, at Llama-3.2-1B's width, 8 layers, bfloat16."""
    from mixmoe_megatron.conversion.starts import describe_start
    from mixmoe_megatron.methods.registry import PHASES
    from mixmoe_megatron.model.options import MixMoEOptions
    from mixmoe_megatron.planning.activations import activation_bytes
    from mixmoe_megatron.planning.layouts import Batch, ParallelLayout
    from mixmoe_megatron.planning.memory import stage_memory
    from mixmoe_megatron.planning.step_benchmark import ENGINE, Task, measure_steps
    from tests.helpers.bases import BASES

    if DEVICE == "cpu":
        raise NotRun("too large for a CPU")
    config = BASES["llama3.2_1b"] | {"num_hidden_layers": LAYERS}
    (rows.scratch / "config.json").write_text(json.dumps(config), "utf-8")
    task = Task(str(rows.scratch), BATCH, LENGTH, "--bf16 --use-distributed-optimizer")
    measured: dict[str, Any] = {}
    with rows.row("a training step of each stage runs") as facts:
        measured = measure_steps(ENGINE[:3], task, 8)
        full = measured[ENGINE[0].name]
        facts |= {system.name: measured[system.name] for system in ENGINE[:3]}
    for system in ENGINE[1:3]:
        with rows.row(f"{system.name}: time under {STEP_RATIO} of full fine-tuning") as facts:
            facts["ratio"] = measured[system.name]["seconds"] / full["seconds"]
            facts["tflops"] = measured[system.name]["flops"] / measured[system.name]["seconds"] / 1e12
            assert facts["ratio"] < STEP_RATIO
    for system in ENGINE[:3]:
        with rows.row(f"{system.name}: peak memory as planned") as facts:
            model = describe_start(config, PHASES[system.phase], options=MixMoEOptions())
            batch = Batch(BATCH, BATCH, LENGTH, overlap=False)
            planned = stage_memory(model, ParallelLayout(), batch, 0)[0].total + activation_bytes(
                model, ParallelLayout(), batch, 0
            )
            facts |= {"planned_gb": planned / 1e9, "peak_gb": measured[system.name]["peak_bytes"] / 1e9}
            assert abs(facts["peak_gb"] / facts["planned_gb"] - 1) < PLAN_ERROR


CHECKS = [
    Check("syncs", "the host does not wait for the GPU within a step, but for the experts' counts", run_syncs),
    Check("experts", "experts and layer beside a dense GEMM of the same size", run_layer, alone=True),
    Check("step", "a training step beside full fine-tuning, memory beside the plan", run_step, alone=True),
]
