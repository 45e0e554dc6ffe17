"""Run many command lines in one process, where a process for each would spend its time on imports.

    python -m tests.helpers.command_batch WATCHED_DIR < command_lines.json > results.json

Each command's file is run as a script. A result holds status, stdout, stderr, and what changed below WATCHED_DIR. What
a command prints goes through the encoding that this process's own stdout has.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def listing(directory: Path) -> dict[str, int]:
    """Return the size in bytes of every file below a directory; a folder counts as -1."""
    return {str(path): path.stat().st_size if path.is_file() else -1 for path in sorted(directory.rglob("*"))}


def run_one(words: list[str]) -> tuple[Any, str, str]:
    """Run one command line and return its exit status, stdout and stderr."""
    written, err = io.BytesIO(), io.StringIO()
    out = io.TextIOWrapper(written, encoding=sys.stdout.encoding, errors=sys.stdout.errors, write_through=True)
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
    return status, written.getvalue().decode(out.encoding, "replace"), err.getvalue()


def run_batch(
    lines: list[str] | list[list[str]], watched: Path, environment: dict[str, str] | None = None, cwd: Path = ROOT
) -> list[dict[str, Any]]:
    """Run command lines in one process of their own.

    Args:
        lines: a script, relative to `cwd`, and its arguments: as a list, or blanks between.
        watched: where changes are looked for.
        environment: variables beside this process's; an empty one is taken away.
        cwd: the working directory.

    Returns:
        The results, in the order of `lines`.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.command_batch", str(watched)],
        input=json.dumps([line.split() if isinstance(line, str) else line for line in lines]),
        cwd=cwd,
        env=clean_environment(environment),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def clean_environment(changes: dict[str, str] | None) -> dict[str, str]:
    """Return this process's environment with changes; an empty value takes a variable away."""
    # the first command of a batch may do without torch (see data/tokenizers.py), and the next one not
    whole = {**os.environ, "PYTHONPATH": str(ROOT), "USE_TORCH": "AUTO", **(changes or {})}
    return {name: value for name, value in whole.items() if value}


def assert_one_sentence(stderr: str, message: str) -> None:
    """Check that an error is one clear sentence, the last line, and that it holds `message`."""
    lines = stderr.splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1], stderr[-2000:]
    assert sum("error:" in line for line in lines) == 1
    assert "Traceback" not in stderr and "usage:" not in stderr


def main() -> None:
    """Read the command lines, run them, write the results."""
    watched = Path(sys.argv[1])
    answer = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what libraries in other languages say there is no part of the results
    results = []
    for words in json.load(sys.stdin):
        before = listing(watched)
        status, out, err = run_one(words)
        after = listing(watched)
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        results.append({"status": status, "out": out, "err": err, "changed": changed})
    json.dump(results, answer)
    answer.close()


if __name__ == "__main__":
    main()
