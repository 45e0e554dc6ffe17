"""What a result came from: package versions, the commit, and JSON files written by earlier steps."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from mixmoe_megatron.checkpoint.metadata import package_versions as checkpoint_versions
from mixmoe_megatron.errors import MixMoEError

_SCORING_PACKAGES = ("sacrebleu", "tokenizers", "matplotlib")


def package_versions() -> dict[str, str]:
    """Return the versions of Python, of the packages that shape a checkpoint, and of those that score and draw."""
    return checkpoint_versions(_SCORING_PACKAGES)


def git_commit() -> str | None:
    """Return the commit of this repository, ``-dirty`` behind it when tracked files differ; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40",
               "--exclude=*"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def cpu_model() -> str:
    """Return the processor's name, as Linux tells it or as Python knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def measured_on(versions: dict[str, str]) -> dict[str, Any]:
    """Return what the reader of a measurement must know: commit, versions, threads, and the GPU's or processor's name.

    Args:
        versions: of the packages that matter to it.
    """
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model()
    return {"commit": git_commit(), "versions": versions, "threads": torch.get_num_threads(), "device": device}


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        MixMoEError: The file is missing, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MixMoEError(f"There is no file {path}.") from error
    except (OSError, ValueError) as error:
        raise MixMoEError(f"Cannot read {path} as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise MixMoEError(f"{path} should hold a JSON object.")
    return value
