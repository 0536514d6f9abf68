"""What the papers say: mechanisms as declarative equation files, and the language that reads them."""

from __future__ import annotations

from attnspec.spec.language.errors import EvaluationError, SpecError
from attnspec.spec.mechanism import Mechanism, load, mechanisms

__all__ = ["EvaluationError", "Mechanism", "SpecError", "load", "mechanisms"]
