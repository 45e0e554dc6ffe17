"""Directories that appear whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixmoe_megatron.checkpoint.ranks import ALONE, Ranks
from mixmoe_megatron.errors import MixMoEError

_PARTIAL, _REPLACED = ".partial-", ".replaced-"


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


def check_space(output_dir: str | Path, num_bytes: int) -> None:
    """Raise if the output's disk has less room than the weights need.

    Args:
        output_dir: to be made.
        num_bytes: that will be written.

    Raises:
        MixMoEError: it has less.
    """
    place = Path(output_dir).absolute()
    while not place.exists():
        place = place.parent
    if (free := shutil.disk_usage(place).free) < num_bytes:
        raise MixMoEError(
            f"the disk of {output_dir} has {free / 1e9:.1f} GB free, {num_bytes / 1e9:.1f} GB are needed."
        )


@contextmanager
def whole_directory(output_dir: str | Path, force: bool = False, ranks: Ranks = ALONE) -> Iterator[Path]:
    """Give a temporary directory beside `output_dir`; rename it into place when the block ends without an exception.

    On any exception, Ctrl-C included, the temporary directory is removed and `output_dir` is as it was. What a killed
    run left (a hidden `.NAME.partial-*`) is removed by the next one.

    Args:
        output_dir: the final place.
        force: replace a directory that has content, after the new one is complete.
        ranks: all of them get the same directory; rank 0 makes and renames it. The block must end for all or for none
            (`Ranks.together`).

    Raises:
        MixMoEError: see `check_output_dir`; or the disk is full or fails.
    """
    final = check_output_dir(output_dir, force)
    try:
        temporary = ranks.on_first(lambda: _make_temporary(final))
        if ranks.rank:
            yield temporary
            return
        held = _lock(temporary)
        try:
            yield temporary
            _put_in_place(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if held is not None:
                os.close(held)
    except OSError as error:
        raise MixMoEError(f"{output_dir} cannot be written: {error}.") from None


def _make_temporary(final: Path) -> Path:
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(final)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}{_PARTIAL}", dir=final.parent))
        temporary.chmod(0o755)
        return temporary
    except OSError as error:
        raise MixMoEError(f"{final} cannot be written: {error}.") from None


def _put_in_place(temporary: Path, final: Path) -> None:
    replaced = None
    if final.exists():
        replaced = temporary.with_name(temporary.name.replace(_PARTIAL, _REPLACED))
        os.rename(final, replaced)
    os.rename(temporary, final)
    if replaced is not None:
        shutil.rmtree(replaced)


def _clear_leftovers(final: Path) -> None:
    """Remove what killed runs left beside `final`; put back what one had moved aside and not yet replaced."""
    name = glob.escape(final.name)
    for path in final.parent.glob(f".{name}{_REPLACED}*"):
        if final.exists() and any(final.iterdir()):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, final)
    for path in final.parent.glob(f".{name}{_PARTIAL}*"):
        held = _lock(path)
        if held is not None:  # nobody writes there any more
            shutil.rmtree(path, ignore_errors=True)
            os.close(held)


def _lock(directory: Path) -> int | None:
    """Lock a directory as long as this process lives; None: another holds it, or the file system has no locks."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
