"""The process in which candidates run: `python -m attnspec.conformance.worker READ WRITE`.

It reads messages (`wire`) from one descriptor and answers on another: `("load", Load)` is answered by
`("loaded", CandidateSignature, environment)` or `("unusable", message)`, `("call", Job)` by
`("observed", Observation)`. Standard output and error belong to the candidate; the parent captures them.
Crashes and endless loops are the parent's (`process`) to tell; on the signal `ASK` this process writes where it is.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import inspect
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from attnspec.conformance import receipt, wire
from attnspec.conformance.binding import bind
from attnspec.conformance.calling import Caller
from attnspec.conformance.candidate import Candidate, CandidateError
from attnspec.conformance.environment import fingerprint
from attnspec.conformance.finding import resolve
from attnspec.conformance.interface import Interface
from attnspec.conformance.job import Job
from attnspec.conformance.types import Observation

ASK = signal.SIGUSR2


@dataclass(frozen=True)
class Load:
    """Which candidate to import, and what it is to be matched to."""

    candidate: str
    interface: Interface
    device: str
    threads: int = 1
    memory: int | None = None
    path: tuple[str, ...] = field(default_factory=tuple)


def address(candidate: str | Candidate | Callable[..., Any]) -> str:
    """The name under which a worker finds a candidate.

    Raises:
        CandidateError: a function that has none: a lambda, or one defined inside another function.
    """
    if isinstance(candidate, str):
        return candidate
    if isinstance(candidate, Candidate):
        if candidate.short_name:
            return candidate.short_name
        candidate = candidate.function
    name = getattr(candidate, "__qualname__", "")
    code = getattr(inspect.unwrap(candidate), "__code__", None)
    if not name or "<" in name:
        raise CandidateError(
            f"{name or candidate!r}: a worker process cannot import it; give module:function or "
            "file.py:function, or run it without isolation"
        )
    module = getattr(candidate, "__module__", None)
    spec = getattr(sys.modules.get(module or ""), "__spec__", None)
    if spec is not None and module and importlib.util.find_spec(module) is not None:
        return f"{module}:{name}"
    return f"{code.co_filename}:{name}" if code is not None else f"{module}:{name}"


def load(order: Load) -> Caller:
    """Import and bind a candidate.

    Raises:
        CandidateError: it cannot be judged; the message says why.
    """
    for entry in order.path:
        if entry not in sys.path:
            sys.path.append(entry)
    if order.memory is not None:
        _limit_memory(order.memory)
    candidate = resolve(order.candidate, order.interface.mechanism)
    if order.device not in candidate.devices:
        raise CandidateError(
            f"{candidate.name}: does not run on {order.device}; it states {', '.join(candidate.devices)}"
        )
    caller = Caller(bind(candidate, order.interface), order.device)
    if candidate.framework == "torch":
        import torch

        torch.set_num_threads(order.threads)
    return caller


def serve(source: int, target: int) -> None:
    """Answer messages until the other side closes the pipe."""
    caller: Caller | None = None
    wire.send(target, ("ready",))
    while True:
        try:
            message = wire.receive(source)
        except EOFError:
            return
        if message[0] == "load":
            caller = None
            try:
                caller = load(message[1])
                facts = fingerprint(caller.candidate.framework, message[1].device)
                answer: tuple[object, ...] = ("loaded", caller.binding.signature, facts)
            except CandidateError as error:
                answer = ("unusable", str(error))
        elif message[0] == "call":
            answer = ("observed", _observe(caller, message[1]))
        else:
            return
        sys.stdout.flush()
        sys.stderr.flush()
        wire.send(target, answer)


def _observe(caller: Caller | None, job: Job) -> Observation:
    if caller is None:
        return Observation(status="error", message="no candidate is loaded")
    return caller.observe(job)


def _limit_memory(size: int) -> None:
    """Let an allocation beyond `size` bytes fail here, before the system ends the wrong process."""
    try:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        wanted = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    except (ImportError, ValueError, OSError):
        return  # not offered by this system


def main() -> None:
    """Entry point of the worker process."""
    source, target = int(sys.argv[1]), int(sys.argv[2])
    for descriptor in (source, target):
        os.set_inheritable(descriptor, False)
    faulthandler.enable()
    # A handler in C, which works where the interpreter is stuck: it writes down where the candidate is.
    faulthandler.register(ASK, all_threads=True, chain=False)
    receipt.guard_imports()
    serve(source, target)
    # Skip the frameworks' own shutdown: it can hang or crash, and nothing is left to save.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    # Pickles name classes by module: run as the importable module, not as `__main__`.
    from attnspec.conformance import worker

    worker.main()
