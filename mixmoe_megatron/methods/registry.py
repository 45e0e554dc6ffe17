"""All methods, and how the rest of the package finds a phase: by its name, or by the number of --mixmoe-stage."""

from __future__ import annotations

from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.methods.base import Method, Phase
from mixmoe_megatron.methods.full import DENSE, FULL
from mixmoe_megatron.methods.llama_moe_v2 import LLAMA_MOE_V2, LLAMA_MOE_V2_RESIDUAL
from mixmoe_megatron.methods.llama_pro import LLAMA_PRO
from mixmoe_megatron.methods.lora import LORA
from mixmoe_megatron.methods.mixmoe import MIXMOE, STAGE1, STAGE2
from mixmoe_megatron.methods.moe import MOE
from mixmoe_megatron.methods.moe_lpr import MOE_LPR

METHODS: dict[str, Method] = {}
PHASES: dict[str, Phase] = {}


def register(method: Method) -> None:
    """Make a method known: commands, metadata, freezing and counts of work read it from here.

    Raises:
        ValueError: it, or one of its phases, has the name of another.
    """
    phases = {phase.name: phase for phase in method.phases}
    if method.name in METHODS or PHASES.keys() & phases.keys():
        raise ValueError(f"the method {method.name!r}, or a phase of that name, is registered already.")
    METHODS[method.name] = method
    PHASES.update(phases)


for _method in (FULL, MIXMOE, LORA, LLAMA_PRO, MOE, MOE_LPR, LLAMA_MOE_V2, LLAMA_MOE_V2_RESIDUAL):
    register(_method)
#: The number of --mixmoe-stage -> the phase that it trains.
STAGES: dict[int, Phase] = {0: DENSE, 1: STAGE1, 2: STAGE2}


def method_of(phase: Phase) -> Method:
    """Return the method that a phase belongs to."""
    return next(method for method in METHODS.values() if phase in method.phases)


def trained_phases() -> dict[str, Phase]:
    """Return the phases that training makes, by name: what --phase may be."""
    return {name: phase for name, phase in PHASES.items() if phase.trains}


def phase_of_stage(stage: int) -> Phase:
    """Return the phase that a stage's number names.

    Raises:
        MixMoEError: it is not 0, 1 or 2.
    """
    if stage not in tuple(STAGES):
        raise MixMoEError(f"mixmoe_stage must be 0 (dense), 1 or 2, got {stage!r}.")
    return STAGES[stage]
