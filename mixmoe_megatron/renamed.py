"""Import paths of scripts that were written before a move: the old name answers for one release, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any


def attributes_of(new_name: str, old_name: str) -> Callable[[str], Any]:
    """Return a module's `__getattr__` that takes each attribute from the module's new place and warns of it.

    Args:
        new_name: dotted name of the module that holds the attributes now.
        old_name: dotted name of the module that the function is for.
    """

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {old_name!r} has no attribute {name!r}")
        message = f"{old_name} is now {new_name}; the old name goes with the next release."
        warnings.warn(message, FutureWarning, stacklevel=2)
        return getattr(import_module(new_name), name)

    return __getattr__
