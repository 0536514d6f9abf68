"""Planted kernels: wrong softmax-attention kernels modelled on bugs that really happened.

Every change to the suite must go on rejecting them. `all()` finds them in the modules of this package; each can be
judged like any candidate, as `attnspec check attnspec.conformance.planted:NAME --mechanism softmax_attention`. The
honest kernels that they are made from (`honest.HONEST`) must pass. Needs torch.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from attnspec.conformance.planted.registry import Planted

__all__ = ["Planted", "all", "find"]


@functools.cache
def _registry() -> dict[str, Planted]:
    from attnspec.conformance.planted.registry import REGISTRY

    for info in sorted(pkgutil.iter_modules(__path__), key=lambda entry: entry.name):
        importlib.import_module(f"{__name__}.{info.name}")
    return REGISTRY


def all() -> list[Planted]:  # noqa: A001 - the package's one verb
    """All planted kernels, sorted by name.

    Raises:
        ImportError: torch is not installed.
    """
    return sorted(_registry().values(), key=lambda entry: entry.name)


def find(name: str) -> Planted:
    """The planted kernel of this name; KeyError with the known names otherwise."""
    known = _registry()
    if name not in known:
        raise KeyError(f"no planted kernel {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def __getattr__(name: str) -> Callable[..., Any]:
    """`attnspec.conformance.planted:NAME`, for the command line: a planted kernel or one of the honest ones."""
    if name.startswith("_") or name in vars(builtins):
        raise AttributeError(name)
    try:
        known = _registry()
    except ImportError as error:
        raise AttributeError(f"{name} (planted kernels need torch: {error})") from None
    if name in known:
        return known[name].function
    from attnspec.conformance.planted.honest import HONEST

    if name in HONEST:
        return HONEST[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
