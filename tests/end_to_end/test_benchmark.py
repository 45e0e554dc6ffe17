"""The benchmarks of a step, of a layer and of generation run on tiny models and say what they measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mixmoe_megatron.planning.layer_benchmark import LayerCase
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


def test_benchmark_of_logits_of_some_rows(tmp_path: Path) -> None:
    tiny_llama_config(rope_scaling=None).save_pretrained(tmp_path)
    words = ["--hf-dir", tmp_path, "--batch-size", "2", "--seq-length", "16", "--steps", "1", "--loss-share"]
    done = run_command("tools/benchmark_step.py", *words, "0.25")
    flops = {name: row["flops"] for name, row in json.loads(done.stdout.splitlines()[-1])["systems"].items()}
    assert len(flops) == 4
    assert flops["engine, stage 2"] < flops["stage 2, logits of all rows"]
    assert flops["engine, dense, all trained"] < flops["dense, logits of all rows"]
    done = run_command("tools/benchmark_step.py", *words, "1.5", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "--loss-share must be" in done.stderr


def test_benchmark_of_a_layer(tmp_path: Path) -> None:
    output = tmp_path / "layer.json"
    words = ["--hidden-size", "32", "--ffn-hidden-size", "64", "--experts", "2", "4", "--tokens", "16", "--turns", "1"]
    done = run_command("tools/benchmark_layer.py", *words, "--dtype", "bfloat16", "--output", output)
    result = json.loads(output.read_text("utf-8"))
    assert json.loads(done.stdout.splitlines()[-1]) == result
    cases = result["cases"]
    assert [(case["experts"], case["expert_size"]) for case in cases] == [(2, 32)] * 4 + [(4, 16)] * 4
    assert [case["stage"] for case in cases] == [1, 1, 2, 2] * 2
    assert [case["backend"] for case in cases] == ["sequential", "torch"] * 4
    assert len(done.stdout.splitlines()) == 1 + len(cases) + 1
    for case in cases:
        # forward, input gradient and, of one group, weight gradient of three [32, expert_size] products
        assert case["tflops"] * case["layer_seconds"] * 1e12 == pytest.approx(
            (3 if case["stage"] == 1 else 5) * 2 * 3 * 16 * 32 * case["expert_size"]
        )
        assert case["layer_share"] == pytest.approx(case["tflops"] / case["peak_tflops"])
        floor = max(case["flop_floor_seconds"], case["bytes_floor_seconds"])
        assert case["floor_ratio"] == pytest.approx(case["layer_seconds"] / floor)
        assert case["experts_seconds"] > 0 and case["router_seconds"] > 0 and case["host_syncs"] is None


def test_a_layer_counts_the_bytes_of_experts_with_rows() -> None:
    case = LayerCase(2, "sequential", 32, 16, experts=4, topk=1, tokens=8, dtype=torch.bfloat16)
    assert case.bytes(active=5) == (5 * 2 * 3 * 32 * 16 * 2, 4 * 3 * 32 * 16 * 2)


def test_what_a_layer_cannot_be(tmp_path: Path) -> None:
    done = run_command("tools/benchmark_layer.py", "--tokens", "0", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "must be positive" in done.stderr


def test_benchmark_of_generation(tmp_path: Path) -> None:
    tiny_llama_config(rope_scaling=None).save_pretrained(tmp_path)
    output = tmp_path / "generation.json"
    words = ["--hf-dir", tmp_path, "--batch-size", "2", "--prompt-length", "3", "--new-tokens", "2", "--turns", "1"]
    done = run_command("tools/benchmark_generation.py", *words, "--dtype", "bfloat16", "--output", output)
    result = json.loads(output.read_text("utf-8"))
    assert json.loads(done.stdout.splitlines()[-1]) == result
    assert list(result["tokens_per_second"]) == ["dense", "stage 1", "stage 2"]
    assert min(result["tokens_per_second"].values()) > 0
    assert [line.split()[0] for line in done.stdout.splitlines()[1:4]] == ["dense", "stage", "stage"]
