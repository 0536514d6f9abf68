"""A candidate and its oracle side by side: the loop that poses cases and turns answers into results.

A `Session` keeps a worker with the candidate loaded and, for long runs, processes that evaluate the oracle
ahead of time. `judge_all` overlaps the three: while the worker computes a case, this process judges the one
before and builds the next. The runner, the shrinker (`judge`) and the diagnosis (`examine`) share it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from attnspec.conformance import judging
from attnspec.conformance.ahead import Oracles, cores_here, processes_for, timed
from attnspec.conformance.binding import bind, missing
from attnspec.conformance.calling import Caller
from attnspec.conformance.candidate import Candidate, CandidateError
from attnspec.conformance.job import Call, Job, make_call, make_job
from attnspec.conformance.process import Inline, Station, Worker
from attnspec.conformance.suite import Suite
from attnspec.conformance.types import CandidateSignature, Case, CaseData, CaseResult, Observation
from attnspec.conformance.worker import Load, address

FIRST_CALL = 4.0  # the first call may take this many times the limit of a call: it compiles and warms up
RATE = 2e9  # multiply-adds per second that a slow but honest kernel manages; a case gets the time for its own
EVERY = 8  # one case in this many, and the first of each group, gets a decoy call and a thorough receipt
DECOY_LIMIT = 1 << 20  # elements of the inputs beyond which there is no decoy call
FOLLOW_UPS = 12  # further calls per run that look for the reason of a failure
GIVE_UP = {"timeout": 3, "crash": 8}  # in a row


@dataclass
class Examination:
    """Everything about one judged case, arrays included, for those who explain it."""

    case: Case
    data: CaseData
    expected: Any
    observation: Observation
    result: CaseResult


@dataclass
class _Posed:
    case: Case
    data: CaseData
    job: Job
    expected: Future[Any] | None


class Session:
    """Poses cases to one candidate.

    Args:
        candidate: a name that `resolve` understands, a function, or a `Candidate`.
        suite: the mechanism's cases and oracle.
        timeout: seconds for one call; the first may take four times as long, and large cases get more.
        isolated: run the candidate in a worker process. Without it a crash or an endless loop is the caller's
            own.
        oracles: processes that evaluate the oracle ahead; 0: in this process. None: chosen from the number of
            cores.
        memory: bytes that the worker may allocate; None: the machine's memory, without a limit on a GPU.

    Raises:
        CandidateError: the candidate cannot be imported, matched to the mechanism, or run on the device.
    """

    def __init__(
        self,
        candidate: str | Candidate | Callable[..., Any],
        suite: Suite,
        *,
        device: str = "cpu",
        timeout: float = 30.0,
        isolated: bool = True,
        oracles: int | None = None,
        threads: int | None = None,
        memory: int | None = None,
        station: Worker | None = None,
    ) -> None:
        self.suite = suite
        self.device = device
        self.timeout = timeout
        self.oracles = oracles
        self._ahead: Oracles | None = None
        self._warm: dict[str, tuple[float, int]] = {}
        self._hung = False
        self._follow_ups = 0
        self._held: Observation | None = None
        self._busy = False
        self._own = station is None
        self.station: Station
        if isolated:
            cores = cores_here()
            workers = station or Worker(threads=threads or min(2, cores))
            self.station = workers
            limit = memory if memory is not None else _machine_memory() if device == "cpu" else None
            order = Load(address(candidate), suite.interface, device, workers.threads, limit)
            self.signature: CandidateSignature = workers.load(order)
            self.environment: dict[str, str] = workers.environment
        else:
            inline = Inline()
            self.station = inline
            if isinstance(candidate, str):
                self.signature = inline.load(Load(candidate, suite.interface, device))
            else:
                self.signature = inline.bound(Caller(bind(_description(candidate), suite.interface), device))
            self.environment = inline.environment
        try:
            suite.check(self.signature)
        except CandidateError:
            self.close()
            raise

    def judge(self, case: Case) -> CaseResult:
        """Pose one case and judge the answer."""
        return self.examine(case).result

    def examine(self, case: Case) -> Examination:
        """Pose one case and keep everything."""
        posed = self._pose(case, sampled=False)
        if isinstance(posed, CaseResult):
            return Examination(case, CaseData({}, {}), None, Observation("refused"), posed)
        self._send(posed)
        expected, seconds = timed(self.suite, case, posed.data, self.signature)
        observation = self._receive(posed)
        result = judging.conclude(self.suite, case, expected, observation, self.signature)
        result.oracle_seconds = seconds
        return Examination(case, posed.data, expected, observation, result)

    def ask(self, case: Case, data: CaseData) -> Observation:
        """Call the candidate with other arrays (in the mechanism's conventions) than the case's own.

        Raises:
            CandidateError: arrays that are not rounded to the case's dtype, or that the candidate does not
                take.
        """
        posed = self._pose_data(case, data, sampled=False)
        if isinstance(posed, CaseResult):
            raise CandidateError(posed.message)
        return self._receive(self._send(posed))

    def judge_all(self, cases: Sequence[Case]) -> Iterator[CaseResult]:
        """Results in the order of the cases; closing the iterator stops after the case that is running."""
        processes = processes_for(len(cases)) if self.oracles is None else self.oracles
        self._ahead = Oracles(self.suite, self.signature, processes) if processes else None
        sampled = _sampled(cases)
        streak = {"timeout": 0, "crash": 0}
        flying: _Posed | None = None
        for number in range(len(cases) + 1):
            prepared: _Posed | CaseResult | None = None
            if number < len(cases):
                promised = None
                if self._ahead is not None:
                    self._ahead.look_ahead(cases, number)
                    promised = self._ahead.take(cases[number])
                prepared = self._pose(cases[number], sampled[number], promised)
            observation = self._receive(flying) if flying is not None else None
            if observation is not None:
                _count(streak, observation)
            if isinstance(prepared, _Posed):
                gone = next((how for how, limit in GIVE_UP.items() if streak[how] >= limit), None)
                if gone:
                    prepared = _given_up(prepared.case, gone, streak[gone])
                else:
                    self._send(prepared)
            if flying is not None and observation is not None:
                yield self._finish(flying, observation)
            flying = prepared if isinstance(prepared, _Posed) else None
            if isinstance(prepared, CaseResult):
                yield prepared

    def close(self) -> None:
        """End the worker and the oracle's processes."""
        if self._own:
            self.station.close()
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pose(self, case: Case, sampled: bool, expected: Future[Any] | None = None) -> _Posed | CaseResult:
        """Build a case's data and job, or say why it cannot be posed."""
        return self._pose_data(case, self.suite.build(case, self.signature), sampled, expected)

    def _pose_data(
        self, case: Case, data: CaseData, sampled: bool, expected: Future[Any] | None = None
    ) -> _Posed | CaseResult:
        further = list(data.extra.get("calls", ()))
        for arguments in (data, *further):
            present = frozenset(name for name, value in arguments.inputs.items() if value is not None)
            reason = missing(self.signature, self.suite.interface, present, arguments.options)
            if reason is not None:
                return CaseResult(case, "not_supported", message=reason)
        if case.dtype not in self.signature.dtypes:
            known = ", ".join(self.signature.dtypes)
            return CaseResult(case, "not_supported", message=f"{case.dtype}: the candidate states {known}")
        if case.direction == "backward" and not self.signature.differentiable:
            return CaseResult(case, "not_supported", message="backward: the candidate states no gradient")
        try:
            call, *more = [self._call(case, arguments) for arguments in (data, *further)]
        except CandidateError as error:
            return CaseResult(case, "error", message=f"the suite built a wrong case: {error}")
        elements = sum(int(value.size) for value in call.inputs.values())
        job = make_job(
            case,
            call,
            more,
            device=self.device,
            differentiable=self.signature.differentiable,
            sampled=sampled and elements <= DECOY_LIMIT,
        )
        return _Posed(case, data, job, expected)

    def _call(self, case: Case, data: CaseData) -> Call:
        resolved, shapes = self.suite.frame(case, data)
        given = self.suite.to_candidate(data, self.signature)
        # Inputs that contradict each other give no output shape to hold a candidate to.
        return make_call(case, given, self.suite.interface, resolved, {} if case.check == "refusal" else shapes)

    def _send(self, posed: _Posed) -> _Posed:
        limit = self._limit(posed.case)
        self.station.send(posed.job, limit)
        self._busy = True
        return posed

    def _limit(self, case: Case) -> float:
        """Seconds for a call. The first of each direction compiles and warms up; so does the first after a restart."""
        size = case.sizes
        work = size.get("B", 1) * size.get("H", 1) * size.get("N", 1) * size.get("M", 1)
        limit = self.timeout + work * (size.get("D", 1) + size.get("E", 1)) / RATE
        if case.direction in self._warm:
            seconds, starts = self._warm[case.direction]
            return limit if starts == self.station.starts else limit + 2 * seconds
        return limit if self._hung else limit + (FIRST_CALL - 1) * self.timeout

    def _receive(self, posed: _Posed) -> Observation:
        if self._held is not None:
            observation, self._held = self._held, None
            return observation
        self._busy = False
        observation = self.station.receive()
        if observation.status == "returned":
            self._warm.setdefault(posed.case.direction, (observation.seconds, self.station.starts))
        self._hung = self._hung or observation.status == "timeout"
        return observation

    def _finish(self, posed: _Posed, observation: Observation) -> CaseResult:
        expected, seconds = None, 0.0
        if observation.status == "returned":
            if posed.expected is not None:
                expected, seconds = posed.expected.result()
                expected = self.suite.restored(expected, posed.data)
            else:
                expected, seconds = timed(self.suite, posed.case, posed.data, self.signature)
        elif posed.expected is not None:
            posed.expected.cancel()
        result = judging.conclude(self.suite, posed.case, expected, observation, self.signature)
        if result.status == "fail" and self._follow_ups < FOLLOW_UPS and self._explain(posed, expected, observation):
            result = judging.conclude(self.suite, posed.case, expected, observation, self.signature)
        result.oracle_seconds = seconds
        return result

    def _explain(self, posed: _Posed, expected: Any, observation: Observation) -> bool:
        """Call again with one thing changed that a kernel must not notice; True where that says what is
        wrong."""
        if judging.has_stray_nan(observation):
            second = self._again(posed, finite=True)
            if judging.reads_outside(observation, second):
                observation.receipt["outside"] = (
                    "reads out of bounds: the result changes with what lies around the inputs in memory"
                )
                return True
        layouts = judging.layouts(observation)
        if layouts:
            plain = dataclasses.replace(posed.case, layout="contiguous")
            second = self._again(posed, case=plain)
            if judging.conclude(self.suite, plain, expected, second, self.signature).status == "pass":
                observation.receipt["layout"] = (
                    f"is right only for contiguous inputs: wrong where they are {', '.join(layouts)} in memory"
                )
                return True
        return False

    def _again(self, posed: _Posed, **changes: Any) -> Observation:
        """One more call with the same values, while keeping the answer of the case that is running, if one
        is."""
        self._follow_ups += 1
        if self._busy:
            self._held = self._receive(posed)
        held, self._held = self._held, None
        job = dataclasses.replace(posed.job, decoy=False, again=0, **changes)
        observation = self._receive(self._send(dataclasses.replace(posed, job=job)))
        self._held = held
        return observation


def _description(candidate: Candidate | Callable[..., Any]) -> Candidate:
    from attnspec.conformance.finding import of

    if isinstance(candidate, Candidate):
        return candidate
    return of(candidate, getattr(candidate, "__qualname__", type(candidate).__name__))


def _sampled(cases: Sequence[Case]) -> list[bool]:
    seen: set[tuple[str, str, str]] = set()
    chosen = []
    for number, case in enumerate(cases):
        key = (case.group, case.dtype, case.direction)
        chosen.append(key not in seen or number % EVERY == 0)
        seen.add(key)
    return chosen


def _count(streak: dict[str, int], observation: Observation) -> None:
    for how in streak:
        streak[how] = streak[how] + 1 if observation.status == how else 0


def _given_up(case: Case, how: str, times: int) -> CaseResult:
    status: Any = how
    verb = "did not return" if how == "timeout" else "crashed"
    return CaseResult(case, status, message=f"not run: the candidate {verb} in {times} cases in a row")


def _machine_memory() -> int | None:
    try:
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return None
