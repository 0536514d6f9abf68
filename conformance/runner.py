"""A conformance run: which cases, in which order, and what they amount to.

`run` is what the command line, the pytest plugin and the mutation harness call. It never raises for what a
candidate does; it raises `CandidateError` (and `SpecError` for the mechanism) where nothing can be judged at
all. An interrupted run returns what was done, and says so.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from attnspec.conformance import outcome
from attnspec.conformance.candidate import DEVICES, DTYPES, Candidate, CandidateError
from attnspec.conformance.process import Worker
from attnspec.conformance.session import Session
from attnspec.conformance.shards import KEY, Shard
from attnspec.conformance.suite import Suite
from attnspec.conformance.types import (
    LEVELS,
    CandidateSignature,
    Case,
    CaseResult,
    Direction,
    Level,
    Report,
)

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")

Progress = Callable[[int, int, CaseResult], None]
Explain = Callable[[Session, Report], None]
Select = str | Sequence[str] | Callable[[Case], bool]


class Lists(Protocol):
    """Skip and xfail lists, as `expectations.Expectations` holds them."""

    def skips(self, case_id: str) -> str | None: ...
    def apply(self, report: Report, everything: Callable[[], Iterable[str]] | None = None) -> None: ...


def run(
    candidate: str | Candidate | Callable[..., Any],
    mechanism: str | Suite,
    *,
    level: Level = "standard",
    dtypes: Sequence[str] | None = None,
    device: str = "cpu",
    directions: Sequence[Direction] = DIRECTIONS,
    seed: int = 0,
    select: Select | None = None,
    shard: Shard | None = None,
    progress: Progress | None = None,
    expectations: Lists | None = None,
    explain: Explain | None = None,
    timeout: float = 30.0,
    isolated: bool = True,
    oracles: int | None = None,
    threads: int | None = None,
    memory: int | None = None,
    worker: Worker | None = None,
) -> Report:
    """Judge a candidate.

    Args:
        candidate: `module:function`, `file.py:function`, an adapter's short name, a function, or a
            `Candidate`.
        mechanism: the mechanism's name or path, or a `Suite`.
        dtypes: None: what the candidate states of fp32, fp16 and bf16. One that it does not state is listed
            as not supported.
        select: only the cases whose id matches a pattern (`*`, `?`) or one of several, or for which it is
            True.
        shard: only this part of the cases, by a hash of their ids; the report says which.
        progress: called as `progress(done, total, result)` after every case.
        expectations: skip and xfail lists.
        explain: called with the session and the finished report while the candidate is still loaded.
        timeout: seconds for one call; the first may take four times as long, and large cases get more.
        isolated, oracles, threads, memory: see `Session`.
        worker: a worker to use and to leave open, for many candidates in a row.

    Returns:
        The report with exit code and summary: 0 when something was judged and nothing fails, 1 when something
            fails,
        2 when nothing was judged.

    Raises:
        CandidateError: the candidate cannot be imported, matched, or run on the device.
        SpecError: no such mechanism.
    """
    _check(level, dtypes, device, directions)
    began = time.perf_counter()
    suite = mechanism if isinstance(mechanism, Suite) else Suite(mechanism)
    session = Session(
        candidate,
        suite,
        device=device,
        timeout=timeout,
        isolated=isolated,
        oracles=oracles,
        threads=threads,
        memory=memory,
        station=worker,
    )
    with session:
        signature = session.signature
        report = Report(
            candidate=signature.name,
            mechanism=suite.interface.mechanism,
            level=level,
            results=[],
            declares=dict(signature.declares),
            not_supported=_not_supported(signature, dtypes, directions),
            environment={**session.environment, "candidate": signature.source},
            seed=seed,
            rounding=suite.rounding(signature),
        )
        if signature.version:
            report.environment["version"] = signature.version
        if shard is not None:
            report.environment[KEY] = str(shard)
        interrupted = False
        try:
            every = _cases(suite, signature, level, dtypes, directions, seed)
            chosen = [case for case in _selected(every, select) if shard is None or shard.holds(case.id)]
            _judge(session, chosen, report, progress, expectations)
        except KeyboardInterrupt:
            interrupted = True
        _returned(report, suite)
        partial = select is not None or shard is not None
        if expectations is not None:
            if interrupted:
                expectations.apply(report, lambda: [case.id for case in every])
            else:
                expectations.apply(report, (lambda: [case.id for case in every]) if partial else None)
        if interrupted:
            done = f"{len(report.results)} cases were judged, the others were not run"
            report.problems.append(f"{outcome.INTERRUPTED}{done}")
        report.seconds = time.perf_counter() - began
        outcome.conclude(report)
        if explain is not None and not interrupted and report.exit_code == outcome.DOES_NOT_CONFORM:
            try:
                explain(session, report)
            except KeyboardInterrupt:
                report.problems.append("interrupted: the failures are not explained")
        report.seconds = time.perf_counter() - began
    return report


def _check(level: str, dtypes: Sequence[str] | None, device: str, directions: Sequence[str]) -> None:
    for label, given, known in (
        ("level", [level], LEVELS),
        ("dtype", dtypes or [], DTYPES),
        ("device", [device], DEVICES),
        ("direction", directions, DIRECTIONS),
    ):
        for entry in given:
            if entry not in known:
                raise CandidateError(f"{label} {entry!r} is unknown; expected {', '.join(known)}")
    if not directions:
        raise CandidateError("no direction is given; expected forward, backward")


def _cases(
    suite: Suite,
    signature: CandidateSignature,
    level: Level,
    dtypes: Sequence[str] | None,
    directions: Sequence[Direction],
    seed: int,
) -> list[Case]:
    """Every case of the run; forward first, so that what is basic fails first."""
    taken = [dtype for dtype in (dtypes or ("fp32", "fp16", "bf16")) if dtype in signature.dtypes]
    if not taken and dtypes is None:
        taken = list(signature.dtypes)
    cases: list[Case] = []
    for direction in DIRECTIONS:
        if direction in directions and taken and (direction == "forward" or signature.differentiable):
            cases += suite.cases(level, taken, direction, seed, signature)
    return cases


def _selected(cases: list[Case], select: Select | None) -> list[Case]:
    if select is None:
        return cases
    if callable(select):
        return [case for case in cases if select(case)]
    patterns = [select] if isinstance(select, str) else list(select)
    # Only `*` and `?` are special: ids are full of brackets.
    safe = [pattern.replace("[", "[[]") for pattern in patterns]
    return [case for case in cases if any(fnmatch.fnmatchcase(case.id, pattern) for pattern in safe)]


def _judge(
    session: Session, cases: list[Case], report: Report, progress: Progress | None, expectations: Lists | None
) -> None:
    skipped = {case.id: expectations.skips(case.id) for case in cases} if expectations is not None else {}
    posed = iter(session.judge_all([case for case in cases if not skipped.get(case.id)]))
    for case in cases:
        reason = skipped.get(case.id)
        result = CaseResult(case, "skip", message=reason) if reason else next(posed)
        report.results.append(result)
        if progress is not None:
            progress(len(report.results), len(cases), result)


def _not_supported(
    signature: CandidateSignature, dtypes: Sequence[str] | None, directions: Sequence[str]
) -> dict[str, str]:
    """What the run does not exercise, by name, with the reason."""
    missing = dict(signature.not_taken)
    for dtype in dtypes or ("fp32", "fp16", "bf16"):
        if dtype not in signature.dtypes:
            missing[dtype] = f"the candidate states {', '.join(signature.dtypes)}"
    if "backward" in directions and not signature.differentiable:
        missing["backward"] = "the candidate states no gradient"
    return missing


def _returned(report: Report, suite: Suite) -> None:
    """List the outputs that the candidate never returned."""
    seen = {name for result in report.results for name in result.receipt.get("dtypes", ())}
    for name in suite.interface.outputs:
        if seen and name not in seen:
            report.not_supported[f"output {name}"] = "not returned"
