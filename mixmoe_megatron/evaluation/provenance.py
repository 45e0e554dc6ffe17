"""What a result came from: package versions, the commit, and JSON files written by earlier steps."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from mixmoe_megatron.checkpoint.metadata import package_versions
from mixmoe_megatron.cli import write_json
from mixmoe_megatron.errors import MixMoEError

_SCORING_PACKAGES = ("sacrebleu", "tokenizers", "matplotlib")


def evaluation_versions() -> dict[str, str]:
    """Return the versions of Python, of the packages that shape a checkpoint, and of those that score and draw."""
    return package_versions(_SCORING_PACKAGES)


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


def record_benchmark(
    measured: dict[str, Any], versions: dict[str, str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return a benchmark's figures with what their reader must know, and write them where the command line wants them.

    Args:
        measured: The figures.
        versions: Of the packages that matter to them.
        arguments: Of the command; ``output`` names a JSON file or is None.

    Returns:
        The figures, commit, versions, threads, the GPU's or processor's name, and the command.
    """
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model()
    origin = {"commit": git_commit(), "versions": versions, "threads": torch.get_num_threads(), "device": device}
    record = {**measured, **origin, "command": sys.argv, "arguments": vars(arguments)}
    if arguments.output is not None:
        write_json(arguments.output, record)
    return record


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
