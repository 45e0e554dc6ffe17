"""A method that trains the layer norms alone, declared from outside the package: what another method costs to add."""

from __future__ import annotations

from mixmoe_megatron.methods.base import Method, Phase
from mixmoe_megatron.methods.registry import METHODS, PHASES, register

NORMS = Phase(
    name="norms",
    groups=(),
    trains=("norms",),
    starts_from=("norms",),
    data=("monolingual", "parallel"),
    made_by="convert a dense model with hf_to_mixmoe.py --method norms.",
)


def register_norms() -> None:
    """Make the method known in this process, once."""
    if "norms" not in METHODS:
        register(Method("norms", "the layer norms of the dense model", (NORMS,)))


def forget_norms() -> None:
    """Leave the registry as it was, for the tests that follow in this process."""
    METHODS.pop("norms", None)
    PHASES.pop("norms", None)
