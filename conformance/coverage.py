"""What exists for each mechanism, computed from the files and never typed.

A row says whether a mechanism has its equations, backward equations, a reference (forward, backward), a Triton
implementation (forward, backward), how many invariants, identities and claims its file states (a claim is confirmed,
conditional where it needs a condition that the paper does not state, or refuted), whether official code was compared
(an `[[evidence]]` with a commit), how many mutants the last recorded run killed, and of how many cases the kernel was
judged (`attnspec.perf.judged`). The README's table and
`attnspec coverage` print it. Nothing optional is imported: reference and implementations are read as source text.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import attnspec.impls
import attnspec.perf
import attnspec.reference
from attnspec.conformance.report.files import write
from attnspec.spec import Mechanism, load, mechanisms
from attnspec.spec.papers import papers

HEADINGS = (
    "mechanism", "family", "equations", "reference", "Triton", "invariants", "identities", "laws proved", "claims",
    "official code", "mutants killed", "kernel judged",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One mechanism. Mutants, and cases of the kernel, are None where no run is recorded."""

    name: str
    family: str
    spec: bool
    gradient: bool = False
    reference: bool = False
    reference_backward: bool = False
    triton: bool = False
    triton_backward: bool = False
    invariants: int = 0
    identities: int = 0
    proved: int = 0
    claims_confirmed: int = 0
    claims_conditional: int = 0
    claims_refuted: int = 0
    official: bool = False
    mutants_killed: int | None = None
    mutants: int | None = None
    judged: int | None = None
    judged_failed: int | None = None
    judged_level: str = ""
    papers: int = 0


@dataclass(frozen=True)
class Totals:
    """The account of the papers: those whose mechanism is here, those still planned, those without an equation."""

    papers: int
    papers_done: int
    papers_planned: int
    papers_without: int
    mechanisms: int


def rows(*, planned: bool = False) -> list[Row]:
    """The rows of all mechanisms, with `planned` also of those that papers lead to and that have no file yet."""
    known = mechanisms()
    read_by = dict.fromkeys(known, 0)
    waiting: dict[str, list[str]] = {}
    for paper in papers():
        if paper.mechanism in read_by:
            read_by[paper.mechanism] += 1
        elif paper.mechanism is not None:
            waiting.setdefault(paper.mechanism, []).append(paper.family or "")
    found = [_row(load(name), read_by[name]) for name in known]
    if planned:
        found += [
            Row(name, families[0], spec=False, papers=len(families)) for name, families in sorted(waiting.items())
        ]
    return found


def totals() -> Totals:
    """The papers by status."""
    known = frozenset(mechanisms())
    states = [paper.status(known) for paper in papers()]
    return Totals(len(states), states.count("done"), states.count("planned"), states.count("none"), len(known))


def document(*, planned: bool = False) -> dict[str, Any]:
    """Rows and totals, ready for JSON."""
    return {
        "format": "attnspec.coverage",
        "version": 1,
        "totals": asdict(totals()),
        "mechanisms": [asdict(row) for row in rows(planned=planned)],
    }


def table(*, planned: bool = False) -> str:
    """The rows as a Markdown table, as it stands in the README, and a sentence on the papers."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|---|---|---|---|---:|---:|---:|---|---|---:|---|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows(planned=planned)]
    return "\n".join([*lines, "", account()])


def cells(row: Row) -> list[str]:
    """The row as texts, one for each of `HEADINGS`."""
    killed = "" if row.mutants is None else f"{row.mutants_killed} of {row.mutants}"
    counts = (str(row.invariants), str(row.identities), str(row.proved))
    return [
        row.name, row.family, _ways(row.spec, row.gradient), _ways(row.reference, row.reference_backward),
        _ways(row.triton, row.triton_backward), *counts, _claims(row), "compared" if row.official else "", killed,
        _judged(row),
    ]  # fmt: skip


def account() -> str:
    """What became of the papers, in a sentence."""
    found = totals()
    return (
        f"{found.papers} papers: {found.papers_done} done, {found.papers_planned} planned, "
        f"{found.papers_without} without an equation of their own."
    )


def _claims(row: Row) -> str:
    parts = (
        (row.claims_confirmed, "confirmed"), (row.claims_conditional, "conditional"), (row.claims_refuted, "refuted")
    )  # fmt: skip
    return ", ".join(f"{count} {what}" for count, what in parts if count)


def _judged(row: Row) -> str:
    if row.judged is None:
        return ""
    failed = f", {row.judged_failed} fail" if row.judged_failed else ""
    return f"{row.judged} cases, {row.judged_level}{failed}"


def _ways(forward: bool, backward: bool) -> str:
    return "forward, backward" if forward and backward else "forward" if forward else "backward" if backward else ""


def _row(mechanism: Mechanism, read_by: int) -> Row:
    functions = _functions(_folder(attnspec.reference) / f"{mechanism.name}.py")
    kernels = dict(attnspec.impls.written(mechanism.name))
    recorded = mutation_result(mechanism.name)
    judged = judged_result(mechanism.name)
    return Row(
        name=mechanism.name,
        family=mechanism.family,
        spec=True,
        gradient=mechanism.gradient is not None,
        reference=mechanism.name in functions,
        reference_backward=f"{mechanism.name}_backward" in functions,
        triton=bool(kernels),
        triton_backward=any(kernels.values()),
        invariants=len(mechanism.invariants),
        identities=len(mechanism.identities),
        proved=sum(bool(law.get("prove")) for law in (*mechanism.invariants, *mechanism.identities)),
        claims_confirmed=sum(not claim.get("refuted") and not claim.get("where") for claim in mechanism.claims),
        claims_conditional=sum(not claim.get("refuted") and bool(claim.get("where")) for claim in mechanism.claims),
        claims_refuted=sum(bool(claim.get("refuted")) for claim in mechanism.claims),
        official=any(entry.get("commit") for entry in mechanism.evidence),
        mutants_killed=recorded and recorded[0],
        mutants=recorded and recorded[1],
        judged=judged and judged[0],
        judged_failed=judged and judged[1],
        judged_level=judged[2] if judged else "",
        papers=read_by,
    )


def record(mutation: Mapping[str, Any]) -> Path:
    """Keep the counts of a mutation run (`MutationReport.document`) for the table; returns the file."""
    path = _folder(attnspec.perf) / "results" / f"mutants.{mutation['mechanism']}.json"
    counts = {key: value for key, value in mutation.items() if isinstance(value, (int, str))}
    write(path, json.dumps(counts, indent=1) + "\n")
    return path


def mutation_result(mechanism: str) -> tuple[int, int] | None:
    """Mechanical mutants killed and run, the equivalent ones among them, as last recorded; None without a record."""
    path = _folder(attnspec.perf) / "results" / f"mutants.{mechanism}.json"
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        return int(recorded["killed"]), int(recorded["total"]) + int(recorded["equivalent"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def judged_result(mechanism: str) -> tuple[int, int, str] | None:
    """Cases of which the kernel was judged, those that it failed, and their level, as last recorded; None without."""
    path = _folder(attnspec.perf) / "results" / "judged.json"
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))[mechanism]
        return int(entry["judged"]), len(entry["failed"]), str(entry["level"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _folder(package: Any) -> Path:
    return Path(next(iter(package.__path__)))


def _functions(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
