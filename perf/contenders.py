"""Who takes part in a benchmark: candidates of the suite, the equations themselves, and the slow reference.

A contender is judged before it is timed: `judge` says what is wrong with it on a case (None: nothing), `job` gives a
function of no arguments to time. Candidates are judged in a worker process like in `attnspec check`, by the oracle and
its tolerance; the reference must agree with the equations to 1e-11. The equations are the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnspec.conformance import api
from attnspec.conformance.binding import bind
from attnspec.conformance.bridges import narrow, to_jax, torch_dtype
from attnspec.conformance.candidate import Candidate, CandidateError, resolve
from attnspec.conformance.session import Session
from attnspec.conformance.suite import Suite
from attnspec.conformance.types import Case, CaseData, Level, Unsupported

EQUATIONS, REFERENCE = "equations", "reference"
AGREEMENT = 1e-11
Job = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """One that can be judged and timed.

    `framework` says how to wait for it; `precision` in what it computes: the case's dtype, or float64.
    """

    name: str
    framework: str
    precision: str
    judge: Callable[[Case], str | None]
    job: Callable[[Case, CaseData], Job]
    version: str = ""


def contender(name: str, suite: Suite, device: str, level: Level) -> Contender:
    """The contender called `name`: `equations`, `reference`, or whatever `attnspec check` takes.

    Raises:
        CandidateError: there is none, or not on this device.
    """
    if name == EQUATIONS:
        return _equations(suite, device)
    if name == REFERENCE:
        return _reference(suite)
    return _candidate(name, suite, device, level)


def _candidate(name: str, suite: Suite, device: str, level: Level) -> Contender:
    candidate = resolve(name, suite.name)
    binding = bind(candidate, suite.interface)
    passed: dict[tuple[str, str], str | None] = {}

    def judge(case: Case) -> str | None:
        key = (case.dtype, case.direction)
        if key not in passed:
            passed[key] = _level(name, case, device, level)
        if passed[key] is None:
            with Session(name, suite, device=device, timeout=api.TIMEOUT) as session:
                result = session.judge(case)
            if result.status in ("refused", "not_supported"):
                raise Unsupported(result.message)
            return None if result.status == "pass" else f"{result.status} on the timed case: {result.message}"
        return passed[key]

    def job(case: Case, data: CaseData) -> Job:
        shown = suite.to_candidate(data, binding.signature)
        placed = {
            input_name: _placed(binding, candidate, input_name, value, case.dtype, device)
            for input_name, value in shown.inputs.items()
            if value is not None
        }
        resolved = {**suite.frame(case, shown)[0], **shown.options}

        def call(inputs: Mapping[str, Any]) -> Any:
            args, kwargs = binding.arguments(inputs, shown.options, resolved, _merge)
            return candidate.function(*args, **kwargs)

        if case.direction == "forward":
            return lambda: call(placed)
        return _differentiated(candidate, binding.signature.differentiable, call, placed)

    return Contender(name, candidate.framework, "as given", judge, job, candidate.version_text())


def _level(name: str, case: Case, device: str, level: Level) -> str | None:
    """What is wrong at a whole level of the suite, in the case's dtype and direction.

    Raises:
        Unsupported: nothing could be judged.
    """
    report = api.check(
        name, case.mechanism, level=level, dtypes=[case.dtype], device=device, directions=[case.direction],
        explain=False,
    )  # fmt: skip
    if report.exit_code == 2:
        raise Unsupported(report.summary)
    return None if report.exit_code == 0 else f"does not conform at level {level}: {report.summary}"


def _placed(binding: Any, candidate: Candidate, name: str, value: Any, dtype: str, device: str) -> Any:
    """One input as the candidate takes it: its layout, dtype, framework and device."""
    kind = binding.interface.inputs[name].kind
    dtype = candidate.input_dtypes.get(name, dtype if kind == "real" else "bool" if kind == "bool" else "int64")
    array = np.asarray(value)
    array = np.transpose(array, binding.axes_order(name)) if array.ndim else array
    array = np.ascontiguousarray(narrow(array, dtype, name) if kind == "real" else array)
    if candidate.framework == "jax":
        return to_jax(array, dtype, device)
    if candidate.framework == "numpy":
        return array
    import torch

    return torch.from_numpy(array.copy()).to(device, torch_dtype(dtype))


def _merge(mask: Any, bias: Any) -> Any:
    """One additive mask, for functions with a single parameter for mask and bias."""
    return bias.masked_fill(~mask, float("-inf"))


def _differentiated(
    candidate: Candidate, names: tuple[str, ...], call: Callable[[Mapping[str, Any]], Any], placed: dict[str, Any]
) -> Job:
    """The backward pass alone, through PyTorch's autograd; the forward pass runs once, before."""
    if candidate.framework != "torch" or candidate.backward is not None:
        raise Unsupported("its backward pass alone is timed only through PyTorch's autograd")
    import torch

    leaves = [placed[name].requires_grad_() for name in names if name in placed]
    result = call(placed)
    outputs = list(result.values()) if isinstance(result, Mapping) else list(result) if isinstance(result, tuple) else [
        result
    ]  # fmt: skip
    graph = [output for output in outputs if output is not None and output.requires_grad][:1]
    if not graph:
        raise Unsupported("its result has no gradient")
    cotangent = torch.randn(graph[0].shape, device=graph[0].device).to(graph[0].dtype)
    return lambda: torch.autograd.grad(graph[0], leaves, cotangent, retain_graph=True, allow_unused=True)


