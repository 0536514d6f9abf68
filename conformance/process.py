"""The runner's side of a worker: start it, give it cases, and tell how it ended when it does not come back.

A `Worker` survives its process: after a crash or a timeout the next case finds a fresh one with the candidate
loaded again. `Inline` has the same methods without a process, for callers who trust the candidate (tests of
the suite).
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

from attnspec.conformance import wire
from attnspec.conformance.calling import Caller, is_suite
from attnspec.conformance.candidate import CandidateError
from attnspec.conformance.environment import fingerprint
from attnspec.conformance.job import Job
from attnspec.conformance.types import CandidateSignature, Observation
from attnspec.conformance.worker import ASK, Load, load

IMPORT_LIMIT = 300.0  # seconds for starting the interpreter and importing the candidate
GRACE = 2.0  # seconds that a process gets to end
STRETCH = 4.0  # how many times the limit may pass on the clock while the process itself has not used it up
STARVED = 20.0  # and how many times while it does compute, slowly: what others leave of the machine is not its fault
SLEEPING = 0.01  # share of the clock below which a process is taken not to compute
PRINT_LIMIT = 64 << 20  # bytes of output after which a candidate is stopped


class Station(Protocol):
    """Where a candidate runs. `starts` counts the processes so far."""

    starts: int

    def load(self, order: Load) -> CandidateSignature: ...
    def send(self, job: Job, limit: float) -> None: ...
    def receive(self) -> Observation: ...
    def close(self) -> None: ...


class Inline:
    """Calls the candidate in this process: no protection against crashes, loops or `os._exit`."""

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}
        self.starts = 0
        self._caller: Caller | None = None
        self._job: Job | None = None

    def load(self, order: Load) -> CandidateSignature:
        return self.bound(load(order))

    def bound(self, caller: Caller) -> CandidateSignature:
        """Take a caller that is already bound (a function object without an importable name)."""
        self._caller = caller
        self.environment = fingerprint(caller.candidate.framework, caller.device)
        return caller.binding.signature

    def send(self, job: Job, limit: float) -> None:
        self._job = job

    def receive(self) -> Observation:
        assert self._caller is not None and self._job is not None
        return self._caller.observe(self._job)

    def close(self) -> None:
        self._caller = None


class Worker:
    """A candidate in a process of its own."""

    def __init__(self, *, threads: int = 1) -> None:
        self.threads = threads
        self.starts = 0
        self.environment: dict[str, str] = {}
        self._order: Load | None = None
        self._loaded = False
        self._busy = False
        self._process: subprocess.Popen[bytes] | None = None
        self._pending: tuple[Job, float] | None = None
        self._deadline = 0.0
        self._spent = 0.0

    def load(self, order: Load) -> CandidateSignature:
        """Import the candidate in the worker.

        Raises:
            CandidateError: it cannot be imported or bound, or importing it crashes or does not end.
        """
        self._order = order
        self._discard()
        return self._load()

    def send(self, job: Job, limit: float) -> None:
        """Give the worker a case; when it has computed for `limit` seconds it is stopped.

        On a busy machine these take longer on the clock, up to `STARVED` times; a process that sleeps gets `STRETCH`
        times its limit.
        """
        self._discard()
        self._pending = (job, limit)
        try:
            if not self._loaded:
                self._load()
            self._busy = True
            wire.send(self._to, ("call", job))
        except (BrokenPipeError, CandidateError):
            pass  # receive() tells how the process ended
        self._deadline = time.monotonic() + limit
        self._spent = self._computed()

    def receive(self) -> Observation:
        """What happened to the case that was sent."""
        assert self._pending is not None
        _, limit = self._pending
        began = time.perf_counter()
        if not self._loaded:
            return Observation(status="crash", message=f"cannot be started again: {self._failure}")
        try:
            answer = self._answer(self._deadline, limit)
        except _EndedError as ended:
            observation = self._told(ended, limit)
            observation.seconds = limit if observation.status == "timeout" else time.perf_counter() - began
            return observation
        self._busy = False
        observation = answer[1]
        observation.printed = self._printed()[-4000:]
        return observation  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the process and everything that it started."""
        process, self._process, self._loaded, self._busy = self._process, None, False, False
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for descriptor in (self._to, self._from, self._capture):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _discard(self) -> None:
        """End a process that still owes the answer to a case that nobody waits for any more (an interrupted run)."""
        if self._busy:
            self.close()

    def _load(self) -> CandidateSignature:
        assert self._order is not None
        self._failure = ""
        try:
            if self._process is None or self._process.poll() is not None:
                self._start()
            wire.send(self._to, ("load", self._order))
            answer = self._answer(time.monotonic() + IMPORT_LIMIT)
        except (_EndedError, BrokenPipeError) as ended:
            how = self._told(ended, IMPORT_LIMIT).message if isinstance(ended, _EndedError) else "the process ended"
            self.close()
            self._failure = f"{self._order.candidate}: importing it failed: {how}"
            raise CandidateError(self._failure) from None
        if answer[0] != "loaded":
            self._failure = str(answer[1])
            raise CandidateError(self._failure)
        self._loaded = True
        self.environment = answer[2]
        self._printed()
        return answer[1]  # type: ignore[no-any-return]

    def _start(self) -> None:
        self.close()
        self.starts += 1
        child_reads, self._to = os.pipe()
        self._from, child_writes = os.pipe()
        name: str
        self._capture, name = tempfile.mkstemp(prefix="attnspec-")
        os.close(self._capture)
        # O_APPEND: the file is emptied after every case while the worker keeps it open.
        self._capture = os.open(name, os.O_RDWR | os.O_APPEND)
        Path(name).unlink()
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            "OPENBLAS_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONUNBUFFERED": "1",
        }
        if self._order is not None and self._order.device == "cpu":
            environment.setdefault("JAX_PLATFORMS", "cpu")
        # -P: a folder called attnspec in the working directory, as in a checkout, must not hide the installed package.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "attnspec.conformance.worker", str(child_reads), str(child_writes)],
            stdin=subprocess.DEVNULL,
            stdout=self._capture,
            stderr=self._capture,
            env=environment,
            pass_fds=(child_reads, child_writes),
            start_new_session=True,
        )
        os.close(child_reads)
        os.close(child_writes)
        self._answer(time.monotonic() + IMPORT_LIMIT)

    def _answer(self, deadline: float, limit: float | None = None) -> Any:
        """The worker's next message; `_EndedError` when there will be none.

        Args:
            limit: seconds of computing after which it is late; None: the deadline alone counts.
        """
        while True:
            ready, _, _ = select.select([self._from], [], [], min(0.25, max(0.01, deadline - time.monotonic())))
            if ready:
                try:
                    return wire.receive(self._from)
                except EOFError:
                    raise _EndedError("gone") from None
            if self._is_late(time.monotonic() - deadline, limit):
                self._ask_where(limit)
                raise _EndedError("late")
            if os.fstat(self._capture).st_size > PRINT_LIMIT:
                raise _EndedError("flood")

    def _is_late(self, beyond: float, limit: float | None) -> bool:
        """Whether the worker is out of time, so many seconds of the clock beyond its deadline."""
        if beyond <= 0 or limit is None:
            return beyond > 0
        computed = self._computed() - self._spent
        stretch = STARVED if computed > SLEEPING * (beyond + limit) else STRETCH
        return computed >= limit or beyond > (stretch - 1) * limit

    def _computed(self) -> float:
        """Seconds that the process and what it started have computed; the clock where the system does not tell."""
        try:
            stat = Path(f"/proc/{self._process.pid if self._process else 0}/stat").read_text(encoding="ascii")
        except OSError:
            return time.monotonic()
        ticks = stat.rpartition(")")[2].split()[11:15]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def _ask_where(self, limit: float | None) -> None:
        """Have the process write down where it is before it is stopped."""
        if limit is not None and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(ASK)
            time.sleep(0.2)

    def _printed(self) -> str:
        size = os.fstat(self._capture).st_size
        text = os.pread(self._capture, min(size, 1 << 20), max(0, size - (1 << 20)))
        os.ftruncate(self._capture, 0)
        return text.decode("utf-8", "replace")

    def _told(self, ended: _EndedError, limit: float) -> Observation:
        """Say how the process ended, and make sure that it has."""
        assert self._process is not None
        if ended.how == "gone":
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        code = self._process.poll()
        text = self._printed()
        self.close()
        place = _place(text)
        if ended.how == "flood":
            return Observation(
                "error",
                message=f"printed more than {PRINT_LIMIT >> 20} MiB in one call",
                printed=text[-4000:],
            )
        if ended.how == "late":
            return Observation("timeout", message=f"did not return within {limit:.3g} s{place}", printed=text[-4000:])
        if code is None:
            message = "closed its connection to the suite"
        elif code < 0:
            message = f"crashed: {_signal(-code)}{place}"
        else:
            message = f"ended the process with exit code {code} (os._exit)"
        return Observation("crash", message=message, traceback=text[-4000:], printed=text[-4000:])


class _EndedError(Exception):
    """The worker will not answer: it is "gone", "late", or prints a "flood"."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


def _signal(number: int) -> str:
    words = {
        "SIGSEGV": "segmentation fault",
        "SIGBUS": "bus error",
        "SIGILL": "illegal instruction",
        "SIGFPE": "arithmetic exception",
        "SIGABRT": "aborted",
        "SIGKILL": "killed, as by a system that is out of memory",
        "SIGTERM": "terminated",
    }
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{words.get(name, 'signal')} ({name})"


def _place(text: str) -> str:
    """Where the candidate was, from the stack that faulthandler wrote: its innermost frame outside the
    suite."""
    for path, line, function in re.findall(r'File "([^"]+)", line (\d+) in (\S+)', text):
        if not is_suite(path) and not path.endswith(("threading.py", "ctypes/__init__.py")):
            return f" in {Path(path).name}:{line} ({function})"
    return ""
