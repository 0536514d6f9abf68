"""What the papers say: mechanisms as declarative equation files, and the language that reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnspec.spec.language.errors import EvaluationError, SpecError

if TYPE_CHECKING:
    from attnspec.spec.mechanism import Mechanism, load, mechanisms

__all__ = ["EvaluationError", "Mechanism", "SpecError", "load", "mechanisms"]


def __getattr__(name: str) -> Any:
    """Mechanisms on demand: the language can be used without them."""
    if name in ("Mechanism", "load", "mechanisms"):
        from attnspec.spec import mechanism

        return getattr(mechanism, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
