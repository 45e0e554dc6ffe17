"""Is an iteration of a torch_dist checkpoint whole? Names the damaged file, and the newest iteration that is whole.

What an interrupted save or a failing disk leaves: an iteration without `.metadata` (written last), files that are
missing or shorter than `.metadata` says, an empty tracker file, altered bytes. Sizes are always compared, which costs
no reading; altered bytes are found with `full`, by the CRC-32 of the zip records that tensors are stored in. PyTorch
does not look at those when it loads.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from mixmoe_megatron.checkpoint.megatron_checkpoint import (
    COMMON_STATE_KEY,
    RELEASE,
    TRACKER_FILE,
    StoredEntry,
    check_files,
    iteration_directory,
    stored_entries,
)
from mixmoe_megatron.checkpoint.streaming import FileView
from mixmoe_megatron.errors import MixMoEError

_ITERATION = re.compile(r"iter_(\d{7,})|release")
_LEGACY_COMMON = "common.pt"  # where Megatron kept the common state before 0.16


def find_damage(directory: str | Path, *, full: bool = False) -> str | None:
    """Say what is wrong with one iteration of a torch_dist checkpoint.

    Args:
        directory: of the iteration.
        full: read every byte and compare it with its CRC-32, not only the sizes and the common state.

    Returns:
        The damaged file and what is wrong with it, or None when the iteration is whole.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return f"{directory} is missing"
    if not (directory / ".metadata").is_file():
        return f"{directory / '.metadata'} is missing, saving was interrupted"
    try:
        entries = stored_entries(directory)
        check_files(directory, entries)
        config = json.loads((directory / "metadata.json").read_text(encoding="utf-8"))
    except MixMoEError as error:
        return str(error).removesuffix(".")
    except (OSError, ValueError) as error:
        return f"{directory / 'metadata.json'} cannot be read ({error})"
    if not isinstance(config, dict) or config.get("sharded_backend") != "torch_dist":
        return f"{directory / 'metadata.json'} does not name the format torch_dist"
    files: dict[str, list[StoredEntry]] = {}
    for entry in entries:
        files.setdefault(entry.file, []).append(entry)
    common = directory / _LEGACY_COMMON
    if common.is_file():
        files[common.name] = [StoredEntry(COMMON_STATE_KEY, common.name, 0, common.stat().st_size)]
    elif all(entry.key != COMMON_STATE_KEY for entry in entries):
        return f"{common} is missing"
    for name, parts in sorted(files.items()):
        read = [part for part in parts if full or part.key == COMMON_STATE_KEY]
        if damage := _altered_bytes(directory / name, sorted(read, key=lambda part: part.offset)):
            return damage
    return None


def _altered_bytes(path: Path, parts: list[StoredEntry]) -> str | None:
    """Compare the zip archives, as which torch stores the entries, with their CRC-32."""
    with path.open("rb") as stream:
        for part in parts:
            try:
                with zipfile.ZipFile(FileView(stream.fileno(), part.offset, part.length)) as archive:
                    altered = archive.testzip() is not None
            except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError):
                altered = True
            if altered:
                return f"{path} has altered bytes in {part.key}"
    return None


def saved_iterations(checkpoint_dir: str | Path) -> list[Path]:
    """Return the directories of all iterations, damaged ones included, oldest first; `release` is the oldest.

    Raises:
        MixMoEError: `checkpoint_dir` is not a directory.
    """
    root = Path(checkpoint_dir)
    if not root.is_dir():
        raise MixMoEError(f"{checkpoint_dir} is not a directory.")
    found = [path for path in root.iterdir() if _ITERATION.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("iter_")) if path.name != RELEASE else -1)


def whole_iteration(
    checkpoint_dir: str | Path, iteration: int | None = None, *, flag: str | None = None, full: bool = False
) -> Path:
    """Return the directory of an iteration after a check that it is whole; never another one in its place.

    Args:
        checkpoint_dir: with a tracker file.
        iteration: None: the one that the tracker file names.
        flag: of the calling command, which chooses an iteration; None when it has none.
        full: see `find_damage`.

    Raises:
        MixMoEError: the tracker file or the iteration is damaged; tells what is wrong and how to take the newest
            iteration that is whole.
    """
    root = Path(checkpoint_dir)
    iterations = saved_iterations(root)
    try:
        directory = iteration_directory(root, iteration)
    except MixMoEError as error:
        if not iterations:
            raise
        raise MixMoEError(f"{error} {_offer(root, iterations, None, full)}") from None
    if damage := find_damage(directory, full=full):
        others = [other for other in iterations if other != directory]
        raise MixMoEError(f"{directory.name} of {root} is damaged: {damage}. {_offer(root, others, flag, full)}")
    return directory


def _offer(root: Path, iterations: list[Path], flag: str | None, full: bool) -> str:
    whole = next((path.name for path in reversed(iterations) if find_damage(path, full=full) is None), None)
    if whole is None:
        return f"No other iteration in {root} is whole: start again in another directory."
    number = whole if whole == RELEASE else str(int(whole.removeprefix("iter_")))
    how = f"`echo {number} > {root / TRACKER_FILE}`" if flag is None or whole == RELEASE else f"{flag} {number}"
    return f"The newest other one that is whole is {whole}: {how} chooses it."
