"""Who tests the tests: every known wrong variant of a mechanism against the suite's `standard` cases.

`run` poses all mechanical mutants (`mechanical`) and all planted kernels (`planted_run`) and reports which are killed,
by which case and how clearly. A survivor must be explained in the mechanism's file (`[[equivalent_mutant]]` with its id
and a reason); an explanation that matches no survivor is an error, and so is a mutant that no case reaches, unless it
is explained. The work is cut into a fixed number of parts, so that the result does not depend on how many processes
share it. `kill_matrix` says which variants one case rejects. Behind `attnspec mutants`.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from attnspec.conformance.mechanical import UNREACHED, Arena, Outcome, all_mutants, everything
from attnspec.conformance.suite import Suite
from attnspec.conformance.types import Case
from attnspec.spec.mechanism import Mechanism, load

PARTS = 4
"""Parts into which the work is cut, whatever the number of processes: killing cases then do not depend on it."""
PLANTED_FOR = "softmax_attention"


@dataclass
class MutationReport:
    """The result for one mechanism. `explained` gives the reason by id of each explained survivor."""

    mechanism: str
    mechanical: list[Outcome] = field(default_factory=list)
    planted: list[Any] = field(default_factory=list)
    explained: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def killed(self) -> int:
        return sum(entry.status == "killed" for entry in self.mechanical)

    @property
    def total(self) -> int:
        """Mutants that can be evaluated and are no known equivalents."""
        return sum(entry.id not in self.explained and entry.status != "invalid" for entry in self.mechanical)

    @property
    def invalid(self) -> list[Outcome]:
        """Mutants that no case can evaluate: no functions, neither killed nor counted."""
        return [entry for entry in self.mechanical if entry.status == "invalid"]

    @property
    def survivors(self) -> list[Any]:
        """Survivors without an explanation."""
        return [
            entry
            for entry in (*self.mechanical, *self.planted)
            if entry.status == "survived" and entry.id not in self.explained
        ]

    @property
    def regions_right(self) -> int:
        return sum(entry.region == entry.expected_region for entry in self.planted)

    @property
    def ok(self) -> bool:
        return not self.survivors and not self.problems

    def document(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {
            "mechanism": self.mechanism,
            "killed": self.killed,
            "total": self.total,
            "equivalent": len(self.explained),
            "invalid": len(self.invalid),
            "planted": len(self.planted),
            "planted_killed": sum(entry.status == "killed" for entry in self.planted),
            "planted_regions_right": self.regions_right,
            "problems": self.problems,
            "survivors": [entry.id for entry in self.survivors],
            "mutants": [_entry(e) | _reason(e.id, self.explained) for e in self.mechanical],
            "planted_kernels": [_entry(e) for e in self.planted],
        }


def _entry(outcome: Any) -> dict[str, Any]:
    data = dataclasses.asdict(outcome)
    data["ratio"] = float(f"{data['ratio']:.3g}") if data["ratio"] != float("inf") else "inf"
    return data


def _reason(name: str, explained: dict[str, str]) -> dict[str, str]:
    return {"reason": explained[name]} if name in explained else {}


def run(
    mechanism: str,
    *,
    processes: int | None = None,
    mechanical: bool | Callable[[str], bool] = True,
    planted: bool | Callable[[str], bool] = True,
    progress: Callable[[int, int], None] | None = None,
) -> MutationReport:
    """Pose every wrong variant of a mechanism.

    Args:
        processes: worker processes; by default one for each core, 2 at least. 0: in this process.
        mechanical, planted: whether to run these at all, or which ids.
        progress: called with the number of parts done and their total.

    Raises:
        SpecError: no such mechanism.
    """
    began = time.perf_counter()
    spec = load(mechanism)
    tasks = [("mechanical", part) for part in range(PARTS)] if mechanical else []
    if planted and spec.name == PLANTED_FOR:
        tasks += [("planted", part) for part in range(PARTS)]
    chosen = {
        "mechanical": _chosen([mutant.id for _, mutant in all_mutants(spec)], mechanical) if mechanical else [],
        "planted": _chosen(_planted_names(), planted) if len(tasks) and tasks[-1][0] == "planted" else [],
    }
    results: dict[tuple[str, int], list[Any]] = {}
    jobs = [(kind, mechanism, tuple(chosen[kind][part::PARTS])) for kind, part in tasks]
    count = processes if processes is not None else max(2, os.cpu_count() or 2)
    if count == 0:
        for task, job in zip(tasks, jobs, strict=True):
            results[task] = _part(*job)
            if progress is not None:
                progress(len(results), len(tasks))
    else:
        with ProcessPoolExecutor(min(count, len(tasks) or 1), multiprocessing.get_context("spawn")) as pool:
            futures = {task: pool.submit(_part, *job) for task, job in zip(tasks, jobs, strict=True)}
            for task, future in futures.items():
                results[task] = future.result()
                if progress is not None:
                    progress(len(results), len(tasks))
    report = MutationReport(mechanism)
    for kind, target in (("mechanical", report.mechanical), ("planted", report.planted)):
        by_id = {entry.id: entry for task, part in results.items() if task[0] == kind for entry in part}
        target.extend(by_id[name] for name in chosen[kind])
    _explain(report, spec, complete=mechanical is True)
    report.seconds = time.perf_counter() - began
    return report


def _planted_names() -> list[str]:
    from attnspec.conformance import planted

    return [entry.name for entry in planted.all()]


def _chosen(names: Sequence[str], wanted: bool | Callable[[str], bool]) -> list[str]:
    return [name for name in names if wanted is True or (callable(wanted) and wanted(name))]


def _part(kind: str, mechanism: str, ids: tuple[str, ...]) -> list[Any]:
    """One part of the work, in a process of its own."""
    return _mechanical(mechanism, ids) if kind == "mechanical" else _planted(mechanism, ids)


def _mechanical(mechanism: str, ids: tuple[str, ...]) -> list[Outcome]:
    suite = Suite(mechanism)
    signature = everything(suite.interface)
    arenas: dict[str, Arena] = {}
    found = []
    wanted = set(ids)
    for direction, mutant in all_mutants(suite.mechanism):
        if mutant.id not in wanted:
            continue
        if direction not in arenas:
            cases = suite.cases("standard", ("fp32",), direction, 0, signature)
            arenas[direction] = Arena(suite, direction, cases)
        found.append(arenas[direction].run(mutant))
    return found


def _planted(mechanism: str, ids: tuple[str, ...]) -> list[Any]:
    import torch

    from attnspec.conformance import planted, planted_run

    torch.set_num_threads(1)
    suite = planted_run.CachedSuite(mechanism)
    entries = [planted.find(name) for name in ids]
    cases = {level: planted_run.standard(suite, level) for level in {entry.level for entry in entries}}
    return [planted_run.run(entry, suite, cases[entry.level]) for entry in entries]


def _explain(report: MutationReport, spec: Mechanism, complete: bool) -> None:
    """Match survivors with the explanations in the mechanism's file."""
    known = {entry.id: entry for entry in report.mechanical}
    for name, reason in spec.equivalent_mutants.items():
        if name not in known:
            if complete:
                report.problems.append(f"equivalent_mutant {name!r}: no mutant has this id")
        elif known[name].status == "survived" or known[name].message == UNREACHED:
            report.explained[name] = reason
        else:
            status = known[name].status
            report.problems.append(f"equivalent_mutant {name!r}: the mutant is {status}, so it is no equivalent")
    for outcome in (*report.mechanical, *report.planted):
        if outcome.status == "error" and outcome.id not in report.explained:
            report.problems.append(f"{outcome.id}: {outcome.message} ({outcome.description})")


