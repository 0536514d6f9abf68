"""The papers that this specification accounts for: each led to a mechanism, or has a stated reason why it did not."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FILE = Path(__file__).parent / "papers.toml"


@dataclass(frozen=True)
class Paper:
    """A paper of the catalogue. Exactly one of `mechanism` and `reason` is set."""

    number: int
    title: str
    mechanism: str | None = None
    family: str | None = None
    kind: str | None = None
    tier: str | None = None
    summary: str = ""
    reason: str | None = None

    def status(self, mechanisms: frozenset[str]) -> Literal["done", "planned", "none"]:
        """ "done" when the mechanism's file exists, "planned" when it does not yet, "none" without a mechanism."""
        if self.mechanism is None:
            return "none"
        return "done" if self.mechanism in mechanisms else "planned"


@functools.cache
def papers() -> tuple[Paper, ...]:
    """All papers in the catalogue's order."""
    raw = tomllib.loads(FILE.read_text(encoding="utf-8"))
    return tuple(Paper(**entry) for entry in raw["paper"])
