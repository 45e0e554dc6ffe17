"""The benchmark of CPU mode runs on a tiny model and says what it measured. A process of its own: it patches torch."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.tiny_hf import tiny_llama_config
from tests.helpers.training import run_command


def test_benchmark_measures_every_system(tmp_path: Path) -> None:
    tiny_llama_config(rope_scaling=None).save_pretrained(tmp_path)
    output = tmp_path / "benchmark.json"
    words = ["--batch-size", "2", "--seq-length", "16", "--steps", "2"]
    done = run_command("tools/benchmark_cpu_mode.py", "--hf-dir", tmp_path, "--output", output, *words)
    result = json.loads(output.read_text("utf-8"))
    assert json.loads(done.stdout.splitlines()[-1]) == result
    systems = result["systems"]
    assert len(systems) == 5
    assert min(row["ratio"] for name, row in systems.items() if name.startswith("transformers")) == 1.0
    assert all(row["seconds"] > 0 and name in done.stdout for name, row in systems.items())
    assert result["threads"] == 1
    assert result["cpu"]
    assert {"torch", "megatron-core", "transformers"} <= result["versions"].keys()
