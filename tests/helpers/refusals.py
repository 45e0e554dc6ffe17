"""Folders that refuse every change, for whatever user: a read-only home, a full or unwritable temporary folder.

Root may write anywhere, and few machines let a test mount a file system: so a process refuses its own changes, by
Python's audit events. What libraries in other languages write goes by unseen.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

_VARIABLE = "REFUSED_FOLDERS"
_CHANGES = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.symlink": 1, "os.link": 1}
_STARTUP = "import sys\nsys.path.append({!r})\nfrom tests.helpers.refusals import install\ninstall()\n"


def refusing_environment(site: Path, root: Path, folders: dict[str, int], spared: list[Path]) -> dict[str, str]:
    """Return the variables with which Python processes refuse changes below folders.

    Args:
        site: A folder to write a sitecustomize.py to.
        root: The repository.
        folders: Folder -> the error's number, such as errno.EROFS.
        spared: Folders below which changes are allowed all the same.
    """
    site.mkdir(parents=True)
    (site / "sitecustomize.py").write_text(_STARTUP.format(str(root)), "utf-8")
    rules = {os.path.realpath(folder): number for folder, number in folders.items()}
    return {
        "PYTHONPATH": f"{root}{os.pathsep}{site}",
        _VARIABLE: json.dumps({"folders": rules, "spared": [os.path.realpath(folder) for folder in spared]}),
    }


def install() -> None:
    """Refuse changes in this process, from now on."""
    rules = json.loads(os.environ[_VARIABLE])
    folders, spared = rules["folders"], rules["spared"]

    def below(path: str, folder: str) -> bool:
        return path == folder or path.startswith(folder.rstrip("/") + "/")

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        place = _CHANGES.get(event)
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            place = 0 if writes and isinstance(arguments[0], str | bytes | os.PathLike) else None
        if place is None:
            return
        path = os.path.abspath(os.fsdecode(arguments[place]))  # type: ignore[arg-type]
        number = next((number for folder, number in folders.items() if below(path, folder)), None)
        if number is not None and not any(below(path, folder) for folder in spared):
            raise OSError(number, os.strerror(number), path)

    sys.addaudithook(refuse)
