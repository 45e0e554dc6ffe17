"""Load checkpoints under a parallel layout and save them again, through Megatron's model, loading and saving.

    resave.py JOB.json      with torchrun's variables; JOB: a list of [checkpoint, output, {size name: value}]

The sizes are TransformerConfig fields: tensor_model_parallel_size and so on.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from mixmoe_megatron.checkpoint.megatron_checkpoint import TRACKER_FILE, iteration_directory
from mixmoe_megatron.checkpoint.metadata import METADATA_FILE, read_metadata
from mixmoe_megatron.conversion import parity
from mixmoe_megatron.megatron_patches.cpu_mode import enable_cpu_mode


def resave(checkpoint: Path, output: Path, sizes: dict[str, int]) -> None:
    """Read `checkpoint` and write it as iteration 1 of `output`, this rank its part."""
    source = iteration_directory(checkpoint)
    model = parity.build_megatron_model(read_metadata(checkpoint), expert_tensor_parallel_size=1, **sizes)
    parity.load_weights(model, source)
    directory = output / "iter_0000001"
    if torch.distributed.get_rank() == 0:
        directory.mkdir(parents=True)
        shutil.copyfile(checkpoint / METADATA_FILE, output / METADATA_FILE)
        (output / TRACKER_FILE).write_text("1")
    torch.distributed.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(directory))


if __name__ == "__main__":
    enable_cpu_mode()
    torch.distributed.init_process_group("gloo", rank=int(os.environ["RANK"]))
    jobs = json.loads(Path(sys.argv[1]).read_text())
    layouts = {json.dumps(sizes): sizes for _, _, sizes in jobs}
    for sizes in layouts.values():  # once each: the fifty threads of a layout's process groups stay
        parallel_state.initialize_model_parallel(expert_tensor_parallel_size=1, **sizes)
        model_parallel_cuda_manual_seed(0)
        for name, where, layout in jobs:
            if layout == sizes:
                resave(Path(name), Path(where), layout)
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
