"""Read training curves: JSONL (one line a step), Megatron's console log, or a TensorBoard directory."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mixmoe_megatron.data.corpus import read_lines
from mixmoe_megatron.errors import MixMoEError

Curves = dict[str, list[tuple[int, float]]]
_MEGATRON_STEP = re.compile(r"\biteration\s+(\d+)/\s*\d+ \|(.*)")
_TRAINED = re.compile(r"trained ([\d,]+) of ([\d,]+) parameters")  # model/freezing.py says it
_MEGATRON_VALUE = re.compile(r"([A-Za-z][\w() -]*?): +(-?[\d.]+(?:[Ee][+-]?\d+)?)(?= |\||$)")


def _from_jsonl(path: Path) -> list[tuple[int, dict[str, float]]]:
    """Read {"iteration": 1, "lm_loss": 5.1, ...} lines."""
    steps = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            iteration = int(record.pop("iteration"))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise MixMoEError(f"{path}, line {number}: not a JSON object with an 'iteration'.") from error
        steps.append((iteration, {name: float(value) for name, value in record.items()
                                  if isinstance(value, int | float) and not isinstance(value, bool)}))  # fmt: skip
    return steps


def _from_megatron(path: Path) -> list[tuple[int, dict[str, float]]]:
    """Read the ` iteration 1/ 100 | ... | lm loss: 5.1E+00 | ...` lines that Megatron prints."""
    steps = []
    for _, line in read_lines(path):
        if match := _MEGATRON_STEP.search(line):
            values = {_normalise(name): float(value) for name, value in _MEGATRON_VALUE.findall(match[2])}
            steps.append((int(match[1]), values))
    return steps


def _from_tensorboard(path: Path) -> list[tuple[int, dict[str, float]]]:
    """Read all scalars of an event directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    return [
        (event.step, {_normalise(tag): event.value})
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    ]


def _normalise(name: str) -> str:
    """Turn 'lm loss' and 'grad-norm' into lm_loss and grad_norm."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")


def read_parameters(path: Path) -> tuple[str, str]:
    """Return how many parameters a run's console log says are trained, and how many the model has, as it writes them.

    Raises:
        MixMoEError: The log does not say it.
    """
    found = _TRAINED.findall(path.read_text(encoding="utf-8", errors="replace"))
    if not found:
        raise MixMoEError(f"{path} does not say how many parameters are trained.")
    return tuple(found[-1])


def read_training_log(path: str | Path) -> Curves:
    """Read a training log.

    Args:
        path: A .jsonl file, a TensorBoard directory, or any other file with Megatron's console output.

    Returns:
        Name (lm_loss, lm_load_balancing_loss, grad_norm ...) to (iteration, value) in the order of iterations. Where a
        resumed run repeats an iteration, its last value counts.

    Raises:
        MixMoEError: The log is missing, malformed, or holds no step.
    """
    path = Path(path)
    if not path.exists():
        raise MixMoEError(f"There is no training log {path}.")
    read = _from_tensorboard if path.is_dir() else _from_jsonl if path.suffix == ".jsonl" else _from_megatron
    latest: dict[str, dict[int, float]] = {}
    for iteration, values in read(path):
        for name, value in values.items():
            latest.setdefault(name, {})[iteration] = value
    if "lm_loss" not in latest:
        raise MixMoEError(f"{path} holds no training step with a loss (lm_loss).")
    return {name: sorted(points.items()) for name, points in latest.items()}
