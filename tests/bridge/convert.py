"""Take exported models through Megatron-Bridge's AutoBridge to Megatron and back, under a parallel layout.

    convert.py JOB.json    with torchrun's variables; JOB: [[Hugging Face directory, output, {setting: value}], ...]

Below `output` it writes `loaded`, the checkpoint of the model that AutoBridge makes; `megatron`, the same with spectral
router weights, which no exported model has; `hf`, what AutoBridge exports of that; `trained_RANK.json`, what trains.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from mixmoe_megatron.checkpoint.megatron_checkpoint import TRACKER_FILE
from mixmoe_megatron.methods.base import part_of
from tests.te.pretend import pretend_cuda

with pretend_cuda():  # Transformer Engine asks on import
    from megatron.bridge import AutoBridge

    import mixmoe_megatron.integrations.megatron_bridge  # noqa: F401  (registers Mix-MoE)


def draw_spectral_weights(model: torch.nn.Module) -> None:
    """Fill them with values that depend on the layer and group alone."""
    for name, parameter in model.named_parameters():
        if name.endswith(".spectral_weight"):
            layer = model.decoder.layers[int(name.split(".")[2])].layer_number
            generator = torch.Generator().manual_seed(2 * layer + (".mt." in name))
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def save(models: list[Any], directory: Path) -> None:
    iteration = directory / "iter_0000001"
    if torch.distributed.get_rank() == 0:
        iteration.mkdir(parents=True)
        (directory / TRACKER_FILE).write_text("1")
    torch.distributed.barrier()
    dist_checkpointing.save({"model": models[0].sharded_state_dict()}, str(iteration))


def convert(source: Path, output: Path, settings: dict[str, Any]) -> None:
    bridge = AutoBridge.from_hf_pretrained(source)
    provider = bridge.to_megatron_provider()
    for name, value in {**settings, "gradient_accumulation_fusion": False}.items():  # the fusion needs Apex
        setattr(provider, name, value)
    provider.finalize()
    with pretend_cuda():
        models = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    trained = {part_of(name) for name, parameter in models[0].named_parameters() if parameter.requires_grad}
    save(models, output / "loaded")
    draw_spectral_weights(models[0])
    save(models, output / "megatron")
    bridge.save_hf_pretrained(models, output / "hf", show_progress=False)
    (output / f"trained_{torch.distributed.get_rank()}.json").write_text(json.dumps(sorted(trained)))


def main() -> None:
    torch.distributed.init_process_group("gloo", rank=int(os.environ["RANK"]))
    for source, output, settings in json.loads(Path(sys.argv[1]).read_text()):
        sizes = {name: value for name, value in settings.items() if name.endswith("_parallel_size")}
        parallel_state.initialize_model_parallel(**sizes)
        model_parallel_cuda_manual_seed(0)
        convert(Path(source), Path(output), settings)
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
