"""Mechanical mutants of a mechanism's equations against the suite's own cases.

Each mutant is a wrong program (`spec.language.mutate`); here it plays the candidate: evaluated in float64 on the inputs
of a case, rounded to the case's dtype, and judged like any kernel. A mutant is killed by the first case that rejects
it, be it by failing on a legal call that the original answers. Cases in which the change cannot matter (it stands in a
branch that the options switch off) are not tried; a mutant that no case can run is no function at all (invalid), and
one that no case even reaches is an error and not a kill. Used by `mutation`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnspec.conformance.interface import Interface
from attnspec.conformance.shapes import derived
from attnspec.conformance.suite import Suite
from attnspec.conformance.types import CandidateSignature, Case, CaseData, Direction, Observation
from attnspec.spec.language import SpecError, static_value, subexpressions
from attnspec.spec.language.formats import round_to
from attnspec.spec.language.mutate import Mutant, mutants
from attnspec.spec.language.static import Folder, Plan, Setting
from attnspec.spec.language.syntax import Bool, Name, Node, Num, Program, Reduce, Str
from attnspec.spec.mechanism import Mechanism

WORK_LIMIT = 3_000_000
"""Multiply-adds of the scores beyond which a case is too large for hundreds of mutants."""
UNREACHED = "takes part in no case"
SEVERAL_CALLS = ("refusal", "determinism")
"""Checks that judge something else than the values of one call."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant. `status`: killed, survived, invalid (never ran), or error (was never reached).

    `case` is the killing case, `ratio` how far beyond the limit its worst element was (1 = at the limit), `reached` in
    how many cases the change took part, `raised` in how many of those it could not be evaluated.
    """

    id: str
    kind: str
    description: str
    status: str
    case: str = ""
    ratio: float = 0.0
    reached: int = 0
    raised: int = 0
    message: str = ""


def everything(interface: Interface, dtypes: Sequence[str] = ("fp32",)) -> CandidateSignature:
    """The signature of a candidate that takes every input and option and returns every output."""
    return CandidateSignature(
        name="mutant",
        mechanism=interface.mechanism,
        inputs=frozenset(interface.inputs),
        options=frozenset(interface.options),
        not_taken={},
        dtypes=tuple(dtypes),
        devices=("cpu",),
        framework="numpy",
        declares={},
        outputs=tuple(interface.outputs),
        differentiable=tuple(name for name, face in interface.inputs.items() if face.differentiable),
    )


def all_mutants(mechanism: Mechanism) -> list[tuple[Direction, Mutant]]:
    """The mutants of the equations and of the backward equations, in the order of the text."""
    found: list[tuple[Direction, Mutant]] = [("forward", mutant) for mutant in mutants(mechanism.program)]
    if mechanism.gradient is not None:
        own = [name for name in mechanism.gradient.definitions if name not in mechanism.program.definitions]
        found += [("backward", mutant) for mutant in mutants(mechanism.gradient, own)]
    return found


class Arena:
    """The cases of one direction with everything about them that mutants share, computed when first needed."""

    def __init__(self, suite: Suite, direction: Direction, cases: Iterable[Case]) -> None:
        self.suite = suite
        self.mechanism: Mechanism = suite.mechanism
        self.direction = direction
        self.signature = everything(suite.interface)
        program = self.mechanism.program if direction == "forward" else self.mechanism.gradient
        assert program is not None
        self.program = program
        parts = _index_sets(program)
        self.cases = _ordered(case for case in cases if _usable(self.mechanism, parts, case))
        self._data: dict[str, CaseData] = {}
        self._folded: dict[str, tuple[Plan, Folder]] = {}
        self._exact: dict[str, dict[str, Any]] = {}
        self._expected: dict[str, Any] = {}
        self.kills: dict[str, int] = {}

    def data(self, case: Case) -> CaseData:
        if case.id not in self._data:
            self._data[case.id] = self.suite.build(case, self.signature)
        return self._data[case.id]

    def folded(self, case: Case) -> tuple[Plan, Folder]:
        """The original equations under the case's sizes and options."""
        if case.id not in self._folded:
            data = self.data(case)
            sizes, resolved = self.mechanism.resolve(data.inputs, data.options)
            options = {name: value for name, value in resolved.items() if value is not None}
            arguments = {*data.inputs, *options, *(f"d{name}" for name in data.cotangents)}
            setting = Setting(sizes, options, frozenset(arguments))
            plan = Plan(self.program, setting)
            folder = Folder(setting, self.program.file)
            for name, body in plan.bodies.items():
                if isinstance(body, Num | Bool | Str):
                    folder.known[name] = body
                    left = self.program.definitions[name].subscripts
                    folder.plain_left[name] = tuple(s.id for s in left if isinstance(s, Name))
            self._folded[case.id] = plan, folder
        return self._folded[case.id]

    def matters(self, mutant: Mutant, case: Case) -> bool:
        """Whether the change is still there, and needed by an output, under the case's sizes and options."""
        if self.data(case).extra.get("calls"):
            return False  # judged by several calls of one kernel; a program has no memory between calls
        plan, folder = self.folded(case)
        if mutant.name not in _needed(self._outputs(case), plan):
            return False
        for table, bodies in ((mutant.program.definitions, plan.bodies), (mutant.program.boundaries, plan.edges)):
            if mutant.name not in table:
                continue
            try:
                body: Node | None = folder.fold(table[mutant.name].body)
            except SpecError:
                return True
            original = bodies[mutant.name]
            if isinstance(body, Num) and isinstance(original, Num):
                if float(body.value) != float(original.value):
                    return True
            elif body != original:
                return True
        return False

    def _outputs(self, case: Case) -> list[str]:
        """What the case asks for: every output, or the gradients of the inputs that it gives."""
        if self.direction == "forward":
            return list(self.program.declarations.outputs)
        given = self.data(case).inputs
        return [name for name, source in self.mechanism.gradient_of.items() if source in given]

    def compute(self, case: Case, program: Program | None = None) -> dict[str, Any]:
        """Outputs (gradients for a backward case) of the original or of a mutant, in float64."""
        data = self.data(case)
        forward = self.direction == "forward"
        spec = self.mechanism
        if program is not None:
            replaced = dataclasses.replace
            spec = replaced(spec, program=program) if forward else replaced(spec, gradient=program)
        with np.errstate(all="ignore"):
            if forward:
                return spec.evaluate(data.inputs, data.options)
            return spec.gradients(data.inputs, data.options, data.cotangents)

    def exact(self, case: Case) -> dict[str, Any]:
        if case.id not in self._exact:
            self._exact[case.id] = self.compute(case)
        return self._exact[case.id]

    def judge(self, case: Case, results: dict[str, Any]) -> tuple[bool, float]:
        """Whether the case rejects these results, and the worst ratio to the limits."""
        if case.id not in self._expected:
            self._expected[case.id] = self.suite.expected(case, self.data(case), self.signature)
            if self.judge(case, self.exact(case))[0]:
                raise AssertionError(f"{case.id} rejects the original equations: its kills would prove nothing")
        rounded = {name: np.asarray(round_to(np.asarray(value), case.dtype)) for name, value in results.items()}
        observation = Observation("returned")
        if self.direction == "forward":
            observation.outputs = rounded
        else:
            observation.gradients = rounded
        evidence = self.suite.judge(case, self._expected[case.id], observation)
        worst = 0.0
        for entry in evidence:
            for value, limit in ((entry.max_z, entry.max_limit), (entry.rms_z, entry.rms_limit)):
                if limit > 0 and not entry.passed:
                    worst = max(worst, value / limit if math.isfinite(value) else math.inf)
        return any(not entry.passed for entry in evidence), worst

    def run(self, mutant: Mutant) -> Outcome:
        """Pose the mutant the cases until one rejects it; those that killed the most so far come first."""
        reached = raised = 0
        failed, message = "", ""
        for case in sorted(self.cases, key=lambda case: -self.kills.get(case.id, 0)):
            if not self.matters(mutant, case):
                continue
            reached += 1
            try:
                results = self.compute(case, mutant.program)
            except SpecError as error:
                raised += 1
                failed, message = failed or case.id, str(error)
                continue
            if _same(results, self.exact(case)):
                continue
            rejected, ratio = self.judge(case, results)
            if rejected:
                self.kills[case.id] = self.kills.get(case.id, 0) + 1
                return self._outcome(mutant, "killed", case.id, ratio, reached, raised)
        if not reached:
            return self._outcome(mutant, "error", "", 0.0, reached, raised, UNREACHED)
        if reached == raised:
            # It divides by zero or reads beyond a tensor wherever it is evaluated: no such function to tell apart.
            return self._outcome(mutant, "invalid", "", 0.0, reached, raised, message)
        if raised:
            # A kernel that fails on a legal call is rejected, though it be right wherever it returns.
            return self._outcome(mutant, "killed", failed, math.inf, reached, raised, message)
        return self._outcome(mutant, "survived", "", 0.0, reached, raised)

    def _outcome(self, mutant: Mutant, status: str, case: str, ratio: float, reached: int, raised: int,
                 message: str = "") -> Outcome:
        return Outcome(mutant.id, self.direction, mutant.description, status, case, ratio, reached, raised, message)


