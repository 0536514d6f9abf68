"""Judging from Python: what the command line, the pytest plugin and `attnspec.check` share.

`check` runs a whole judgement, `repro` one case, `plan` lists cases without running them. All raise `CandidateError`,
`SpecError`, `FileError` or `CannotJudgeError` with one clear line where nothing can be judged; what a candidate does
wrong is never an exception but a result in the report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnspec.conformance.types import LEVELS, Case, CaseResult, Direction, Level, Report

if TYPE_CHECKING:
    from attnspec.conformance.candidate import Candidate
    from attnspec.conformance.process import Worker
    from attnspec.conformance.suite import Suite

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
TIMEOUT = 60.0

Progress = Callable[[int, int, CaseResult], None]


class CannotJudgeError(ValueError):
    """There is nothing to judge, or not the means to. One line that says what was given and what is wanted."""


def check(
    candidate: str | Candidate | Callable[..., Any],
    mechanism: str | None = None,
    *,
    level: Level = "standard",
    dtypes: Sequence[str] | None = None,
    device: str = "cpu",
    directions: Sequence[Direction] = DIRECTIONS,
    seed: int = 0,
    select: Sequence[str] = (),
    shard: str | None = None,
    expect: Sequence[str | Path] = (),
    timeout: float = TIMEOUT,
    explain: bool = True,
    isolated: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Judge a candidate against a mechanism's equations.

    Args:
        candidate: `module:function`, `path/to/file.py:function`, an adapter's short name, or a function.
        mechanism: the mechanism's name; None where `@candidate` names it.
        level: "smoke" (seconds), "standard" (about a minute) or "exhaustive".
        dtypes: of `fp32`, `fp16`, `bf16`, `fp64`; None: what the candidate supports.
        select: patterns (`*`, `?`) of case ids; empty: every case of the level.
        shard: `2/4`: only the second quarter of the cases, by a hash of their ids; `attnspec merge` joins the reports.
        expect: TOML files with skip and xfail entries.
        explain: shrink and diagnose failures.
        isolated: run the candidate in a process of its own, so that its crash is a result and not the end.
        progress: called as `progress(done, total, result)` after each case.

    Returns:
        The report; `exit_code` 0: conforms, 1: does not, 2: nothing was judged.

    Raises:
        CandidateError, SpecError, FileError, ShardError, CannotJudgeError: the run cannot start.
    """
    from attnspec.conformance import expectations, shards
    from attnspec.conformance.explain import explain as explanation
    from attnspec.conformance.runner import run

    name = mechanism or stated_mechanism(candidate)
    lists = expectations.load(expect) if expect else None
    if lists is not None:
        lists.everything = lambda: every_id(candidate, name, device=device, seed=seed)
    report = run(
        candidate,
        name,
        level=level,
        dtypes=dtypes,
        device=device,
        directions=directions,
        seed=seed,
        select=list(select) or None,
        shard=None if shard is None else shards.parse(shard),
        progress=progress,
        expectations=lists,
        explain=explanation if explain else None,
        timeout=timeout,
        isolated=isolated,
    )
    return _with_limits(report)


def repro(
    case_id: str,
    candidate: str,
    *,
    device: str = "cpu",
    timeout: float = TIMEOUT,
    explain: bool = True,
) -> Report:
    """Run one case again, from its id alone, and explain it if it fails.

    Raises:
        CandidateError, SpecError, CannotJudgeError: no such case, or the candidate cannot be run.
    """
    from attnspec.conformance import outcome
    from attnspec.conformance.cases import case_from_id
    from attnspec.conformance.explain import explain as explanation
    from attnspec.conformance.process import Worker
    from attnspec.conformance.session import Session
    from attnspec.conformance.suite import Suite

    case = case_from_id(case_id)
    suite = Suite(case.mechanism)
    with Worker() as worker:
        report, _ = plan(candidate, suite, device=device, seed=case.seed, level=case.level, worker=worker)
        with Session(candidate, suite, device=device, timeout=timeout, station=worker) as session:
            result = session.judge(case)
            report.results = [result]
            report.seconds = result.seconds + result.oracle_seconds
            outcome.conclude(report)
            if explain and report.exit_code == outcome.DOES_NOT_CONFORM:
                explanation(session, report)
    return _with_limits(report)


def _with_limits(report: Report) -> Report:
    """State with the rounding model what the limits promise."""
    from attnspec.conformance import tolerance

    report.rounding.setdefault("honest_rms_z", tolerance.HONEST)
    report.rounding.setdefault("chance_of_rejecting_an_honest_kernel_in_a_run", tolerance.CHANCE)
    return report


def plan(
    candidate: str | Candidate | Callable[..., Any],
    mechanism: str | Suite | None,
    *,
    level: Level = "standard",
    dtypes: Sequence[str] | None = None,
    device: str = "cpu",
    directions: Sequence[Direction] = DIRECTIONS,
    seed: int = 0,
    select: Sequence[str] = (),
    worker: Worker | None = None,
) -> tuple[Report, list[Case]]:
    """The cases that `check` would run, and the report that it would fill, without running any."""
    from attnspec.conformance.expectations import covers
    from attnspec.conformance.runner import run

    cases: list[Case] = []

    def note(case: Case) -> bool:
        if not select or any(covers(pattern, case.id) for pattern in select):
            cases.append(case)
        return False

    report = run(
        candidate,
        mechanism if mechanism is not None else stated_mechanism(candidate),
        level=level,
        dtypes=dtypes,
        device=device,
        directions=directions,
        seed=seed,
        select=note,
        worker=worker,
    )
    return report, cases


def every_id(
    candidate: str | Candidate | Callable[..., Any], mechanism: str, *, device: str, seed: int
) -> list[str]:
    """The ids of the cases of all levels, dtypes and directions: what an entry of an expectation list may name."""
    from attnspec.conformance.process import Worker

    ids: list[str] = []
    with Worker() as worker:
        for level in LEVELS:
            _, cases = plan(candidate, mechanism, level=level, device=device, seed=seed, worker=worker)
            ids += [case.id for case in cases]
    return ids


def stated_mechanism(candidate: str | Candidate | Callable[..., Any]) -> str:
    """The mechanism that a candidate says it implements.

    Raises:
        CandidateError: it cannot be found.
        CannotJudgeError: it does not say.
    """
    from attnspec.conformance.candidate import Candidate, described, resolve
    from attnspec.spec import mechanisms

    if isinstance(candidate, str):
        found: Candidate | None = resolve(candidate)
    else:
        found = candidate if isinstance(candidate, Candidate) else described(candidate)
    if found is None or found.mechanism is None:
        name = candidate if isinstance(candidate, str) else getattr(candidate, "__name__", repr(candidate))
        known = ", ".join(mechanisms())
        raise CannotJudgeError(f"{name} does not say what it implements: give a mechanism (known: {known})")
    return found.mechanism


def axes_of(mechanism: str) -> dict[str, tuple[str, ...]]:
    """The names of the axes of every output and gradient of a mechanism, for messages."""
    from attnspec.spec import load

    loaded = load(mechanism)
    axes = {name: (*loaded.batch, *decl.axes) for name, decl in loaded.outputs.items()}
    for name, decl in loaded.inputs.items():
        axes[f"d{name}"] = axes.setdefault(name, (*decl.batch, *decl.axes))
    return axes


def renamed(report: Report, candidate: str) -> Report:
    """The report under the name by which the user called the candidate, which is what reproduces a case."""
    return dataclasses.replace(report, candidate=candidate)
