"""The cluster examples: every command passes its real parser, and the ranks of the clusters they ask for build.

Each training command goes through Megatron's parser and validation at its own world size, on Megatron's fake process
group; the model, DDP and the distributed optimizer of a rank are built on the meta device. The flags are the example's
own and those of a CUDA machine without Transformer Engine, whose modules are this package's torch ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shlex
import shutil
import subprocess
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mixmoe_megatron.checkpoint.metadata import Metadata, write_metadata
from mixmoe_megatron.conversion.hf_config import megatron_args_from_hf
from mixmoe_megatron.conversion.starts import describe_start
from mixmoe_megatron.methods.registry import PHASES, phase_of_stage
from mixmoe_megatron.model.options import MixMoEOptions
from mixmoe_megatron.model.sizes import ModelDescription
from mixmoe_megatron.planning.layouts import Batch, ParallelLayout
from mixmoe_megatron.planning.memory import stage_memory
from mixmoe_megatron.planning.parameters import rank_parameters
from tests.helpers.bases import BASES, GPUS, PARAMETERS
from tests.helpers.cuda_machine import become, h100
from tests.helpers.forked import ROOT, run_job
from tests.helpers.tiny_hf import SENTENCES, tiny_tokenizer

LANGUAGES = ("cs", "de", "ru", "tr", "zh", "fi", "et")
#: Further layouts of the examples' models, put behind an example's own flags.
OTHER_LAYOUTS = {
    "llama3.2_1b": ParallelLayout(pp=4, dp=2, ep=2),
    "llama3.1_8b": ParallelLayout(tp=2, pp=4, dp=8, ep=2, etp=2),
    "qwen2.5_14b": ParallelLayout(tp=4, pp=2, cp=2, dp=8, ep=4),
}
Words = list[str]


def script(path: str) -> Any:
    """Import a command of this repository."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny texts under the names that tools/prepare_data.py gives, and a tokenizer."""
    directory = tmp_path_factory.mktemp("corpora")
    tiny_tokenizer(directory / "tokenizer")
    for language in (*LANGUAGES, "en"):
        (directory / f"mono.{language}.train.txt.gz").write_text("\n".join(SENTENCES) + "\n", "utf-8")
    for language in LANGUAGES:
        pairs = zip(SENTENCES[1:], SENTENCES[:-1], strict=True)
        rows = [f"{language}\ten", *(f"{a} {n}\t{b}".replace("\n", " ") for n, (a, b) in enumerate(pairs))]
        (directory / f"{language}-en.train.tsv.gz").write_text("\n".join(rows) + "\n", "utf-8")
    return directory


SMALLEST, *LARGER = BASES