def _equations(suite: Suite, device: str) -> Contender:
    """The evaluator in float64: NumPy on the CPU, PyTorch on a GPU. It is the oracle, and judged by nobody."""
    mechanism = suite.mechanism

    def job(case: Case, data: CaseData) -> Job:
        inputs: dict[str, Any] = {name: value for name, value in data.inputs.items() if value is not None}
        if case.direction == "backward":
            method = "equations" if mechanism.gradient is not None else "autograd"
            return lambda: mechanism.gradients(inputs, data.options, data.cotangents, method=method)
        if device == "cpu":
            return lambda: mechanism.evaluate(inputs, data.options)
        import torch

        there = {name: torch.from_numpy(np.asarray(value)).to(device) for name, value in inputs.items()}
        return lambda: mechanism.evaluate(there, data.options, xp=torch)

    framework = "torch" if device == "cuda" else "numpy"
    return Contender(EQUATIONS, framework, "fp64", lambda case: None, job)


def _reference(suite: Suite) -> Contender:
    """The hand-written NumPy function in float64."""
    from importlib import import_module

    try:
        function = getattr(import_module(f"attnspec.reference.{suite.name}"), suite.name)
    except ImportError:
        raise CandidateError(f"{suite.name} has no reference") from None

    def call(data: CaseData) -> Any:
        return function(**{name: v for name, v in data.inputs.items() if v is not None}, **data.options)

    def judge(case: Case) -> str | None:
        if case.direction == "backward":
            return None  # never timed
        data = suite.build(case)
        got, want = call(data), suite.mechanism.evaluate(data.inputs, data.options)
        for name, value in want.items():
            scale = np.max(np.abs(value[np.isfinite(value)]), initial=1.0)
            if not np.allclose(got[name], value, rtol=AGREEMENT, atol=AGREEMENT * scale):
                return f"its {name} differs from the equations by more than {AGREEMENT}"
        return None

    def job(case: Case, data: CaseData) -> Job:
        if case.direction == "backward":
            raise Unsupported("the backward passes of the references have no common form")
        return lambda: call(data)

    return Contender(REFERENCE, "numpy", "fp64", judge, job)


def default_candidate(mechanism: str, device: str) -> str:
    """Our kernel on a GPU; on the CPU, where Triton only interprets, the reference."""
    if device == "cpu":
        return REFERENCE
    from attnspec.impls import written

    for module, _ in written(mechanism):
        return f"attnspec.impls.{module}:{mechanism}"
    raise CandidateError(f"{mechanism} has no kernel of ours: name a candidate")
