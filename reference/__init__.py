"""The mechanisms a second time: slow NumPy that reads like the paper's algorithm, independent of the equations.

A mechanism's module has its name and two functions: `<name>` returns the outputs by name, `<name>_backward` the
gradients by input name. Nothing here imports the specification: the two must be able to disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def find(name: str) -> tuple[Callable[..., dict[str, Any]], Callable[..., dict[str, Any]] | None]:
    """Forward and backward function of the mechanism `name`; backward is None where there is none.

    Raises:
        LookupError: there is no reference of that name.
    """
    module = f"{__name__}.{name}"
    if not name.isidentifier() or find_spec(module) is None:
        raise LookupError(f"no reference for the mechanism {name!r}")
    found = import_module(module)
    return getattr(found, name), getattr(found, f"{name}_backward", None)
