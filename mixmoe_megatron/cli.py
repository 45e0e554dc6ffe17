"""What every command shares: error reporting, logging and atomic JSON output."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mixmoe_megatron.errors import MixMoEError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        The exit status: 0 done, 2 bad input or a full disk, 130 interrupted. Any other exception is a defect and
        propagates. With MIXMOE_TRACEBACK=1 in the environment, bad input shows its traceback too.
    """
    try:
        command()
    except (MixMoEError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        if os.environ.get("MIXMOE_TRACEBACK") == "1":
            traceback.print_exc()
        sys.stderr.write(f"error: {error}\n")
        return EXIT_BAD_INPUT
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        sys.stderr.write(f"error: {error}: make room and start the same command again.\n")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"interrupted{interrupt}\n")
        return EXIT_INTERRUPTED
    return 0


@contextmanager
def whole_file(path: str | Path) -> Iterator[TextIO]:
    """Open a text file (UTF-8) to be written atomically: a reader, or a crash, sees the old file or the whole new one.

    Args:
        path: The file to write; its directory must exist.

    Raises:
        OSError: The directory is missing or not writable, or the disk is full; the old file is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically, see `whole_file`.

    Args:
        path: The file to write; its directory must exist.
        value: Anything `json.dumps` takes.

    Raises:
        OSError: see `whole_file`.
    """
    with whole_file(path) as stream:
        stream.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
