"""What every command shares: error reporting, logging and atomic JSON output."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixmoe_megatron.errors import MixMoEError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def setup_logging(level: int = logging.INFO) -> None:
    """Send log records to stderr, one line each; of Megatron, only warnings that it logs as such.

    Args:
        level: The lowest level shown.
    """
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("megatron").setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")


def run_command(command: Callable[[], None]) -> int:
    """Run a command; turn user mistakes into one sentence on stderr.

    Args:
        command: The command's body.

    Returns:
        The exit status: 0 done, 2 bad input, 130 interrupted. Any other exception is a defect and propagates.
    """
    try:
        command()
    except (MixMoEError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
    return 0


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically: a reader sees the old file or the whole new one.

    Args:
        path: The file to write; its directory must exist.
        value: Anything `json.dumps` takes.

    Raises:
        OSError: The directory is missing or not writable.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
