"""What every command shares: its `main`, error reporting, logging and atomic JSON output."""

from __future__ import annotations

import argparse
import atexit
import errno
import io
import json
import logging
import os
import select
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from mixmoe_megatron.errors import MixMoEError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
# Packages that an extra brings: the package, as it is imported, and the extra.
EXTRAS = {
    "comet": "comet",
    "datasets": "data",
    "lingua": "langid",
    "markdown": "eval",
    "matplotlib": "eval",
    "nltk": "meteor",
    "pyarrow": "data",
    "sacrebleu": "eval",
}
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def setup_logging(level: int = logging.INFO) -> None:
    """Send log records to stderr, one line each; of Megatron, only warnings that it logs as such.

    Args:
        level: The lowest level shown.
    """
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("megatron").setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it tells of each file that it has read
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")


def make_main(
    build_parser: Callable[[], argparse.ArgumentParser], run: Callable[[argparse.Namespace], int | None]
) -> Callable[..., int]:
    """Return a command's `main`: words of the command line (default: `sys.argv`) in, exit status out.

    Args:
        build_parser: Returns the parser of the command line.
        run: The command's body; see `run_command`.
    """

    def main(words: Sequence[str] | None = None) -> int:
        args = build_parser().parse_args(words)
        setup_logging()
        return run_command(lambda: run(args))

    return main


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command; turn user mistakes into one sentence on stderr. What it prints is shown on any terminal.

    Args:
        command: The command's body; None counts as status 0.

    Returns:
        The exit status: the command's own (also when a reader such as `head` wants no more of the output), 2 bad input,
        what the system refuses (a full disk, a file that cannot be written) or an extra that is not installed, 130
        interrupted. Any other exception is a defect and propagates. With MIXMOE_TRACEBACK=1 in the environment, what
        gives status 2 shows its traceback too.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters that a terminal lacks are spelled out
        sys.stdout.reconfigure(errors="backslashreplace")
    status = 0
    try:
        _find_room_for_code()
        status = command() or 0
        if sys.stdout is not None:  # closed by who started the command
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        _drop_output()
    except MixMoEError as error:
        _show_traceback()
        sys.stderr.write(f"error: {error}\n")
        return EXIT_BAD_INPUT
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        _show_traceback()
        extra = f"mixmoe-megatron[{EXTRAS[package]}]"
        sys.stderr.write(f"error: {package} is not installed: pip install '{extra}' adds it.\n")
        return EXIT_BAD_INPUT
    except OSError as error:
        _show_traceback()
        remedy = ": make room and start the same command again." if error.errno in _NO_SPACE else ""
        sys.stderr.write(f"error: {' '.join(str(error).split())}{remedy}\n")
        _drop_output()
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"interrupted{interrupt}\n")
        return EXIT_INTERRUPTED
    return status


def _show_traceback() -> None:
    if os.environ.get("MIXMOE_TRACEBACK") == "1":
        traceback.print_exc()


def _find_room_for_code() -> None:
    """Let transformers keep the code of models in a temporary folder where Hugging Face's cache cannot be written.

    Few commands run such code: where there is no temporary folder either, the others do their work all the same.
    """
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    try:
        cache = Path(os.environ.get("HF_MODULES_CACHE") or Path(home, "modules")).expanduser()
        cache.mkdir(parents=True, exist_ok=True)
        writable = os.access(cache, os.W_OK)
    except (OSError, RuntimeError):  # the latter: nobody knows of a home
        writable = False
    if not writable:
        with suppress(OSError):
            folder = tempfile.mkdtemp(prefix="mixmoe_modules_")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            os.environ["HF_MODULES_CACHE"] = folder


def _reader_is_gone() -> bool:
    """Tell whether stdout is a pipe that nobody reads any more."""
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _drop_output() -> None:
    """Let what was printed and cannot be written go; Python would complain of it at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def whole_file(path: str | Path) -> Iterator[TextIO]:
    """Open a text file (UTF-8) to be written atomically: a reader, or a crash, sees the old file or the whole new one.

    What UTF-8 cannot say, the odd bytes of a file's name, is spelled out as JSON does.

    Args:
        path: The file to write; its directory must exist.

    Raises:
        OSError: The directory is missing or not writable, or the disk is full; the old file is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, see `whole_file`.

    Args:
        path: The file to write; its directory must exist.
        text: Its content.

    Raises:
        OSError: see `whole_file`.
    """
    with whole_file(path) as stream:
        stream.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically, see `whole_file`.

    Args:
        path: The file to write; its directory must exist.
        value: Anything `json.dumps` takes.

    Raises:
        OSError: see `whole_file`.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
