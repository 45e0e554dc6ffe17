"""The planner: which layouts it lists, in what order, what it prints, and what it says when nothing fits."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mixmoe_megatron.conversion.starts import describe_start
from mixmoe_megatron.methods.registry import phase_of_stage
from mixmoe_megatron.model.freezing import freeze_for_phase
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.model.sizes import ModelDescription
from mixmoe_megatron.planning.activations import activation_bytes
from mixmoe_megatron.planning.cluster_plan import plan_layouts, rank_memory, usable_memory
from mixmoe_megatron.planning.costs import GPUS, Cluster, step_costs
from mixmoe_megatron.planning.layouts import Batch, ParallelLayout, layouts
from tests.helpers.bases import BASES
from tests.helpers.bases import GPUS as EXAMPLE_GPUS
from tests.helpers.megatron import (
    VOCAB_SIZE,
    initialize_megatron,
    make_config,
    make_model,
    make_options,
    model_loss,
    saved_bytes,
)

ROOT = Path(__file__).resolve().parents[2]
BATCH = Batch(micro_batch_size=1, global_batch_size=32, seq_length=1024)


def model_of(base: str, stage: int) -> ModelDescription:
    return describe_start(BASES[base], phase_of_stage(stage), options=MixMoEOptions())


def plan_cluster(tmp_path: Path, words: str, base: str = "llama3.2_1b") -> int:
    """Run the command in this process on a base's config.json."""
    spec = importlib.util.spec_from_file_location("plan_cluster", ROOT / "tools" / "plan_cluster.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "config.json").write_text(json.dumps(BASES[base]), "utf-8")
    line = f"--hf-config {tmp_path} --gpu-type A100-40G --seq-length 1024 {words}"
    status: int = module.main(shlex.split(line))
    return status


def test_all_layouts_use_all_gpus_and_split_evenly() -> None:
    found = list(layouts(model_of("llama3.1_8b", 2), BATCH, 64, 8))
    assert len(set(found)) == len(found) > 100
    for layout in found:
        assert layout.world_size == 64
        assert layout.tp <= 8
        assert layout.expert_dp * layout.etp * layout.ep * layout.pp == 64
        assert layout.micro_batches(BATCH) * layout.dp == BATCH.global_batch_size
        assert 4 % layout.ep == 0
    assert {layout.ep for layout in layouts(model_of("llama3.1_8b", 0), BATCH, 64, 8)} == {1}


def test_the_plan_fits_and_is_sorted_by_time() -> None:
    cluster = Cluster(GPUS["A100-40G"], 64)
    plan = plan_layouts(model_of("llama3.1_8b", 2), BATCH, cluster)
    assert all(candidate.memory.total <= usable_memory(cluster) for candidate in plan)
    seconds = [candidate.costs.seconds for candidate in plan]
    assert seconds == sorted(seconds)


def test_frozen_parameters_cost_their_weight_alone() -> None:
    """8 ranks of a 1B model: stage 2 trains the MT experts and routers of 4 layers, stage 0 all."""
    layout, sizes = ParallelLayout(dp=8), model_of("llama3.2_1b", 2).sizes
    trained = 4 * (3 * sizes.hidden_size * sizes.ffn_hidden_size + 4 * (2 * sizes.hidden_size + 1))
    stage2 = rank_memory(model_of("llama3.2_1b", 2), layout, BATCH)
    assert trained * 4 <= stage2.gradients < trained * 4 * 1.001
    assert trained * 12 / 8 <= stage2.optimizer < trained * 12 / 8 * 1.01
    dense = rank_memory(model_of("llama3.2_1b", 0), layout, BATCH)
    assert dense.gradients == pytest.approx(1_235_814_400 * 4, rel=1e-4)
    assert dense.activations > stage2.activations
    bf16 = rank_memory(model_of("llama3.2_1b", 2), layout, replace(BATCH, grads_in_fp32=False))
    assert 2 * bf16.gradients == stage2.gradients


def test_traffic_appears_with_its_kind_of_parallelism() -> None:
    model, cluster = model_of("llama3.1_8b", 2), Cluster(GPUS["A100-40G"], 8)
    cases = {
        "TP": ParallelLayout(tp=8, etp=8),
        "PP": ParallelLayout(pp=8),
        "CP": ParallelLayout(cp=8),
        "DP": ParallelLayout(dp=8),
    }
    for kind, layout in cases.items():
        traffic = step_costs(model, layout, BATCH, cluster).traffic
        assert traffic[kind] > 0
        assert all(traffic[other] == 0 for other in cases if other != kind and {kind, other} != {"CP", "DP"})
    one_dispatch = 32 * 1024 // 8 * 2 * 4096 * 2 * 3 / 4  # tokens of a rank, two groups, bfloat16, three of four ranks
    passes = 3 + 7 * 4  # the first of 8 Mix-MoE layers sends no gradient of its tokens back
    assert step_costs(model, ParallelLayout(dp=8, ep=4), BATCH, cluster).traffic["EP"] == passes * one_dispatch


def test_recomputation_trades_memory_for_time() -> None:
    model, cluster, layout = model_of("llama3.1_8b", 1), Cluster(GPUS["A100-40G"], 8), ParallelLayout(tp=2, dp=4, ep=4)
    full = replace(BATCH, recompute="full")
    assert activation_bytes(model, layout, full, 0) < activation_bytes(model, layout, BATCH, 0)
    assert step_costs(model, layout, full, cluster).compute > step_costs(model, layout, BATCH, cluster).compute


@pytest.mark.parametrize(("stage", "shared"), [(0, 0), (1, 0), (1, 4), (2, 0)])
def test_activations_are_near_what_autograd_saves(stage: int, shared: int) -> None:
    """The formula counts fused kernels; the torch modules here keep up to half as much again."""
    initialize_megatron()
    options = make_options(moe_every=2, shared_experts=shared)
    sizes: dict[str, Any] = {"num_layers": 6, "hidden_size": 64, "ffn_hidden_size": 256, "kv_channels": 16}
    module = freeze_for_phase(make_model(make_config(options, stage, **sizes)), phase_of_stage(stage))
    assert isinstance(module, torch.nn.Module)
    saved = saved_bytes(module, lambda: model_loss(module, 4, 32))
    args = {
        **sizes, "num_attention_heads": 4, "num_query_groups": 2, "vocab_size": VOCAB_SIZE, "add_qkv_bias": False,
        "make_vocab_size_divisible_by": 1, "untie_embeddings_and_output_weights": False, "init_method_std": 0.02,
    }  # fmt: skip
    model = ModelDescription({}, args, options if stage else None, phase_of_stage(stage))
    estimate = activation_bytes(model, ParallelLayout(), Batch(4, 4, 32, dtype="fp32"), 0)
    assert 0.6 < estimate / saved < 1.1


def test_the_command_prints_a_table_and_the_lines_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_cluster(tmp_path, "--stage 2 --gpus 16 --global-batch-size 32 --show 3") == 0
    output = capsys.readouterr().out
    assert len(re.findall(r"^(?:\w+ )*DP\d+ ", output, re.MULTILINE)) == 3
    assert "torchrun --nnodes=2" in output
    assert "sbatch --nodes=2" in output
    assert "estimate" in output and "exact" in output
    assert "1,437.3 million parameters; 1,135.3 of them work on a token, 201.4 are trained in stage2." in output


def test_json_holds_the_same_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_cluster(tmp_path, "--stage 1 --gpus 8 --global-batch-size 32 --json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"]["total"] > plan["parameters"]["active"] > 5 * plan["parameters"]["trained"] > 10**9
    cluster = Cluster(GPUS["A100-40G"], 8)
    expected = plan_layouts(model_of("llama3.2_1b", 1), BATCH, cluster)
    assert [entry["layout"] for entry in plan["layouts"]] == [candidate.to_dict()["layout"] for candidate in expected]
    best = plan["layouts"][0]
    assert best["memory_bytes"] == expected[0].to_dict()["memory_bytes"]
    assert shlex.join(best["flags"]) in best["torchrun"]


@pytest.mark.parametrize(
    ("words", "base", "says"),
    [
        ("--stage 0 --gpus 1 --global-batch-size 8", "llama3.1_8b", r"nothing fits: .* GiB .* would do"),
        (
            "--stage 2 --gpus 1 --global-batch-size 64 --micro-batch-size 64",
            "llama3.2_1b",
            "--micro-batch-size 1 would",
        ),
        ("--stage 1 --gpus 7 --global-batch-size 32", "llama3.2_1b", "divides .* 4 GPUs would do"),
        ("--stage 1 --gpus 8 --global-batch-size 30 --micro-batch-size 4", "llama3.2_1b", "not divisible"),
        ("--stage 1 --gpus 0 --global-batch-size 30", "llama3.2_1b", "--gpus must be positive"),
        ("--stage 1 --gpus 8 --global-batch-size 32 --utilization 2", "llama3.2_1b", "--utilization"),
        ("--stage 1 --gpus 8 --global-batch-size 32 --num-experts-per-group 3", "llama3.2_1b", "not divisible"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, base: str, says: str
) -> None:
    assert plan_cluster(tmp_path, words, base) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(says, error), error


@pytest.mark.parametrize("name", BASES)
def test_the_examples_quote_their_plan(name: str) -> None:
    """The tables in the examples' READMEs are the planner's figures for their layouts."""
    text = (ROOT / "examples" / name / "README.md").read_text("utf-8")
    script = (ROOT / "examples" / name / "run.sh").read_text("utf-8")
    (stated,) = re.findall(r"layout ([A-Z0-9 ]+):", text)
    sizes = {part.rstrip("0123456789").lower(): int(re.sub(r"\D", "", part)) for part in stated.split()}
    layout = ParallelLayout(**sizes)
    (flags,) = re.findall('LAYOUT="([^"]*)"', script)
    assert sorted(flags.split()) == sorted(layout.flags())
    assert layout.world_size == EXAMPLE_GPUS[name]
    for stage, sequences, length in ((1, 64, 2048), (2, 32, 1024)):
        micro = int(re.findall(rf"STAGE{stage}_MICRO_BATCH=(\d+)", script)[0])
        memory = rank_memory(model_of(name, stage), layout, Batch(micro, sequences, length))
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
        assert f"| {stage} | " + " | ".join(f"{part / 1024**3:.2f}" for part in parts) + " |" in text
