"""What Megatron would compile when it starts, on a machine that cannot.

Source: `megatron.core.jit`, which calls torch.compile as soon as Megatron is imported, whatever --disable-jit-fuser
says later; `megatron.core.datasets.utils.compile_helpers`, which calls `make`, while its wheel has the helpers compiled
and no Makefile. Read at megatron-core 0.19.2.
"""

from __future__ import annotations

import importlib

from mixmoe_megatron.machine import Machine, can_import


def compile_nothing(machine: Machine) -> None:
    """Leave out what need not or cannot be compiled; call it before Megatron's own modules are imported.

    Args:
        machine: a GPU without a compiler takes small functions as they are written.
    """
    if machine.gpu is not None and not machine.compiler:
        importlib.import_module("torch._dynamo").config.disable = True
    if can_import("megatron.core.datasets.helpers_cpp"):
        from megatron.core.datasets import utils

        utils.compile_helpers = lambda: None
