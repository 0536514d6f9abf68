"""Processes that evaluate the oracle ahead of the candidate.

`Oracles` belongs to a `Session`. Cases with the same arrays go to the same process, which finds them in its cache. What
comes back has travelled without the inputs (`Suite.stripped`); the session puts them back.
"""

from __future__ import annotations

import os
import signal
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from attnspec.conformance.suite import Suite
from attnspec.conformance.types import CandidateSignature, Case, CaseData

AHEAD = 6  # cases that each process may be ahead of the candidate
# Cases from which processes pay for their start, with two cores (where the worker already takes one) and with more.
FROM = (1000, 200)
MOST = 8

Timed = tuple[Any, float]


def processes_for(cases: int) -> int:
    """How many processes pay for a run of so many cases on this machine; 0: evaluate where the cases are judged."""
    cores = cores_here()
    return 0 if cores < 2 or cases < FROM[cores > 2] else min(cores, MOST)


def cores_here() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def timed(suite: Suite, case: Case, data: CaseData, signature: CandidateSignature) -> Timed:
    """What is expected, and the seconds that it took."""
    began = time.perf_counter()
    return suite.expected(case, data, signature), time.perf_counter() - began


class Oracles:
    """A number of processes, each with the mechanism loaded."""

    def __init__(self, suite: Suite, signature: CandidateSignature, processes: int) -> None:
        self.suite = suite
        self.signature = signature
        self._lanes = [
            ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare, initargs=(suite,))
            for _ in range(processes)
        ]
        self._results: dict[str, Future[Timed]] = {}
        self._reached = 0

    def look_ahead(self, cases: Sequence[Case], number: int) -> None:
        """Hand the cases from `number` on to the processes, some ahead of the candidate and each once."""
        last = min(len(cases), number + AHEAD * len(self._lanes))
        for case in cases[max(number, self._reached) : last]:
            lane = self._lanes[_content(case) % len(self._lanes)]
            self._results[case.id] = lane.submit(_expected, self.suite.name, case, self.signature)
        self._reached = max(self._reached, last)

    def take(self, case: Case) -> Future[Timed] | None:
        """The promised result of a case; None: it was never handed out."""
        return self._results.pop(case.id, None)

    def close(self) -> None:
        """End the processes without waiting for them."""
        for lane in self._lanes:
            lane.shutdown(wait=False, cancel_futures=True)
        self._lanes = []


_suite: Suite | None = None


def _prepare(suite: Suite) -> None:
    """In a process: hold the mechanism, and leave Ctrl-C to the parent."""
    global _suite
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _suite = suite


def _expected(name: str, case: Case, signature: CandidateSignature) -> Timed:
    assert _suite is not None and _suite.name == name
    expected, seconds = timed(_suite, case, _suite.build(case, signature), signature)
    return _suite.stripped(expected), seconds


def _content(case: Case) -> int:
    """A number that is the same for cases with the same arrays, whatever their memory layout."""
    arrays = (sorted(case.sizes.items()), sorted(case.options.items()), case.inputs, case.values, case.dtype, case.seed)
    return zlib.crc32(repr((arrays, case.direction)).encode())
