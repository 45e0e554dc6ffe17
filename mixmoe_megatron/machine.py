"""What this machine has, and which of Megatron's flags follow: the one place where that is decided.

Megatron's defaults suit a GPU with Transformer Engine, Apex and a compiler. Each thing that is missing takes flags with
it; a machine without CUDA lacks them all, and `cpu_mode` then stands for the device. The flags come before the user's,
which therefore win.

Source: none in the paper; the demands are those of megatron-core 0.19.2.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import re
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from mixmoe_megatron.errors import MixMoEError

logger = logging.getLogger(__name__)

SUPPORTED_MEGATRON = "0.19."
#: The line that builds Transformer Engine against the torch in use; README and pyproject.toml have the same version.
INSTALL_TRANSFORMER_ENGINE = "pip install --no-build-isolation 'transformer-engine[pytorch]==2.9.0'"

_NO_CUDA = "--distributed-backend gloo --attention-backend unfused --use-cpu-initialization"
#: Megatron's local modules, and none of the kernels that their fused counterparts bring.
_NO_TRANSFORMER_ENGINE = "--transformer-impl local --no-rope-fusion --no-masked-softmax-fusion --no-persist-layer-norm"
_NO_FUSED_WGRAD = "--no-gradient-accumulation-fusion"
_NO_COMPILER = "--disable-jit-fuser --no-bias-swiglu-fusion --no-bias-dropout-fusion"


@dataclass(frozen=True)
class Machine:
    """What decides Megatron's flags.

    Attributes:
        gpu: name of the GPU; None without CUDA. Then the machine has none of the rest either: all of it needs CUDA.
        capability: its compute capability, (major, minor).
        transformer_engine: version of Transformer Engine; None when it is not installed.
        fused_wgrad: whether Apex' kernel is there that adds a weight gradient to its buffer.
        flash_attention: whether flash-attn is there, which Transformer Engine then uses.
        compiler: whether torch.compile can build GPU code: Triton calls a C compiler that finds Python's headers.
    """

    gpu: str | None = None
    capability: tuple[int, int] = (0, 0)
    transformer_engine: str | None = None
    fused_wgrad: bool = False
    flash_attention: bool = False
    compiler: bool = False

    def flags(self) -> list[str]:
        """Return the Megatron flags that this machine needs."""
        missing = {
            _NO_CUDA: self.gpu is None,
            _NO_TRANSFORMER_ENGINE: self.transformer_engine is None,
            _NO_FUSED_WGRAD: not self.fused_wgrad,
            _NO_COMPILER: not self.compiler,
        }
        return [word for flags, is_missing in missing.items() if is_missing for word in flags.split()]

    def __str__(self) -> str:
        """Return the facts and the flags on one line."""
        if self.gpu is None:
            facts = "no CUDA device, CPU mode (stock Megatron over gloo)"
        else:
            parts = {
                f"Transformer Engine {self.transformer_engine or ''}".strip(): self.transformer_engine is not None,
                "Apex": self.fused_wgrad,
                "flash-attn": self.flash_attention,
                "C compiler": self.compiler,
            }
            listed = [name if there else f"no {name}" for name, there in parts.items()]
            facts = ", ".join([f"{self.gpu} (compute capability {'.'.join(map(str, self.capability))})", *listed])
        return f"{facts}; flags: {' '.join(self.flags()) or 'none'}"


@functools.cache
def this_machine() -> Machine:
    """Return what this machine has. The first call, on rank 0, logs it.

    Raises:
        MixMoEError: Transformer Engine is installed and cannot be used.
    """
    machine = _read_machine()
    if int(os.environ.get("RANK", "0")) == 0:
        logger.info("machine: %s", machine)
    return machine


def _read_machine() -> Machine:
    if not torch.cuda.is_available():
        return Machine()
    return Machine(
        gpu=torch.cuda.get_device_name(),
        capability=torch.cuda.get_device_capability(),
        transformer_engine=_transformer_engine(),
        fused_wgrad=can_import("fused_weight_gradient_mlp_cuda"),
        flash_attention=can_import("flash_attn"),
        compiler=_has_compiler(),
    )


def _transformer_engine() -> str | None:
    """Return the version of Transformer Engine, None when it is not installed.

    Megatron takes one that cannot be imported for none at all, and a model many times slower would be trained.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        import transformer_engine
        from transformer_engine.pytorch.fp8 import fp8_model_init  # noqa: F401  # what Megatron asks for
    except Exception as error:  # a library that does not load raises OSError or RuntimeError, a missing one ImportError
        raise MixMoEError(
            f"Transformer Engine is installed but cannot be imported ({type(error).__name__}: "
            f"{' '.join(str(error).split())}): build it against this torch with `{INSTALL_TRANSFORMER_ENGINE}`, or "
            "`pip uninstall transformer-engine transformer-engine-torch` to train without it."
        ) from error
    return str(transformer_engine.__version__)


def can_import(module: str) -> bool:
    """Whether a module can be imported; it is, then."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _has_compiler() -> bool:
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return headers.is_file() and any(shutil.which(name) for name in compilers)


def check_megatron_version() -> None:
    """Check that the installed Megatron-Core is one whose internals this package knows.

    Raises:
        MixMoEError: it is not.
    """
    from megatron.core import __version__

    if not __version__.startswith(SUPPORTED_MEGATRON):
        raise MixMoEError(
            f"Mix-MoE supports megatron-core {SUPPORTED_MEGATRON}x, found {__version__}: "
            "install megatron-core>=0.19.2,<0.20."
        )


def order_device_queues(words: list[str]) -> None:
    """Set CUDA_DEVICE_MAX_CONNECTIONS=1 where the user has not, and tensor or context parallelism wants it.

    Communication is then started before the computation that is to hide it. Without these kinds of parallelism it
    would only keep kernels from overlapping. Must come before CUDA is first used.

    Args:
        words: the command line.
    """
    sizes = dict(re.findall(r"--(tensor-model|context)-parallel-size[ =](\S+)", " ".join(words)))
    if any(size != "1" for size in sizes.values()):
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
