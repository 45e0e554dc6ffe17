"""Run many command lines in one process, where a process for each would spend its time on imports.

    python -m tests.helpers.command_batch WATCHED_DIR < command_lines.json > results.json

Each command's file is run as a script. A result holds status, stdout, stderr, and what changed below WATCHED_DIR.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any


def listing(directory: Path) -> dict[str, int]:
    """Return the size in bytes of every file below a directory; a folder counts as -1."""
    return {str(path): path.stat().st_size if path.is_file() else -1 for path in sorted(directory.rglob("*"))}


def run_one(words: list[str]) -> tuple[Any, str, str]:
    """Run one command line and return its exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    sys.argv = list(words)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
    return status, out.getvalue(), err.getvalue()


def main() -> None:
    """Read the command lines, run them, write the results."""
    watched = Path(sys.argv[1])
    results = []
    for words in json.load(sys.stdin):
        before = listing(watched)
        status, out, err = run_one(words)
        after = listing(watched)
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        results.append({"status": status, "out": out, "err": err, "changed": changed})
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
