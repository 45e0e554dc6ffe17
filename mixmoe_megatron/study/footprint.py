"""What a system of a study is and costs: parameters, operations, seconds.

Parameters and operations are counted from the checkpoints' metadata and the token files, so they are the same on every
machine; seconds are those of the jobs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mixmoe_megatron.checkpoint.metadata import read_metadata
from mixmoe_megatron.conversion.hf_config import read_hf_config
from mixmoe_megatron.conversion.prepared import describe_model
from mixmoe_megatron.conversion.starts import describe_start
from mixmoe_megatron.data.parallel import target_share
from mixmoe_megatron.data.storage import read_manifest
from mixmoe_megatron.evaluation.provenance import read_json
from mixmoe_megatron.methods.full import DENSE
from mixmoe_megatron.model.flops import step_flops
from mixmoe_megatron.model.sizes import ModelDescription
from mixmoe_megatron.planning.parameters import count_parameters
from mixmoe_megatron.study.grid import CHECKPOINT, EVALUATED, TOKENS, Grid, Training


class Footprint(NamedTuple):
    """What a system is and costs, of its first seed.

    Attributes:
        total: Parameters that the model has in the end.
        active: Of them those that a token meets: of n experts it meets k.
        trained: Parameters that each training trains, in their order; those of Mix-MoE's stages are different ones.
        training_flops: Floating-point operations of all trainings, padding left out, a mean text length assumed.
        token_flops: Operations of the forward pass of a token, behind half a sequence.
        training_seconds: Of the training jobs, mean over seeds, start-up included, of a killed one its last part.
        generation_seconds: Of a translated segment, mean over seeds.
    """

    total: int
    active: int
    trained: tuple[int, ...]
    training_flops: float
    token_flops: float
    training_seconds: float
    generation_seconds: float


def trained_model(training: Training, root: Path) -> ModelDescription:
    """Return the model that a training trains, of which the system's start has been made.

    Args:
        training: Of the grid.
        root: Directory of all jobs.
    """
    metadata = read_metadata(training.start.directory(root) / CHECKPOINT)
    description = describe_model(metadata, metadata.megatron_args["vocab_size"])
    return replace(description, phase=training.phase)


def count_training_flops(model: ModelDescription, training: Training, sequence: int, root: Path) -> float:
    """Return a training's operations; pairs are taken to be all of their mean length.

    Logits are those that training computes, of pairs the target's.

    Args:
        model: Of `trained_model`.
        training: Of the grid; its token files have been made.
        sequence: Tokens of a monolingual sample.
        root: Directory of all jobs.
    """
    samples, length, share = training.steps * training.batch, float(sequence), 1.0
    if training.is_pairs:
        prefixes = [job.directory(root) / TOKENS for job in training.data]
        manifests = [read_manifest(prefix) for prefix in prefixes]
        length = sum(found["tokens"] for found in manifests) / sum(found["documents"] for found in manifests)
        share = target_share(prefixes)
    k = model.topk_per_group
    return step_flops(model.sizes_under(1), model.phase, k, samples * length, length, loss_share=share).total


def read_footprint(grid: Grid, name: str, root: Path) -> Footprint:
    """Return what a system is and costs; its jobs have run.

    Args:
        grid: The study.
        name: Of its systems.
        root: Directory of all jobs.
    """
    seeds = range(1, grid.settings.seeds + 1)
    of_seeds = [grid.trainings(name, seed) for seed in seeds]
    sequence = int(grid.size["sequence"])
    base = describe_start(read_hf_config(grid.base), DENSE)
    models = [trained_model(training, root) for training in of_seeds[0]]
    last = models[-1] if models else base
    total, active, _ = count_parameters(last)
    token = step_flops(last.sizes_under(1), last.phase, last.topk_per_group, 1, sequence / 2).forward
    pairs = zip(models, of_seeds[0], strict=True)
    seconds = [read_json(training.job.directory(root) / "done.json")["seconds"] for row in of_seeds for training in row]
    return Footprint(
        total,
        active,
        tuple(count_parameters(model).trained for model in models),
        sum(count_training_flops(model, training, sequence, root) for model, training in pairs),
        token,
        sum(seconds) / len(seeds),
        _generation_seconds(grid, name, root),
    )


def _generation_seconds(grid: Grid, name: str, root: Path) -> float:
    found, segments = 0.0, 0
    for seed in range(1, grid.settings.seeds + 1):
        evaluation = read_json(grid.evaluation(name, seed).directory(root) / "evaluation" / "evaluation.json")
        seconds = evaluation["seconds"][EVALUATED]
        found += sum(value for step, value in seconds.items() if step.startswith("translate "))
        segments += sum(evaluation["num_test_segments"].values())
    return found / segments
