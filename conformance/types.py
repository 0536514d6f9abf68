"""The types that travel between the stations of a conformance run.

case -> (oracle, candidate) -> judgement -> report. All are plain data: they pickle to a worker and serialise to JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Direction = Literal["forward", "backward"]
Level = Literal["smoke", "standard", "exhaustive"]
Status = Literal[
    "pass", "fail", "refused", "not_supported", "error", "crash", "timeout", "xfail", "xpass", "skip"
]
LEVELS: tuple[Level, ...] = ("smoke", "standard", "exhaustive")


class Unsupported(NotImplementedError):  # noqa: N818 (what a candidate raises reads as a statement)
    """A candidate refuses a case that it cannot compute. Refusing is right; computing something else is not."""


@dataclass(frozen=True)
class Case:
    """One thing to judge. `id` is complete: `case_from_id(id)` rebuilds the case on any machine.

    `check` is "tolerance", or the name of an exact probe, or "determinism", "batch", "state", "refusal".
    `inputs` names the optional inputs that are present; `options` holds only what is set.
    """

    id: str
    mechanism: str
    group: str
    level: Level
    sizes: Mapping[str, int]
    options: Mapping[str, Any]
    inputs: tuple[str, ...]
    values: str
    layout: str
    dtype: str
    direction: Direction
    check: str
    seed: int
    rows: Mapping[str, tuple[int, ...]] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class CaseData:
    """The arrays of a case: float64 NumPy already rounded to the case's dtype; masks bool, ids and lengths int64."""

    inputs: dict[str, Any]
    options: dict[str, Any]
    cotangents: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Observation:
    """What a candidate did with a case: arrays as float64 NumPy, and how it ended."""

    status: Literal["returned", "refused", "error", "crash", "timeout"]
    outputs: dict[str, Any] = field(default_factory=dict)
    gradients: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    traceback: str = ""
    seconds: float = 0.0
    receipt: dict[str, Any] = field(default_factory=dict)
    memory_faults: list[str] = field(default_factory=list)
    repeats: list[dict[str, Any]] = field(default_factory=list)
    printed: str = ""


@dataclass(frozen=True)
class CandidateSignature:
    """What a candidate takes and states about itself, found without running it: what `cases_for` needs to know.

    `inputs` and `options` are the mechanism's names that the function takes (after aliases); `not_taken` maps every
    other name to the reason. `outputs` are the mechanism's outputs that it returns (None: known only after a call,
    the first output at least). `required` are optional inputs without which the function cannot be called.
    """

    name: str
    mechanism: str
    inputs: frozenset[str]
    options: frozenset[str]
    not_taken: Mapping[str, str]
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]
    framework: str
    declares: Mapping[str, Any]
    outputs: tuple[str, ...] | None
    differentiable: tuple[str, ...]
    required: frozenset[str] = frozenset()
    rounding: str | None = None
    form: str | None = None
    layout: str = ""
    source: str = ""
    version: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class OutputEvidence:
    """The judgement of one output of one case, with the figures that it rests on."""

    name: str
    passed: bool
    elements: int
    rms_z: float
    max_z: float
    rms_limit: float
    max_limit: float
    worst_index: tuple[int, ...] = ()
    worst_got: float = 0.0
    worst_want: float = 0.0
    worst_sigma: float = 0.0
    either_choice_rows: int = 0
    message: str = ""


@dataclass
class CaseResult:
    case: Case
    status: Status
    evidence: list[OutputEvidence] = field(default_factory=list)
    message: str = ""
    diagnosis: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    oracle_seconds: float = 0.0
    receipt: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """A whole run. `exit_code`: 0 conforms, 1 does not, 2 could not judge."""

    candidate: str
    mechanism: str
    level: Level
    results: list[CaseResult]
    declares: dict[str, Any]
    not_supported: dict[str, str]
    environment: dict[str, Any]
    seed: int
    rounding: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    exit_code: int = 2
    summary: str = ""
    problems: list[str] = field(default_factory=list)
    """What makes the run fail beside its cases: entries of skip and xfail lists that do not hold."""