@pytest.fixture(scope="module", params=[SMALLEST, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER)])
def example(request: pytest.FixtureRequest, corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An example's printed commands by script, its token files made by them, its checkpoints' metadata."""
    name = request.param
    out = tmp_path_factory.mktemp(name)
    environment = {**os.environ, "PRINT": "1", "BASE": "base", "DATA": str(corpora), "OUT": str(out)}
    done = subprocess.run(
        ["bash", f"examples/{name}/run.sh"], cwd=ROOT, env=environment, text=True, capture_output=True, check=True
    )
    commands: dict[str, list[Words]] = {}
    for line in done.stdout.splitlines():
        words = shlex.split(line)
        if path := next((word for word in words if word.endswith(".py")), None):
            commands.setdefault(path, []).append(words)
    for stage, directory in (("upcycled", "upcycled"), ("stage1", "stage1")):
        (out / directory).mkdir()
        shutil.copytree(corpora / "tokenizer", out / directory / "tokenizer")
        hf_config = BASES[name]
        metadata = Metadata(PHASES[stage], MixMoEOptions().to_dict(), megatron_args_from_hf(hf_config), hf_config)
        write_metadata(out / directory, metadata)
    (out / "data").mkdir()
    preprocess = script("tools/preprocess_data.py")
    for words in commands["tools/preprocess_data.py"]:
        assert preprocess.main(arguments(words, "tools/preprocess_data.py")) == 0
    return {"name": name, "commands": commands, "out": out}


def arguments(words: Words, path: str) -> Words:
    """What a command line gives to its script."""
    return words[words.index(path) + 1 :]


def test_conversion_commands_parse_and_follow_on_each_other(example: dict[str, Any]) -> None:
    commands, out = example["commands"], example["out"]
    (convert,) = commands["checkpoints_conversion/hf_to_mixmoe.py"]
    (export,) = commands["checkpoints_conversion/mixmoe_to_hf.py"]
    parsed = script(convert[1]).build_parser().parse_args(convert[2:])
    assert (parsed.hf_dir, Path(parsed.output_dir)) == ("base", out / "upcycled")
    assert Path(script(export[1]).build_parser().parse_args(export[2:]).checkpoint_dir) == out / "stage2"
    assert list(commands) == [
        "checkpoints_conversion/hf_to_mixmoe.py", "tools/preprocess_data.py", "tools/pretrain_mixmoe.py",
        "checkpoints_conversion/mixmoe_to_hf.py",
    ]  # fmt: skip
    for stage, parent in ((1, "upcycled"), (2, "stage1")):
        flags = training_flags(example, stage)
        assert (flags.mixmoe_stage, flags.init_from, flags.save) == (
            stage,
            str(out / parent),
            str(out / f"stage{stage}"),
        )
        assert flags.nnodes * flags.nproc_per_node == GPUS[example["name"]]


def training_flags(example: dict[str, Any], stage: int, more: Words | None = None) -> argparse.Namespace:
    """The flags of a stage's command, launcher's included, that this test must know."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("mixmoe-stage", "nnodes", "nproc-per-node", "micro-batch-size", "global-batch-size", "seq-length"):
        parser.add_argument(f"--{flag}", type=int)
    for flag in ("tensor-model-parallel", "pipeline-model-parallel", "context-parallel", "expert-model-parallel"):
        parser.add_argument(f"--{flag}-size", type=int, default=1)
    parser.add_argument("--expert-tensor-parallel-size", type=int, default=1)
    parser.add_argument("--init-from")
    parser.add_argument("--save")
    return parser.parse_known_args([*training_words(example, stage), *(more or [])])[0]


def training_words(example: dict[str, Any], stage: int) -> Words:
    return example["commands"]["tools/pretrain_mixmoe.py"][stage - 1]


def layout_of(flags: argparse.Namespace, gpus: int) -> ParallelLayout:
    tp, pp, cp = flags.tensor_model_parallel_size, flags.pipeline_model_parallel_size, flags.context_parallel_size
    ep, etp = flags.expert_model_parallel_size, flags.expert_tensor_parallel_size
    return ParallelLayout(tp, pp, cp, gpus // (tp * pp * cp), ep, etp)


def first_replica(layout: ParallelLayout) -> set[int]:
    """The ranks that hold every parameter of the model at least once."""
    in_stage = layout.world_size // layout.pp
    place = range(max(layout.tp, layout.etp * layout.ep))
    return {stage * in_stage + rank for stage in range(layout.pp) for rank in place}


def built(
    example: dict[str, Any], stage: int, layout: ParallelLayout, ranks: set[int], more: Words, logs: Path
) -> list[Any]:
    """What `fake_cluster.describe` tells of each rank."""
    words = arguments(training_words(example, stage), "tools/pretrain_mixmoe.py")
    listed = ",".join(map(str, sorted(ranks)))
    script = ["tests/helpers/fake_cluster.py", str(layout.world_size), listed]
    on_h100 = partial(become, h100(transformer_engine=False, apex=False))
    job = run_job([*script, *words, *more], 1, logs, prelude=on_h100)
    lines = [line.removeprefix("RANK ") for line in job.stdout(0).splitlines() if line.startswith("RANK ")]
    return [json.loads(line) for line in lines]


def check_cluster(
    example: dict[str, Any], stage: int, logs: Path, every_rank: bool, other: ParallelLayout | None = None
) -> None:
    """Build ranks of the cluster and hold them to the plan, to the model's size, and to where its experts belong."""
    gpus = other.world_size if other else GPUS[example["name"]]
    more = other_flags(other) if other else []
    flags = training_flags(example, stage, more)
    layout = layout_of(flags, gpus)
    ranks = set(range(gpus)) if every_rank else first_replica(layout) | {gpus // 2, gpus - 1}
    model = describe_start(BASES[example["name"]], phase_of_stage(stage), options=MixMoEOptions())
    batch = Batch(flags.micro_batch_size, flags.global_batch_size, flags.seq_length)
    reports = built(example, stage, layout, ranks, more, logs)
    assert [report["rank"] for report in reports] == sorted(ranks)
    for report in reports:
        check_rank(report, model, layout, batch)
    check_whole_model(reports, model, PARAMETERS[example["name"]])


def other_flags(layout: ParallelLayout) -> Words:
    """A layout's flags, sizes of one included: they overrule an example's."""
    line = f"--tensor-model-parallel-size {layout.tp} --pipeline-model-parallel-size {layout.pp} "
    line += f"--context-parallel-size {layout.cp} --expert-model-parallel-size {layout.ep} "
    line += f"--expert-tensor-parallel-size {layout.etp}"
    return line.split()


def check_rank(report: dict[str, Any], model: ModelDescription, layout: ParallelLayout, batch: Batch) -> None:
    in_stage = layout.world_size // layout.pp
    pp_rank, place = divmod(report["rank"], in_stage)
    sizes = model.sizes_under(layout.tp)
    parameters = [(name, tuple(shape), trained) for name, (shape, trained) in report["parameters"].items()]
    first = layout.layers(sizes.num_layers, pp_rank).start
    planned = [
        (local_name(local.name, first), local.shape, model.is_trained(local.name))
        for local in rank_parameters(sizes, layout, pp_rank)
    ]
    assert parameters == planned
    memory = stage_memory(model, layout, batch, pp_rank)[place]
    assert report["memory"] == {
        "weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer,
    }  # fmt: skip
    # Experts lie on the ranks of their expert-parallel number, once for each expert data parallel rank.
    per_rank = sizes.num_experts_per_group // layout.ep
    start = place // layout.etp % layout.ep * per_rank
    groups = model.phase.groups
    layers = [layer for layer in layout.layers(sizes.num_layers, pp_rank) if layer in sizes.moe_layers]
    wanted = {(layer, group, start + number) for layer in layers for group in groups for number in range(per_rank)}
    held = set()
    for key, _, offset, shape, replica in report["shards"]:
        if "_experts." in key:
            layer, group = int(key.split("layers.")[1].split(".")[0]), key.split("_experts.")[0][-2:]
            held |= {(layer, group, offset[0] + number) for number in range(shape[0])}
            assert replica[-1] == place // (layout.etp * layout.ep)
    assert held == wanted


def local_name(name: str, first_layer: int) -> str:
    """A pipeline stage counts its layers from 0."""
    parts = name.split(".")
    if parts[1] == "layers":
        parts[2] = str(int(parts[2]) - first_layer)
    return ".".join(parts)


def check_whole_model(reports: list[dict[str, Any]], model: ModelDescription, dense_parameters: int) -> None:
    """The ranks' first copies are the whole model, each element once: the published size, routers and MT experts."""
    pieces = Counter(
        (key, tuple(offset), tuple(shape), tuple(total))
        for report in reports
        for key, total, offset, shape, replica in report["shards"]
        if not any(replica)
    )
    assert set(pieces.values()) == {1}
    totals: Counter[str] = Counter()
    for key, _, shape, _ in pieces:
        totals[key] += math.prod(shape)
    assert totals == {key: math.prod(total) for key, _, _, total in pieces}
    sizes = model.sizes
    layers, routers = len(sizes.moe_layers), sizes.num_experts_per_group * (2 * sizes.hidden_size + 1)
    experts = 3 * sizes.hidden_size * sizes.ffn_hidden_size
    expected = dense_parameters + layers * (model.phase.stage * routers + (model.phase.stage - 1) * experts)
    assert sum(totals.values()) == expected


@pytest.mark.parametrize("stage", [1, 2])
def test_the_ranks_of_an_example_build(example: dict[str, Any], stage: int, tmp_path: Path) -> None:
    check_cluster(example, stage, tmp_path, every_rank=False)


@pytest.mark.slow  # minutes: 400 ranks in all
@pytest.mark.parametrize("stage", [1, 2])
def test_every_rank_of_an_example_builds(example: dict[str, Any], stage: int, tmp_path: Path) -> None:
    check_cluster(example, stage, tmp_path, every_rank=True)


@pytest.mark.parametrize("stage", [1, 2])
def test_other_layouts_of_the_same_model_build(example: dict[str, Any], stage: int, tmp_path: Path) -> None:
    check_cluster(example, stage, tmp_path, every_rank=False, other=OTHER_LAYOUTS[example["name"]])


@pytest.mark.parametrize("stage", [1, 2])
def test_the_same_model_builds_on_one_gpu(example: dict[str, Any], stage: int, tmp_path: Path) -> None:
    check_cluster(example, stage, tmp_path, every_rank=True, other=ParallelLayout())


def test_under_slurm_each_launcher_has_its_nodes_cpus(tmp_path: Path) -> None:
    """A job step does not inherit the CPUs of its job."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho node7\necho node8\n")
    scontrol.chmod(0o755)
    variables = {"PRINT": "1", "BASE": "base", "DATA": "data", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "5"}
    environment = {**os.environ, **variables, "SLURM_CPUS_ON_NODE": "96", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", f"examples/{LARGER[0]}/run.sh", "stage1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=True)
    nodes = GPUS[LARGER[0]] // 8
    assert done.stdout.startswith(f"srun --ntasks={nodes} --ntasks-per-node=1 --cpus-per-task=96 ")
    assert "--rdzv-endpoint=node7:29500" in done.stdout
