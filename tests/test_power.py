"""The suite's tolerance from both sides, for every mechanism: what rounds honestly passes, small faults do not.

Honest: the equations and every form of them, computed in float32 with sums forward, reversed and in blocks of 16, 64
and 128, what may be stored rounded to the dtype of the inputs (`rounded_arithmetic`), and forms with other chunk
lengths. Faults: one change of one line of a mechanism's file, the kind of slip that a kernel's author makes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from attnspec.conformance.cases import build, cases_for
from attnspec.conformance.oracle import expected, rounding_model
from attnspec.conformance.types import Case, Observation
from attnspec.conformance.verdict import judge_observation
from attnspec.spec import load, mechanisms
from attnspec.spec.language import SpecError
from attnspec.spec.language.evaluate import evaluate
from attnspec.spec.language.formats import round_to
from attnspec.spec.mechanism import Mechanism
from attnspec.tests.rounded_arithmetic import Order, Rounded

DTYPES = ("fp32", "bf16")
ORDERS: tuple[Order, ...] = ("forward", "reversed", 16, 64)
CHUNKS = (16, 64, 128)
LENGTHS = frozenset({"chunk", "block"})
"""Options that say how a form is cut up and on which the result does not depend."""


def the_cases(mechanism: Mechanism, level: Any, dtype: str, share: int) -> list[Case]:
    """One case in `share`, by a hash of its id, of those that are judged by tolerance."""
    every = [case for case in cases_for(mechanism, level, [dtype], "forward") if case.check == "tolerance"]
    return [case for case in every if zlib.crc32(case.id.encode()) % share == 0] or every[:1]


@dataclass
class Judged:
    """How one way to compute a case fared; `worst` is the closest approach to a limit."""

    case: str
    passed: bool
    worst: float
    message: str


def judged(mechanism: Mechanism, case: Case, outputs: Mapping[str, Any], want: Any) -> Judged:
    """Judge arrays as if a kernel had returned them: the first output in the case's dtype, the others in float32."""
    main = next(iter(mechanism.outputs))
    returned = {name: round_to(value, case.dtype if name == main else "fp32") for name, value in outputs.items()}
    evidence = judge_observation(case, want, Observation("returned", outputs=returned))
    assert evidence, f"{case.id}: nothing was judged"
    shares = [max(e.rms_z / (e.rms_limit or 1), e.max_z / (e.max_limit or 1)) for e in evidence]
    bad = next((entry for entry in evidence if not entry.passed), None)
    return Judged(case.id, bad is None, max(shares), "" if bad is None else f"{bad.name}: {bad.message}")


@dataclass(frozen=True)
class Way:
    """One honest way to compute a case: a form (None: the equations), options on which nothing depends, an order."""

    form: str | None
    lengths: tuple[tuple[str, int], ...]
    order: Order

    def __str__(self) -> str:
        return f"{self.form or 'equations'}, {dict(self.lengths) or 'as given'}, {self.order}"


def honest_ways(mechanism: Mechanism, case: Case) -> list[Way]:
    """The ways of a case, form by form; a long case by the equations alone."""
    found = [Way(None, (), order) for order in ORDERS]
    if case.group.startswith("long"):
        return found
    free = LENGTHS & set(mechanism.options) - set(case.options)
    for form in mechanism.forms:
        found += [Way(form, (), order) for order in ORDERS[:2]]
        found += [Way(form, ((name, length),), "forward") for name in sorted(free) for length in CHUNKS]
    return found


def compute(mechanism: Mechanism, case: Case, data: Any, way: Way) -> dict[str, Any]:
    """The outputs of a case computed in one way."""
    program = mechanism.program if way.form is None else mechanism.forms[way.form]
    sizes, options = mechanism.resolve(data.inputs, data.options)
    model = rounding_model(mechanism, case.dtype, form=way.form)
    return evaluate(program, data.inputs, options, sizes=sizes, rows=case.rows, arithmetic=Rounded(model, way.order))


