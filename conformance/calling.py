"""One call of a candidate, watched from all sides: place, call, differentiate, check, and write the receipt.

`Caller` lives in the worker (or in the runner's own process when isolation is off) and keeps the candidate
with its binding and what the call before returned. `observe` never raises for what the candidate does:
everything becomes an `Observation`. Crashes and endless loops are the worker's parent's business.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from attnspec.conformance import bridges, gradients, returned
from attnspec.conformance.binding import Binding
from attnspec.conformance.candidate import CandidateError
from attnspec.conformance.job import Call, Job
from attnspec.conformance.memory import Memory, NumpyMemory, Unguarded
from attnspec.conformance.receipt import BUDGET, THOROUGH, Watch
from attnspec.conformance.types import Observation, Unsupported

KEPT, KEPT_ELEMENTS = 16, 1 << 18  # earlier results that are kept to recognise their memory
THREAD_WAIT = 2.0  # seconds that threads which the candidate started get to finish after the call


class Caller:
    """Calls one bound candidate on one device.

    Raises:
        CandidateError: its framework or the device is not there, or its backward function cannot be matched.
    """

    def __init__(self, binding: Binding, device: str) -> None:
        bridges.require(binding.candidate.framework, device)
        self.binding = binding
        self.candidate = binding.candidate
        self.device = device
        self.back = gradients.backward_binding(binding) if self.candidate.backward is not None else None
        self.calls = 0
        self.kept: dict[tuple[str, tuple[int, ...], str], tuple[Any, str]] = {}

    def observe(self, job: Job) -> Observation:
        """Call the candidate with a case and say what happened."""
        began = time.perf_counter()
        observation = Observation(status="returned")
        try:
            self._observe(job, observation)
        except (Unsupported, NotImplementedError) as error:
            observation.status, observation.message = "refused", _told(error)
        except returned.WrongResultError as error:
            observation.status, observation.message = "error", str(error)
        except gradients.NoGradientError as error:
            observation.status, observation.message = "refused", str(error)
            observation.receipt["not_supported"] = str(error)
        except SystemExit as error:
            observation.status, observation.message = "error", f"called sys.exit({error.code!r})"
        except BaseException as error:
            if self._refuses_pair(job):
                observation.status = "refused"
            else:
                observation.status = "error"
            observation.message = ("out of memory: " if _is_memory(error) else "") + _told(error)
            observation.traceback = "".join(traceback.format_exception(error))[-4000:]
        observation.seconds = observation.seconds or time.perf_counter() - began
        return observation

    def _observe(self, job: Job, observation: Observation) -> None:
        case, candidate = job.case, self.candidate
        if callable(candidate.refuses):
            reason = candidate.refuses(case)
            if reason:
                raise Unsupported(reason)
        stale = self._decoy(job) if job.decoy else None
        memory, placed, cotangents = self._place(job, job.call)
        watch = Watch(candidate.function, THOROUGH if job.thorough else BUDGET)
        started = time.perf_counter()
        try:
            with _threads(observation.memory_faults), watch, memory.watching():
                results, grads, unused = self._call(job, job.call, placed, cotangents)
                bridges.synchronize(candidate.framework, job.device, [results, grads])
        finally:
            # What the candidate did to memory counts even where it raised in the end.
            observation.memory_faults += memory.faults()
        observation.seconds = time.perf_counter() - started
        self.calls += 1
        observation.memory_faults += _memory_of_results(memory, results)
        observation.memory_faults += self._reuse(case.id, results)
        observation.receipt = self._receipt(job, watch, memory, results, unused)
        self._check(job, job.call, results, grads)
        observation.outputs, observation.gradients = self._read(results), self._read(grads)
        if stale is not None and _same(stale, observation.outputs):
            observation.receipt["stale"] = "the result is that of an earlier call with other inputs"
        for _ in range(job.again):
            outputs, again, _ = self._call(job, job.call, placed, cotangents)
            observation.repeats.append({"outputs": self._read(outputs), "gradients": self._read(again)})
        for call in job.more:
            observation.repeats.append(self._further(job, call, observation.memory_faults))

    def _further(self, job: Job, call: Call, faults: list[str]) -> dict[str, Any]:
        """Another call of the same case, guarded like the first."""
        memory, placed, cotangents = self._place(job, call)
        try:
            with memory.watching():
                results, grads, _ = self._call(job, call, placed, cotangents)
                bridges.synchronize(self.candidate.framework, job.device, [results, grads])
        finally:
            faults += memory.faults()
        faults += _memory_of_results(memory, results)
        self._check(job, call, results, grads)
        return {"outputs": self._read(results), "gradients": self._read(grads)}

    def _read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._canonical(name, value) for name, value in values.items()}

    def _place(self, job: Job, call: Call, sign: int = 1) -> tuple[Memory, dict[str, Any], dict[str, Any]]:
        memory = self._memory(job)
        placed = {}
        for name, array in call.inputs.items():
            face = self.binding.interface.inputs[name]
            ordered = np.transpose(array, self.binding.axes_order(name)) if array.ndim else array
            real = face.kind == "real"
            dtype = self.candidate.input_dtypes.get(
                name, job.case.dtype if real else ("bool" if face.kind == "bool" else "int64")
            )
            values = sign * ordered if real else ordered
            placed[name] = memory.place(name, values, face.kind, dtype, job.layout(name) if real else "contiguous")
        cotangents = {
            name: memory.place(
                f"d{name}",
                np.transpose(array, self.binding.axes_order(name)) if array.ndim else array,
                "real",
                self.candidate.output_dtypes.get(name, job.case.dtype),
                "contiguous",
            )
            for name, array in call.cotangents.items()
        }
        return memory, placed, cotangents

    def _memory(self, job: Job) -> Memory:
        if self.candidate.framework == "jax":
            return Unguarded(job.device)
        if self.candidate.framework == "numpy":
            return NumpyMemory(guard_outputs=self.candidate.guard_outputs, finite=job.finite)
        from attnspec.conformance.memory_torch import TorchMemory

        return TorchMemory(job.device, guard_outputs=self.candidate.guard_outputs, finite=job.finite)

    def _call(
        self, job: Job, call: Call, placed: Mapping[str, Any], cotangents: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """Outputs, gradients by input name, and the inputs that no gradient reached."""

        def forward(inputs: Mapping[str, Any]) -> dict[str, Any]:
            args, kwargs = self.binding.arguments(inputs, call.options, call.resolved, self._merge)
            result = self.candidate.function(*args, **kwargs)
            return returned.unpack(result, tuple(self.binding.interface.outputs), self.candidate)

        if not job.wrt:
            return forward(placed), {}, []
        if self.back is not None:
            return gradients.explicit(self.binding, self.back, forward, placed, cotangents, job.wrt, call)
        differentiate = gradients.by_torch if self.candidate.framework == "torch" else gradients.by_jax
        return differentiate(self.candidate, forward, placed, cotangents, job.wrt)

    def _merge(self, mask: Any, bias: Any) -> Any:
        """One additive mask out of a boolean mask and a bias, for functions with a single parameter for
        both."""
        if self.candidate.framework == "torch":
            return bias.masked_fill(~mask, float("-inf"))
        if self.candidate.framework == "jax":
            import jax.numpy as jnp

            return jnp.where(mask, bias, -jnp.inf)
        return np.where(mask, bias, np.array(-np.inf, bias.dtype))

    def _check(self, job: Job, call: Call, results: Mapping[str, Any], grads: Mapping[str, Any]) -> None:
        names = list(self.binding.interface.outputs)
        for name, value in results.items() if call.shapes else ():
            returned.check(
                name,
                value,
                shape=call.shapes[name],
                dtype=job.case.dtype,
                device=job.device,
                candidate=self.candidate,
                first=name == names[0],
                order=self.binding.axes_order(name),
            )
        for name, value in grads.items():
            returned.check(
                f"d{name}",
                value,
                shape=call.inputs[name].shape,
                dtype=self.candidate.input_dtypes.get(name, job.case.dtype),
                device=job.device,
                candidate=self.candidate,
                first=True,
                order=self.binding.axes_order(name),
            )

    def _canonical(self, name: str, value: Any) -> Any:
        array = bridges.read(value, self.candidate.framework)
        order = self.binding.axes_order(name)
        return np.transpose(array, np.argsort(order)) if array.ndim else array

    def _decoy(self, job: Job) -> dict[str, Any] | None:
        """The outputs for the same shapes with every real input negated: what a cache by shape would return
        next."""
        _, placed, _ = self._place(job, job.call, sign=-1)
        try:
            args, kwargs = self.binding.arguments(placed, job.call.options, job.call.resolved, self._merge)
            result = self.candidate.function(*args, **kwargs)
            found = returned.unpack(result, tuple(self.binding.interface.outputs), self.candidate)
            self._reuse(job.case.id, found)
            return {name: self._canonical(name, value) for name, value in found.items()}
        except Exception:
            return None  # the real call will say the same

    def _reuse(self, case_id: str, results: Mapping[str, Any]) -> list[str]:
        """Whether this call returned an earlier call's memory: that result changes under its owner's hands.

        Earlier results are kept alive (a few, and small ones), so that an honest allocator cannot give their
        memory out again.
        """
        lines = []
        for name, value in results.items():
            shape = tuple(int(size) for size in value.shape)
            if int(np.prod(shape)) > KEPT_ELEMENTS:
                continue
            key = (name, shape, str(value.dtype))
            before = self.kept.pop(key, None)
            if before is not None and _shared(before[0], value, self.candidate.framework):
                lines.append(f"returns for {name} the memory that an earlier call returned (case {before[1]})")
            self.kept[key] = (value, case_id)
            if len(self.kept) > KEPT:
                self.kept.pop(next(iter(self.kept)))
        return lines

    def _receipt(
        self, job: Job, watch: Watch, memory: Memory, results: Mapping[str, Any], unused: list[str]
    ) -> dict[str, Any]:
        framework = self.candidate.framework
        receipt: dict[str, Any] = {
            "function": self.candidate.source(),
            "entered": watch.entered,
            "call": self.calls,
            "device": job.device,
            "dtypes": {name: bridges.dtype_name(value.dtype) for name, value in results.items()},
            "layouts": memory.layout_of(),
            "watched": "every call" if watch.complete else f"the first {watch.budget} calls",
            "oracle_calls": watch.oracle_calls,
            "memory": "not guarded: JAX owns its arrays"
            if framework == "jax"
            else "inputs and allocations guarded"
            if self.candidate.guard_outputs
            else "inputs guarded",
        }
        if unused:
            receipt["no_gradient"] = unused
        return receipt

    def _refuses_pair(self, job: Job) -> bool:
        """PyTorch's SDPA documents that attn_mask and is_causal exclude each other: an error then is a
        refusal."""
        parameters = {slot.parameter for slot in self.binding.slots}
        masked = "mask" in job.call.inputs or "bias" in job.call.inputs
        return {"attn_mask", "is_causal"} <= parameters and masked and bool(job.call.options.get("causal"))


@contextmanager
def _threads(faults: list[str]) -> Iterator[None]:
    """Threads that the candidate starts are waited for, and an exception in one of them is a fault."""
    before = set(threading.enumerate())
    hook = threading.excepthook
    raised: list[str] = []

    def note(args: Any) -> None:
        raised.append(f"a thread of the candidate raised {type(args.exc_value).__name__}: {args.exc_value}")

    threading.excepthook = note
    try:
        yield
        deadline = time.monotonic() + THREAD_WAIT
        for thread in set(threading.enumerate()) - before:
            thread.join(max(0.0, deadline - time.monotonic()))
    finally:
        threading.excepthook = hook
        faults += raised


def _memory_of_results(memory: Memory, results: Mapping[str, Any]) -> list[str]:
    """What is wrong with the memory that the results lie in."""
    lines = []
    for name, value in results.items():
        owner = memory.alias(value)
        if owner is not None:
            lines.append(f"returns its input {owner} as {name} (the same memory)")
        fresh = memory.unwritten(value)
        if fresh:
            lines.append(f"never writes {fresh} of {int(np.prod(value.shape))} elements of {name}")
    return lines


def _shared(first: Any, second: Any, framework: str) -> bool:
    if framework == "torch":
        if not first.numel() or not second.numel():
            return False
        return bool(first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr())
    if framework == "numpy":
        return bool(first.size and second.size and np.may_share_memory(first, second))
    return first is second


def _same(stale: Mapping[str, Any], outputs: Mapping[str, Any]) -> bool:
    name = next(iter(outputs))
    one, two = stale.get(name), outputs[name]
    return one is not None and one.shape == two.shape and bool(np.any(two)) and np.array_equal(one, two)


def _is_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def is_suite(filename: str) -> bool:
    """Whether a file is the machinery itself; adapters and planted kernels, in folders below, are
    candidates."""
    return Path(filename).parent == Path(__file__).parent


def _told(error: BaseException) -> str:
    """`Type: message (file:line in function)`, on one line, from where in the candidate's code it came."""
    text = " ".join(str(error).split())[:300] or "(no message)"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not is_suite(frame.filename)]
    place = f" ({own[-1].filename.rsplit('/', 1)[-1]}:{own[-1].lineno} in {own[-1].name})" if own else ""
    if isinstance(error, (Unsupported, CandidateError)):
        return text
    return f"{type(error).__name__}: {text}{place}"