def kill_matrix(case: Case) -> dict[str, bool]:
    """Which mechanical mutants of its direction a case rejects, by id: the case's power.

    Mutants that cannot matter under the case's options, or cannot be evaluated there, count as not rejected.
    """
    from attnspec.spec.language import SpecError

    suite = Suite(case.mechanism)
    arena = Arena(suite, case.direction, [case])
    found: dict[str, bool] = {}
    for direction, mutant in all_mutants(suite.mechanism):
        if direction != case.direction:
            continue
        found[mutant.id] = False
        if arena.matters(mutant, case):
            try:
                found[mutant.id] = arena.judge(case, arena.compute(case, mutant.program))[0]
            except SpecError:
                continue
    return found


def table(report: MutationReport) -> str:
    """The report as text: the counts, then every survivor and every problem."""
    share = 100 * report.killed / report.total if report.total else 100.0
    lines = [
        f"{report.mechanism}: {report.killed} of {report.total} mechanical mutants killed ({share:.1f} %), "
        f"{len(report.explained)} more are equivalent to the original, {len(report.invalid)} can be evaluated nowhere"
    ]
    if report.planted:
        killed = sum(entry.status == "killed" for entry in report.planted)
        lines.append(
            f"{killed} of {len(report.planted)} planted kernels rejected, "
            f"{report.regions_right} with the region named right ({report.seconds:.0f} s)"
        )
    lines += [f"  evaluated nowhere: {entry.id}: {entry.message}" for entry in report.invalid]
    lines += [f"  survived: {entry.id}: {entry.description}" for entry in report.survivors]
    lines += [f"  problem: {problem}" for problem in report.problems]
    return "\n".join(lines)
