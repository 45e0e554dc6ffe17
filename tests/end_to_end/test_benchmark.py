"""The benchmark of a training step runs on a tiny model and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.tiny_hf import tiny_llama_config
from tests.helpers.training import run_command


def test_benchmark_measures_every_system(tmp_path: Path) -> None:
    tiny_llama_config(rope_scaling=None).save_pretrained(tmp_path)
    output = tmp_path / "benchmark.json"
    words = ["--batch-size", "2", "--seq-length", "16", "--steps", "2"]
    done = run_command("tools/benchmark_step.py", "--hf-dir", tmp_path, "--output", output, *words)
    result = json.loads(output.read_text("utf-8"))
    assert json.loads(done.stdout.splitlines()[-1]) == result
    systems = result["systems"]
    assert len(systems) == 7
    assert done.stdout.startswith("system ")
    for name, row in systems.items():
        assert name in done.stdout
        assert row["seconds"] > 0 and row["cpu_seconds"] > 0
        assert row["peak_bytes"] > 0
    flops = {name: row["flops"] for name, row in systems.items()}
    assert flops["engine, stage 1"] < flops["engine, stage 2"]
    assert flops["engine, dense, all trained"] == flops["transformers, AdamW"]
    assert result["threads"] == 1
    assert result["device"] and "tools/benchmark_step.py" in result["command"][0]
    assert {"torch", "megatron-core", "transformers"} <= result["versions"].keys()
