"""All methods, and how the rest of the package finds a phase: by its name, or by the number of --mixmoe-stage."""

from __future__ import annotations

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.base import Method, Phase
from mixmoe_megatron.methods.full import DENSE, FULL
from mixmoe_megatron.methods.mixmoe import MIXMOE, STAGE1, STAGE2

METHODS: dict[str, Method] = {method.name: method for method in (FULL, MIXMOE)}
PHASES: dict[str, Phase] = {phase.name: phase for method in METHODS.values() for phase in method.phases}
#: The number of --mixmoe-stage -> the phase that it trains.
STAGES: dict[int, Phase] = {0: DENSE, 1: STAGE1, 2: STAGE2}


def method_of(phase: Phase) -> Method:
    """Return the method that a phase belongs to."""
    return next(method for method in METHODS.values() if phase in method.phases)


def phase_of_stage(stage: int) -> Phase:
    """Return the phase that a stage's number names.

    Raises:
        MixMoEError: it is not 0, 1 or 2.
    """
    if stage not in tuple(STAGES):
        raise MixMoEError(f"mixmoe_stage must be 0 (dense), 1 or 2, got {stage!r}.")
    return STAGES[stage]
