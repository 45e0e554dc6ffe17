"""Take checkpoints through a Transformer Engine model and back through a torch one, under a parallel layout.

    exchange.py JOB.json    with torchrun's variables; JOB: a list of [checkpoint, output, phase, {size name: value}]

Below `output` it writes `te` and `torch`, what the two models save after one another, and what each rank saw of them in
`RANK.json`. `phase` is that of the models: stage2 with a checkpoint of stage1 starts the MT group from the LM group.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from mixmoe_megatron.checkpoint.megatron_checkpoint import TRACKER_FILE
from mixmoe_megatron.checkpoint.metadata import Metadata, read_metadata, write_metadata
from mixmoe_megatron.conversion import parity
from mixmoe_megatron.methods.base import Phase
from mixmoe_megatron.methods.registry import PHASES
from mixmoe_megatron.model.freezing import freeze_for_phase, parameter_report
from mixmoe_megatron.training.startup import load_parent
from tests.te.pretend import pretend_cuda


def described(model: Any, phase: Phase) -> dict[str, Any]:
    """What must not depend on the implementation: the parts that train, and what lies where in a checkpoint."""
    report = parameter_report(freeze_for_phase(model, phase), phase)
    parts = {part.name: [part.trained, part.local, part.total] for part in report.parts}
    pieces: dict[str, list[Any]] = {}
    for entry in model.sharded_state_dict().values():
        for piece in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            if not isinstance(piece, ShardedObject):
                described_piece = [*piece.global_shape], [*piece.global_offset], [*piece.local_shape], str(piece.dtype)
                pieces.setdefault(piece.key, []).append(described_piece)
    modules = {type(module).__name__ for module in model.modules()}
    return {"parts": parts, "pieces": {key: sorted(value) for key, value in pieces.items()}, "modules": sorted(modules)}


def save(model: Any, output: Path, checkpoint: Path, metadata: Metadata) -> None:
    directory = output / "iter_0000001"
    if torch.distributed.get_rank() == 0:
        directory.mkdir(parents=True)
        shutil.copytree(checkpoint / "tokenizer", output / "tokenizer")
        write_metadata(output, metadata)
        (output / TRACKER_FILE).write_text("1")
    torch.distributed.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(directory))
    torch.distributed.barrier()


def exchange(checkpoint: Path, output: Path, phase: Phase, sizes: dict[str, int]) -> None:
    parallel_state.initialize_model_parallel(expert_tensor_parallel_size=1, **sizes)
    model_parallel_cuda_manual_seed(0)
    metadata = read_metadata(checkpoint)
    starts_mt = phase.name == "stage2" != metadata.phase.name
    metadata = dataclasses.replace(metadata, phase=phase)
    seen, source = {}, checkpoint
    for name, implementation in (("te", "transformer_engine"), ("torch", "local")):
        with pretend_cuda(name == "te"):
            fields = {
                "expert_tensor_parallel_size": 1,
                "sequence_parallel": "tensor_model_parallel_size" in sizes,
                **sizes,
            }
            model = parity.build_megatron_model(metadata, transformer_impl=implementation, **fields)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))  # loading must fill every one
        load_parent([model], source, phase if starts_mt and name == "te" else PHASES["stage1"])
        save(model, output / name, checkpoint, metadata)
        seen[name], source = described(model, phase), output / name
    (output / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(seen))
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo", rank=int(os.environ["RANK"]))
    for name, where, phase_name, layout in json.loads(Path(sys.argv[1]).read_text()):
        exchange(Path(name), Path(where), PHASES[phase_name], layout)
    torch.distributed.destroy_process_group()
