"""What the checks of `make test-gpu` share: rows that are PROVED, FAILED or NOT RUN, and facts about the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROVED, FAILED, NOT_RUN = "PROVED", "FAILED", "NOT RUN"
DEVICE = os.environ.get("DEVICE", "cuda")


class NotRun(Exception):
    """Raised in a row that this machine or its packages do not allow; the message is the reason."""


@dataclass
class Row:
    """One claim.

    Attributes:
        name: what is claimed.
        status: PROVED, FAILED or NOT_RUN.
        detail: the reason, where it is not proved.
        facts: figures worth keeping.
        seconds: how long it took.
    """

    name: str
    status: str = PROVED
    detail: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def line(self) -> str:
        """The row as one line of the printed report."""
        facts = ", ".join(f"{name} {_short(value)}" for name, value in self.facts.items())
        return f"{self.status:<8} {self.name} ({self.seconds:.0f} s)" + "".join(
            f": {x}" for x in (facts, self.detail) if x
        )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass
class Rows:
    """The rows of a check, in the order in which they were tried.

    Attributes:
        scratch: an empty folder of the check's own.
        write_reference: the check that makes a reference shall write it instead of holding itself to it.
    """

    scratch: Path
    write_reference: bool = False
    rows: list[Row] = field(default_factory=list)

    @contextmanager
    def row(self, name: str) -> Iterator[dict[str, Any]]:
        """Try a claim; what is put into the dict is kept as its figures. Any exception but NotRun fails it."""
        row, start = Row(name), time.monotonic()
        try:
            yield row.facts
        except NotRun as reason:
            row.status, row.detail = NOT_RUN, str(reason)
        except Exception as error:
            row.status, row.detail = FAILED, f"{type(error).__name__}: {error}".strip()[-3000:]
            traceback.print_exc()
        row.seconds = time.monotonic() - start
        self.rows.append(row)
        sys.stdout.write(row.line()[:600] + "\n")


@dataclass(frozen=True)
class Check:
    """What is run in a process of its own and gives rows.

    Attributes:
        name: what the command line calls it.
        title: what it claims.
        run: tries its rows.
        on_cpu: some of its rows can be tried without a GPU (DEVICE=cpu).
        alone: it measures time or memory, so nothing may run beside it.
        limit: seconds after which it is stopped and counts as failed; three times as many on a CPU (slow bfloat16).
    """

    name: str
    title: str
    run: Callable[[Rows], None]
    on_cpu: bool = False
    alone: bool = False
    limit: int = 300


def machine() -> dict[str, Any]:
    """Return what a reader of the report must know of the machine: device, driver, versions, commit."""
    import torch

    from mixmoe_megatron.evaluation.provenance import cpu_model, git_commit

    packages = ("torch", "megatron-core", "transformers", "transformer-engine", "apex", "flash-attn", "triton", "numpy")
    facts: dict[str, Any] = {"device": cpu_model(), "commit": os.environ.get("COMMIT") or git_commit()}
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "devices": torch.cuda.device_count(),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return facts | {"python": platform.python_version(), "packages": {name: _version(name) for name in packages}}


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    return done.stdout.split("\n")[0].strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
