"""What `make real` may train in its hours, and what the training cost.

budget.py plan OUT HOURS PAIR  write OUT/plan: the steps that the measured tokens a second leave room for
budget.py costs OUT PAIR       print a table of steps, tokens, seconds and trained parameters
budget.py rates OUT PAIR       print what was tried with RATES=1
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import fmean

from mixmoe_megatron.cli import run_command, write_text
from mixmoe_megatron.study.tables import table
from mixmoe_megatron.study.training_log import read_parameters

STEPS = {"stage1": 3, "stage2": 10, "sft": 10}  # of one part, in the quickstart's proportion
EXPORTS = EVALUATIONS = 4  # upcycled, stage 1, Mix-MoE and full fine-tuning come after the plan
STEP_MS = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")
TOKENS_PER_SECOND = re.compile(r"tokens_per_second: ([\d.E+-]+)")
VALID_LOSS = re.compile(r"on validation set \| lm loss value: ([\d.E+-]+)")
MONO_TOKENS = 4 * 256  # of a step: run.sh's MONO_BATCH sequences
PAIR_BATCH = 8


def parts_in(hours: float, spent: dict[str, float], step_seconds: dict[str, float]) -> int:
    """Return how often the steps of `STEPS` fit into what is left of the hours, at least once.

    Args:
        hours: Of the whole run.
        spent: Finished step of the run to its seconds: the base's conversion and evaluation tell what those of the
            trained models will take, the measurements what starting a training takes.
        step_seconds: Name of a training to the seconds of one of its steps.
    """
    starts = sum(spent[f"measure_{name}"] for name in STEPS)
    later = starts + EXPORTS * spent["dense"] + EVALUATIONS * spent["zero_shot"]
    left = 3600 * hours - sum(spent.values()) - later
    return max(1, int(left / sum(STEPS[name] * step_seconds[name] for name in STEPS)))


def seconds_of(out: Path) -> dict[str, float]:
    """Return each finished step of a run with its seconds."""
    return {path.name: float(path.read_text()) for path in (out / "steps").iterdir()}


def tokens_of_steps(out: Path, pair: str) -> dict[str, float]:
    """Return the tokens of a step of each training; of pairs, whose steps differ in length, the mean."""
    manifest = json.loads((out / "data" / f"{pair}.json").read_text("utf-8"))
    pairs = PAIR_BATCH * manifest["tokens"] / manifest["documents"]
    return {"stage1": MONO_TOKENS, "stage2": pairs, "sft": pairs}


def write_plan(out: Path, hours: float, pair: str) -> None:
    """Write the steps of stage 1, and of stage 2 and full fine-tuning, as lines of the shell; first steps are slow.

    The pairs of the measured steps may be short or long: the tokens a second of stage 2, which its log has, tell how
    many times as long a step of mean length takes.
    """
    logs = {name: (out / "logs" / f"measure_{name}.log").read_text("utf-8") for name in STEPS}
    step_seconds = {name: fmean(map(float, STEP_MS.findall(log)[-3:])) / 1000 for name, log in logs.items()}
    rates = [float(rate) for rate in TOKENS_PER_SECOND.findall(logs["stage2"])[-3:]]
    longer = fmean(tokens_of_steps(out, pair)["stage2"] / rate for rate in rates) / step_seconds["stage2"]
    for name in ("stage2", "sft"):  # both read the same steps
        step_seconds[name] *= longer
    parts = parts_in(hours, seconds_of(out), step_seconds)
    write_text(out / "plan", f"STAGE1_STEPS={STEPS['stage1'] * parts} STAGE2_STEPS={STEPS['stage2'] * parts}\n")


def print_costs(out: Path, pair: str) -> None:
    """Print what each training cost: a part of the pairs' tokens is the mean of the token file."""
    step_tokens, rows = tokens_of_steps(out, pair), []
    for name, seconds in seconds_of(out).items():
        if name in STEPS:
            log = out / "logs" / f"{name}.log"
            steps = int(re.findall(r"iteration +\d+/ *(\d+)", log.read_text("utf-8"))[-1])
            trained, total = read_parameters(log)
            rows.append([name, str(steps), f"{steps * step_tokens[name]:,.0f}", f"{seconds:.0f}", trained, total])
    print(table(["training", "steps", "tokens", "seconds", "trained parameters", "all parameters"], sorted(rows)))


def print_rates(out: Path, pair: str) -> None:
    """Print the loss on valid text of each training and learning rate that was tried, the lowest one chosen."""
    losses: dict[str, dict[float, float]] = {}
    for path in (out / "logs").glob("rate_*.log"):
        _, name, rate = path.stem.split("_")
        losses.setdefault(name, {})[float(rate)] = float(VALID_LOSS.findall(path.read_text("utf-8"))[-1])
    rows = [
        [name, f"{rate:.3g}", f"{losses[name][rate]:.4f}", "yes" * (losses[name][rate] == min(losses[name].values()))]
        for name in STEPS
        for rate in sorted(losses[name])
    ]
    print(table(["training", "learning rate", f"loss on valid text, {pair}", "chosen"], rows))


def main() -> int:
    """Run the command and return its exit status."""
    command, out, *values = sys.argv[1:]
    commands = {"plan": lambda: write_plan(Path(out), float(values[0]), values[1]),
                "costs": lambda: print_costs(Path(out), *values),
                "rates": lambda: print_rates(Path(out), *values)}  # fmt: skip
    return run_command(commands[command])


if __name__ == "__main__":
    sys.exit(main())
