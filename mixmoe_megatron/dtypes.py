"""Choose the device and the dtype of a model from what this machine computes fast; one rule for all commands.

Measured on a core with avx512_bf16, bfloat16 against float32: a training step of the 5-million-parameter base of
examples/quickstart takes 0.6 to 0.75 of the time, its perplexity 0.4, its generation 0.8 to 0.95; a model of 0.5
billion parameters generates 3 times as fast. Without such instructions bfloat16 is emulated and slower than float32. An
Intel CPU that hides AMX from a virtual machine keeps avx512_bf16, and is slow at it: a product of [1024, 896] and
[896, 4864] takes 1.5 to 1.9 times as long as in float32 there.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch

from mixmoe_megatron.errors import MixMoEError

logger = logging.getLogger(__name__)

AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Instructions that multiply bfloat16 matrices, as Linux names them; each alone is enough.
FAST_BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")
#: A CPU that has this and no AMX is an Intel one whose AMX is hidden.
_INTEL_WITH_AMX = "avx512_fp16"
_CPUINFO = Path("/proc/cpuinfo")


class Choice(NamedTuple):
    """A dtype, one of `DTYPES`, and why it was taken, to be read after a colon."""

    dtype: str
    reason: str


def fastest_dtype(gpu_bfloat16: bool | None, cpu_flags: Collection[str]) -> Choice:
    """Choose between float32 and bfloat16 for a machine; a pure function of these facts.

    Args:
        gpu_bfloat16: Whether the GPU that computes has bfloat16 in hardware; None: the CPU computes.
        cpu_flags: Instruction sets of the CPU, as Linux names them; empty where they are unknown.
    """
    if gpu_bfloat16:
        return Choice("bfloat16", "the GPU has it")
    if gpu_bfloat16 is not None:
        return Choice("float32", "no bfloat16 is known of the GPU")
    found = [flag for flag in FAST_BFLOAT16_FLAGS if flag in cpu_flags]
    if found == ["avx512_bf16"] and _INTEL_WITH_AMX in cpu_flags:
        return Choice("float32", "the CPU's AMX is hidden here, and its avx512_bf16 is slower than float32")
    if found:
        return Choice("bfloat16", f"the CPU has {found[0]}")
    return Choice("float32", f"the CPU has no fast bfloat16 (none of {', '.join(FAST_BFLOAT16_FLAGS)})")


def choose_device(asked: str = AUTO) -> str:
    """Return a torch device that works here: the one asked for; for ``auto`` the GPU where there is one, else the CPU.

    Raises:
        MixMoEError: The device is unknown or absent.
    """
    if asked == AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=torch.device(asked))
    except (RuntimeError, AssertionError) as error:  # torch's own, for an unknown, an absent or a missing device
        reason = str(error).splitlines()[0].rstrip(".")
        raise MixMoEError(f"The device {asked!r} cannot be used here: {reason}.") from error
    return asked


def choose_dtype(asked: str, device: str) -> Choice:
    """Return the dtype asked for; for ``auto`` the fastest one that a model can be trusted to, see `fastest_dtype`.

    Args:
        asked: ``auto`` or one of `DTYPES`.
        device: Of `choose_device`.

    Raises:
        MixMoEError: `asked` is none of these.
    """
    if asked == AUTO:
        on_cpu = torch.device(device).type == "cpu"
        return fastest_dtype(None if on_cpu else _gpu_has_bfloat16(device), cpu_flags())
    if asked not in DTYPES:
        raise MixMoEError(f"The dtype must be one of {', '.join([AUTO, *DTYPES])}, not {asked!r}.")
    return Choice(asked, "it was asked for")


def choose(dtype: str, device: str) -> tuple[str, str]:
    """Return the dtype and the device to compute with (`choose_dtype`, `choose_device`), and say so on one line."""
    device = choose_device(device)
    chosen, reason = choose_dtype(dtype, device)
    logger.info("computing in %s on %s: %s", chosen, device, reason)
    return chosen, device


def training_note(dtype: str, fastest: Choice) -> str:
    """Tell in which dtype a run trains, and by which flag of Megatron it would be faster; the flag is the user's."""
    note = f"training in {dtype}"
    if (dtype, fastest.dtype) == ("float32", "bfloat16"):
        note += f"; --bf16 would be faster: {fastest.reason}"
    return note


def cpu_flags(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Return the instruction sets of this machine's CPU; empty where Linux does not tell x86's.

    Args:
        cpuinfo: The file in which Linux tells them.
    """
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    values = (line.partition(":")[2] for line in lines if line.startswith("flags"))
    return frozenset(next(values, "").split())


def _gpu_has_bfloat16(device: str) -> bool:
    if torch.device(device).type != "cuda":
        return False
    with torch.cuda.device(torch.device(device)):
        return torch.cuda.is_bf16_supported(including_emulation=False)
