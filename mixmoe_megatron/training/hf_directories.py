"""Training straight from a Hugging Face directory, and Hugging Face directories beside the checkpoints of a run.

Both give what the commands of checkpoints_conversion give. On the way in nothing is written: each rank reads the bytes
of its own parts of the tensors, a part at a time, and upcycles those; data-parallel replicas share the reading out.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch import Tensor

from mixmoe_megatron.checkpoint.megatron_checkpoint import LAYER, TRACKER_FILE
from mixmoe_megatron.checkpoint.ranks import Ranks
from mixmoe_megatron.checkpoint.tensors import LazyTensor
from mixmoe_megatron.conversion.hf_config import ADAPTER_FILE, CONFIG_FILE, read_hf_config
from mixmoe_megatron.conversion.hf_export import ExportRequest, prepare_export, run_export
from mixmoe_megatron.conversion.hf_import import ImportRequest, read_hf_model
from mixmoe_megatron.conversion.import_arguments import EXPORTS
from mixmoe_megatron.conversion.prepared import PreparedCheckpoint
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.base import Method, Phase
from mixmoe_megatron.methods.registry import method_of
from mixmoe_megatron.model.options import MixMoEOptions


def is_hf_directory(directory: str | Path) -> bool:
    """Whether a directory is a Hugging Face model, or an adapter, and not a Megatron checkpoint."""
    is_hf = any((Path(directory) / name).is_file() for name in (CONFIG_FILE, ADAPTER_FILE))
    return is_hf and not (Path(directory) / TRACKER_FILE).is_file()


def open_hf_start(directory: str | Path, phase: Phase, upcycle_options: str | None) -> PreparedCheckpoint:
    """Read what a run would start from: configuration and headers of the weights, once in a process.

    Args:
        directory: dense, of which the start of the phase's method is made; or an export of what the phase starts from.
        phase: to train.
        upcycle_options: a preset's name or a JSON object of Mix-MoE options, `preset` among them; None: recommended.

    Raises:
        MixMoEError: anything wrong with the directory or the options.
    """
    return _open_hf_start(str(directory), phase, upcycle_options)


@functools.lru_cache(maxsize=1)  # asked for its configuration, its tensors and their hash, in three places
def _open_hf_start(directory: str, phase: Phase, upcycle_options: str | None) -> PreparedCheckpoint:
    config, options, method = read_hf_config(directory), None, method_of(phase)
    if method.phases[0].groups and config.get("model_type") not in EXPORTS:
        options = _parse_options(upcycle_options, method)
    elif upcycle_options:
        raise MixMoEError(
            "--upcycle-options only go with a dense model and a phase with experts: here nothing is upcycled."
        )
    return read_hf_model(ImportRequest(directory, output_dir="", options=options, method=method.name, config=config))


def _parse_options(text: str | None, method: Method) -> MixMoEOptions:
    values: dict[str, Any] = {}
    if text and text.lstrip().startswith("{"):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise MixMoEError(f"--upcycle-options is not a JSON object ({error}).") from None
    elif text:
        values = {"preset": text}
    return MixMoEOptions.from_preset(values.pop("preset", "recommended"), **{**method.options, **values})


class HfLoadStrategy:
    """Reads parts of tensors from a Hugging Face directory, as Megatron's load strategies do from a checkpoint.

    Args:
        plan: the model's tensors by per-layer name, from `open_hf_start`.
    """

    def __init__(self, plan: list[LazyTensor]):
        self._tensors = {tensor.name: tensor for tensor in plan}

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, async_strategy: str = "") -> Any:
        """Return the values of the ShardedTensors in a state dict.

        Args:
            sharded_state_dict: nested; ShardedTensors alone.
            checkpoint_dir, async_strategy: Megatron's, not needed.

        Raises:
            MixMoEError: the plan lacks a tensor, or a weight file is damaged.
        """
        return dict_list_map_outplace(self._read, sharded_state_dict)

    def _read(self, part: ShardedTensor) -> Tensor:
        name, region = part.key, part.global_slice()
        if name.startswith("decoder.layers.") and not LAYER.match(name):  # layers stacked along the first axis
            name, region = f"decoder.layers.{region[0]}.{name.removeprefix('decoder.layers.')}", region[1:]
        if name not in self._tensors:
            raise MixMoEError(f"the Hugging Face model lacks what makes {name}.")
        found = self._tensors[name].part(region).to(part.dtype)
        if found.shape == part.local_shape:
            return found.contiguous()
        if not part.allow_shape_mismatch:
            raise MixMoEError(
                f"{name} has the shape {list(self._tensors[name].shape)} in the Hugging Face model, which is not what "
                "this run asks for: leave flags that change the model's sizes out."
            )
        padded = torch.zeros(part.local_shape, dtype=part.dtype)  # vocabulary rows that tensor parallelism adds
        padded[: found.shape[0]] = found
        return padded


def load_from_hf(state: dict[str, Any], plan: list[LazyTensor], replicas: Any) -> dict[str, Tensor]:
    """Return this rank's values of a sharded state dict, as `dist_checkpointing.load` does for a checkpoint.

    Args:
        state: of a model chunk; objects (`_extra_state`) are left out.
        plan: as HfLoadStrategy's.
        replicas: the process group whose ranks share out the reading of what several of them need.

    Raises:
        MixMoEError: the plan lacks a tensor, or a weight file is damaged.
    """
    tensor_state = {key: value for key, value in state.items() if not isinstance(value, ShardedObject)}
    wanted, _, factories = load_preprocess(tensor_state)
    loaded = FullyParallelLoadStrategyWrapper(HfLoadStrategy(plan), replicas).load(wanted, Path())
    return apply_factory_merges(loaded, factories)


def export_iteration(save: str, hf_save: str, iteration: int) -> None:
    """Write an iteration that has just been saved as a Hugging Face directory too, `hf_save`/iter_0000123.

    Collective: all ranks share the work.

    Args:
        save: directory of the run's checkpoints.
        hf_save: directory of the exports.
        iteration: its number.

    Raises:
        MixMoEError: as `hf_export.run_export`.
    """
    torch.distributed.barrier()
    output = Path(hf_save) / f"iter_{iteration:07d}"
    request = ExportRequest(save, str(output), iteration=iteration, force=True)
    run_export(prepare_export(request), Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size()))
