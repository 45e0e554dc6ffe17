"""The Hugging Face Mix-MoE model: plain PyTorch and transformers, the reference of the parity tests.

The two files `configuration_mixmoe.py` and `modeling_mixmoe.py` are also the code inside an exported checkpoint, which
loads with `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` where this package is absent.
Where it is imported, the Auto classes know Mix-MoE and need no trust.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_mixmoe import AUTO_MAP, MixMoEConfig
from .modeling_mixmoe import MixMoEForCausalLM, MixMoEModel, MixMoEPreTrainedModel, router_aux_loss


def register_auto_classes() -> None:
    """Make the Auto classes know Mix-MoE, so that exports load without trust_remote_code. Harmless when repeated."""
    AutoConfig.register(MixMoEConfig.model_type, MixMoEConfig, exist_ok=True)
    AutoModel.register(MixMoEConfig, MixMoEModel, exist_ok=True)
    AutoModelForCausalLM.register(MixMoEConfig, MixMoEForCausalLM, exist_ok=True)


def code_files() -> list[Path]:
    """Return the paths of the Python files an exported checkpoint must contain."""
    here = Path(__file__).resolve().parent
    return [here / "configuration_mixmoe.py", here / "modeling_mixmoe.py"]


def copy_code(directory: str | os.PathLike[str]) -> None:
    """Copy the model's code into a checkpoint directory, each file atomically.

    `MixMoEForCausalLM.save_pretrained` does this by itself; this is for exporters that write the weights on their own.

    Args:
        directory: an existing directory.

    Raises:
        FileNotFoundError: the directory does not exist.
    """
    for source in code_files():
        target = Path(directory) / source.name
        temporary = target.with_suffix(".py.tmp")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)


register_auto_classes()

__all__ = [
    "AUTO_MAP",
    "MixMoEConfig",
    "MixMoEForCausalLM",
    "MixMoEModel",
    "MixMoEPreTrainedModel",
    "code_files",
    "copy_code",
    "register_auto_classes",
    "router_aux_loss",
]