def rejections(name: str, dtype: str, level: Any, share: int) -> list[str]:
    """What the suite says against honest ways; empty is right."""
    mechanism = load(name)
    found = []
    for case in the_cases(mechanism, level, dtype, share):
        data = build(case, mechanism=mechanism)
        for way in honest_ways(mechanism, case):
            stated = replace(data, options=data.options | dict(way.lengths))
            want = expected(case, stated, mechanism=mechanism, form=way.form)  # remembers what it has computed
            verdict = judged(mechanism, case, compute(mechanism, case, stated, way), want)
            if not verdict.passed:
                found.append(f"{way}: {verdict.case}: {verdict.message}")
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", mechanisms())
def test_honest_ways_to_compute_it_pass(name: str, dtype: str) -> None:
    assert rejections(name, dtype, "smoke", 5) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", *DTYPES])
@pytest.mark.parametrize("name", mechanisms())
def test_honest_ways_to_compute_it_pass_at_standard(name: str, dtype: str) -> None:
    assert rejections(name, dtype, "standard", 3) == []


@dataclass(frozen=True)
class Fault:
    """One line of a mechanism's equations (or of a form) written wrongly."""

    mechanism: str
    what: str
    old: str
    new: str
    form: str | None = None
    options: tuple[tuple[str, Any], ...] = ()


CHUNK = (("chunk", 16),)
ENOUGH = 3
"""Rejections after which no further case is posed."""
FAULTS = (
    Fault(
        "lightning_attention",
        "lost state of the blocks before",
        "* state[h,c - 1,d,e] +",
        "* 0 * state[h,c - 1,d,e] +",
        "blocks",
    ),
    Fault(
        "lightning_attention",
        "decay of a block off by one step",
        "(i % block + 1)",
        "(i % block)",
        "blocks",
        (("block", 16),),
    ),
    Fault("gla", "lost chunk state", "* carry[g,c - 1,d,e] if", "* 0 * carry[g,c - 1,d,e] if", "chunks", CHUNK),
    Fault(
        "gla",
        "decay off by one step",
        "path[g,i,j,d] = exp(sum[u : j < u <= i]",
        "path[g,i,j,d] = exp(sum[u : j <= u < i]",
        "chunks",
        CHUNK,
    ),
    Fault(
        "gated_delta_rule",
        "lost chunk state",
        "faded[h,last[c]] * carry[h,c - 1,d,e]",
        "0 * carry[h,c - 1,d,e]",
        "chunks",
        CHUNK,
    ),
    Fault(
        "gated_delta_rule", "prediction from the state before its decay", "* held[h,i,d,e])", "* state[h,i - 1,d,e])"
    ),
    Fault(
        "mamba2_ssd",
        "lost chunk state",
        "faded[h,last[c]] * carry[h,c - 1,p,n]",
        "0 * carry[h,c - 1,p,n]",
        "chunks",
        CHUNK,
    ),
    Fault("mamba2_ssd", "decay off by one step", "step[h,i] * A[h])", "step[h,max(i - 1, 0)] * A[h])"),
    Fault(
        "titans_memory",
        "momentum of the token before",
        "eta[h,i] * S[h,i - 1,e,d]",
        "eta[h,max(i - 1, 0)] * S[h,i - 1,e,d]",
    ),
    Fault(
        "lasp2",
        "lost state of the devices before",
        "(exp(-rate[h] * C * (t - 1 - w)) * Mst[w,h,d,e])",
        "(0 * Mst[w,h,d,e])",
    ),
    Fault(
        "biformer_bra", "swapped tie", "rank[n](A[a,n])", "sum[r : A[a,r] > A[a,n] or A[a,r] == A[a,n] and r > n](1)"
    ),
    Fault("biformer_bra", "dropped region", "place[a,n] < topk", "place[a,n] < topk - 1"),
    Fault(
        "informer_probsparse",
        "swapped tie",
        "rank[i](Msr[h,i])",
        "sum[r : Msr[h,r] > Msr[h,i] or Msr[h,r] == Msr[h,i] and r > i](1)",
    ),
    Fault("informer_probsparse", "one active query too few", "place[h,i] < top", "place[h,i] < top - 1"),
    Fault("landmark_attention", "dropped block", "place[h,i,j] < topk", "place[h,i,j] < topk - 1"),
    Fault(
        "landmark_attention",
        "gate without its own block",
        "own[i,j] or landmark[j] and open[h,i,j]](S",
        "landmark[j] and open[h,i,j]](S",
    ),
    Fault(
        "flow_attention", "competition among all sources in the causal form", "s <= j if causal else s < nk", "s < nk"
    ),
    Fault(
        "flow_attention", "allocation without its sigmoid's count", "received[h,i] * nq / max(nk, 1)", "received[h,i]"
    ),
    Fault("lssa_softplus_attention", "average over one key too many", "relu(n[h,i] * A", "relu((n[h,i] + 1) * A"),
    Fault(
        "lssa_softplus_attention",
        "power off by a tenth",
        "(excess[h,i,j] / peak[h,i]) ** power",
        "(excess[h,i,j] / peak[h,i]) ** (power * 1.1)",
    ),
    Fault(
        "kronecker_tensor_attention", "one pair too few", "(l <= i if causal else True)", "(l < i if causal else True)"
    ),
    Fault("fused_neighborhood_attention", "window one key narrower at the end", "startx[i] + wx", "startx[i] + wx - 1"),
    Fault("softmax_attention", "scale 1 % off", "scale * sum[d](Q", "1.01 * scale * sum[d](Q"),
)


