"""How a function of Megatron is replaced: the new one may call the old one, and nothing is ever stacked."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def wrap(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Put a function in the place of another, which it may call.

    A function has one replacement: a second call for it takes the place of the first, and nothing is stacked.

    Args:
        owner: the module or the class in which the function is looked up.
        name: the function's name there.
        replacement: called with the original function and then with the arguments of the call.
    """
    current = getattr(owner, name)
    original = getattr(current, "replaces", current)

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    replaced.replaces = original  # type: ignore[attr-defined]
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(replaced) if is_static else replaced)
