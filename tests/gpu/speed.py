"""Checks 7 and 8: how fast the experts and a whole training step are, and whether the plan knew the memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.gpu.harness import DEVICE, ROOT, Check, NotRun, Rows

LAYERS, BATCH, LENGTH = 8, 2, 2048
STEP_RATIO = 0.8
PLAN_ERROR = 0.10


def run_layer(rows: Rows) -> None:
    """Check 7: tools/benchmark_layer.py at the cluster examples' shapes."""
    for model in ("1b", "8b"):
        with rows.row(f"experts and layer at {model} shapes, bfloat16") as facts:
            output = rows.scratch / f"{model}.json"
            command = [
                sys.executable,
                "tools/benchmark_layer.py",
                "--model",
                model,
                "--dtype",
                "bfloat16",
                "--output",
                output,
            ]
            done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
            facts |= json.loads(output.read_text("utf-8"))


def run_step(rows: Rows) -> None:
    """Check 8: a training step of both stages beside full fine-tuning, at Llama-3.2-1B's width, 8 layers, bfloat16."""
    from mixmoe_megatron.conversion.hf_config import megatron_args_from_hf
    from mixmoe_megatron.options import MixMoEOptions
    from mixmoe_megatron.planning.activations import activation_bytes
    from mixmoe_megatron.planning.layouts import Batch, Layout, Model
    from mixmoe_megatron.planning.memory import stage_memory
    from mixmoe_megatron.training.step_benchmark import ENGINE, Task, measure
    from tests.helpers.bases import BASES

    if DEVICE == "cpu":
        raise NotRun("too large for a CPU")
    config = BASES["llama3.2_1b"] | {"num_hidden_layers": LAYERS}
    (rows.scratch / "config.json").write_text(json.dumps(config), "utf-8")
    task = Task(str(rows.scratch), BATCH, LENGTH, "--bf16 --use-distributed-optimizer")
    measured: dict[str, Any] = {}
    with rows.row("a training step of each stage runs") as facts:
        measured = measure(ENGINE[:3], task, 8)
        full = measured[ENGINE[0].name]
        facts |= {system.name: measured[system.name] for system in ENGINE[:3]}
    for system in ENGINE[1:3]:
        with rows.row(f"{system.name}: time under {STEP_RATIO} of full fine-tuning") as facts:
            facts["ratio"] = measured[system.name]["seconds"] / full["seconds"]
            facts["tflops"] = measured[system.name]["flops"] / measured[system.name]["seconds"] / 1e12
            assert facts["ratio"] < STEP_RATIO
    for system in ENGINE[:3]:
        with rows.row(f"{system.name}: peak memory as planned") as facts:
            model = Model(megatron_args_from_hf(config), MixMoEOptions(), system.stage)
            batch = Batch(BATCH, BATCH, LENGTH, overlap=False)
            planned = stage_memory(model, Layout(), batch, 0)[0].total + activation_bytes(model, Layout(), batch, 0)
            facts |= {"planned_gb": planned / 1e9, "peak_gb": measured[system.name]["peak_bytes"] / 1e9}
            assert abs(facts["peak_gb"] / facts["planned_gb"] - 1) < PLAN_ERROR


CHECKS = [
    Check("experts", "experts and layer beside a dense GEMM of the same size", run_layer, alone=True),
    Check("step", "a training step beside full fine-tuning, memory beside the plan", run_step, alone=True),
]