def broken(fault: Fault, folder: Path) -> Mechanism:
    """The mechanism with the fault in its file.

    Raises:
        AssertionError: the file no longer has the line.
    """
    path = load(fault.mechanism).path
    text = path.read_text(encoding="utf-8")
    start = text.index(f'name = "{fault.form}"') if fault.form else text.index("[equations]")
    end = text.index("\n'''", start)
    assert fault.old in text[start:end], f"{fault.mechanism} has no {fault.old!r} any more"
    target = folder / path.name
    target.write_text(text[:start] + text[start:end].replace(fault.old, fault.new, 1) + text[end:], encoding="utf-8")
    return load(target)


def noticed(fault: Fault, dtype: str, folder: Path) -> list[str]:
    """The cases of the level standard that reject the fault, computed without any rounding but that of the result.

    Of its groups the shapes of the level smoke, the values and the probes are posed here.
    """
    mechanism, wrong = load(fault.mechanism), broken(fault, folder)
    program = wrong.program if fault.form is None else wrong.forms[fault.form]
    found = []
    few = cases_for(mechanism, "smoke", [dtype], "forward")
    more = [c for c in cases_for(mechanism, "standard", [dtype], "forward") if c.group in ("values", "probes")]
    for case in {case.id: case for case in (*few, *more)}.values():
        if case.check not in ("tolerance", "exact") or set(dict(fault.options)) & set(case.options):
            continue
        data = build(case, mechanism=mechanism)
        sizes, options = mechanism.resolve(data.inputs, data.options)
        try:
            got = evaluate(program, data.inputs, options | dict(fault.options), sizes=sizes, rows=case.rows)
        except SpecError as error:
            found.append(f"{case.id}: {error}")
            continue
        verdict = judged(mechanism, case, got, expected(case, data, mechanism=mechanism))
        if not verdict.passed:
            found.append(f"{case.id}: {verdict.message}")
        if len(found) == ENOUGH:
            break
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.mechanism}: {fault.what}")
def test_a_small_fault_is_rejected(fault: Fault, dtype: str, tmp_path: Path) -> None:
    assert noticed(fault, dtype, tmp_path)
