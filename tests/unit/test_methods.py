"""The table of methods and phases: what the rest of the package takes for granted, and that reading it is quick."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.base import ALL_PARAMETERS, NEW_LAYERS, PARTS
from mixmoe_megatron.methods.registry import METHODS, PHASES, STAGES, method_of, phase_of_stage

HEAVY = ("torch", "megatron", "numpy", "transformers")


def test_the_table_is_whole() -> None:
    phases = [phase for method in METHODS.values() for phase in method.phases]
    assert len({phase.name for phase in phases}) == len(phases) == len(PHASES)
    for phase in phases:
        assert set(phase.trains) <= {*PARTS, ALL_PARAMETERS, NEW_LAYERS}
        assert phase.starts_from and set(phase.starts_from) <= set(PHASES)
        assert set(phase.data) <= {"monolingual", "parallel"} and bool(phase.data) == bool(phase.trains)
        assert phase.made_by.endswith(".")
        assert phase in method_of(phase).phases


def test_a_stage_is_the_number_of_its_phases_groups() -> None:
    assert {number: phase.name for number, phase in STAGES.items()} == {0: "dense", 1: "stage1", 2: "stage2"}
    for number in STAGES:
        assert phase_of_stage(number).stage == number and phase_of_stage(number).trains
    for number in (3, "1", None, [1]):
        with pytest.raises(MixMoEError, match=r"mixmoe_stage must be 0 \(dense\), 1 or 2, got "):
            phase_of_stage(number)  # type: ignore[arg-type]


def test_importing_the_table_and_the_metadata_is_quick() -> None:
    """Conversions that only move values start without torch."""
    code = "import sys, mixmoe_megatron.methods.registry, mixmoe_megatron.checkpoint.metadata; "
    code += f"sys.exit(', '.join(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
