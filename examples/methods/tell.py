"""Tell what a run of this example gave: tell.py OUT prints a table of its methods and phases."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mixmoe_megatron.cli import run_command
from mixmoe_megatron.study.tables import table

LOSS = re.compile(r"iteration +(\d+)/.*?lm loss: ([\d.E+-]+)")
PARAMETERS = re.compile(r"trained ([\d,]+) of ([\d,]+) parameters")
RELOADED = re.compile(r"^(\w+) reloaded and generates", re.MULTILINE)


def rows(out: Path) -> list[list[str]]:
    """Return a row for each phase of each method, in the order in which they ran."""
    logs = sorted((out / "steps").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    exports = {
        path.name.removesuffix("_export"): RELOADED.findall((out / "logs" / f"{path.name}.log").read_text("utf-8"))[-1]
        for path in logs
        if path.name.endswith("_export")
    }
    found = []
    for path in logs:
        text = (out / "logs" / f"{path.name}.log").read_text("utf-8")
        if losses := dict(LOSS.findall(text)):
            method = max((name for name in exports if path.name.startswith(f"{name}_")), key=len)
            trained, total = PARAMETERS.findall(text)[-1]
            first, last = (float(losses[step]) for step in (min(losses, key=int), max(losses, key=int)))
            phase = path.name.removeprefix(f"{method}_")
            found.append([method, phase, f"{first:.3f}", f"{last:.3f}", trained, total, exports[method]])
    return found


def main() -> int:
    """Run the command and return its exit status."""
    names = ["method", "phase", "first loss", "last loss", "trained parameters", "all parameters", "export"]
    return run_command(lambda: print(table(names, rows(Path(sys.argv[1])))))


if __name__ == "__main__":
    sys.exit(main())