def _usable(mechanism: Mechanism, parts: Iterable[frozenset[str]], case: Case) -> bool:
    if case.check in SEVERAL_CALLS or case.rows is not None:
        return False
    sizes = derived(mechanism, case.sizes)
    return all(_elements(mechanism, axes, sizes) <= WORK_LIMIT for axes in parts)


def _elements(mechanism: Mechanism, axes: frozenset[str], sizes: dict[str, int]) -> int:
    """How many values a set of indices takes under a case's options' defaults; 1 for what these do not determine."""
    lengths = (static_value(mechanism.indices[axis], sizes=sizes) for axis in (*axes, *mechanism.batch))
    return math.prod(max(1, int(length)) for length in lengths if isinstance(length, int))


def _index_sets(program: Program) -> set[frozenset[str]]:
    """The indices over which each definition runs, those that it reduces over among them."""
    found: set[frozenset[str]] = set()
    for definition in program.definitions.values():
        axes = {part.id for part in definition.subscripts if isinstance(part, Name)}
        for node in subexpressions(definition.body):
            if isinstance(node, Reduce):
                axes |= set(node.indices)
        found.add(frozenset(axes))
    return found


def _ordered(cases: Iterable[Case]) -> list[Case]:
    """Small cases first, and of equally small ones those of different groups in turn."""
    groups: dict[str, int] = {}
    ranked = []
    for number, case in enumerate(cases):
        volume = math.prod(max(1, size) for size in case.sizes.values())
        turn = groups[case.group] = groups.get(case.group, 0) + 1
        ranked.append((int(math.log2(max(volume, 1)) // 3), turn, number, case))
    return [case for *_, case in sorted(ranked, key=lambda entry: entry[:3])]


def _needed(outputs: list[str], plan: Plan) -> set[str]:
    """The definitions that the outputs may need under a plan; what folded to a literal is no longer named anywhere."""
    cached: set[str] | None = getattr(plan, "needed", None)
    if cached is not None:
        return cached
    found: set[str] = set()
    pending = list(outputs)
    while pending:
        name = pending.pop()
        if name in found or name not in plan.bodies:
            continue
        found.add(name)
        for body in (plan.bodies[name], plan.edges.get(name)):
            for node in subexpressions(body) if isinstance(body, Node) else ():
                pending += [label for label in (getattr(node, "name", None), getattr(node, "id", None)) if label]
    found |= {name for name, body in plan.bodies.items() if isinstance(body, Num | Bool | Str)}
    plan.needed = found  # type: ignore[attr-defined]
    return found


def _same(results: dict[str, Any], exact: dict[str, Any]) -> bool:
    """Equal up to float64 rounding: no case can tell these."""
    for name, value in exact.items():
        if results[name].shape != value.shape:
            return False
        with np.errstate(all="ignore"):
            near = np.abs(results[name] - value) <= 1e-13 * np.abs(value)
        if not (near | (results[name] == value) | (np.isnan(results[name]) & np.isnan(value))).all():
            return False
    return True
