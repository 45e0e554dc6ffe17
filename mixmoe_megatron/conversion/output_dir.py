"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixmoe_megatron.errors import MixMoEError


def check_output_dir(output_dir: str | Path, force: bool) -> Path:
    """Return the output directory's path if it may be written.

    Raises:
        MixMoEError: it is a file, or it has content and `force` is off.
    """
    path = Path(output_dir).absolute()
    if path.exists() and not path.is_dir():
        raise MixMoEError(f"{output_dir} exists and is not a directory.")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise MixMoEError(
            f"{output_dir} exists and is not empty; choose another directory or pass --force to replace it."
        )
    return path


@contextmanager
def whole_directory(output_dir: str | Path, force: bool = False) -> Iterator[Path]:
    """Give a temporary directory beside `output_dir`; rename it into place when the block ends without an exception.

    On any exception, Ctrl-C included, the temporary directory is removed and `output_dir` is as it was.

    Args:
        output_dir: the final place.
        force: replace a directory that has content, after the new one is complete.

    Raises:
        MixMoEError: see `check_output_dir`.
    """
    final = check_output_dir(output_dir, force)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=final.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        replaced = None
        if final.exists():
            replaced = temporary.with_name(temporary.name.replace(".partial-", ".replaced-"))
            os.rename(final, replaced)
        os.rename(temporary, final)
        if replaced is not None:
            shutil.rmtree(replaced)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
