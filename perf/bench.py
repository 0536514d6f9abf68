"""Throughput: mechanism x size x dtype x direction against a named alternative, in one run, as ratios.

`bench` measures; `attnspec bench` prints, writes and plots. Nothing is timed that was not judged: every contender must
conform at a level of the suite in the dtype and direction, and then on the timed case itself (sampled rows, one entry
of the batch). Contenders take turns, so that a disturbance of the machine meets all of them, and the ratio is that of
the medians. The share of the roofline is the least time that the equations' cost model allows on this machine, whose
two peaks are measured in the same run, over the time taken.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnspec.conformance import shapes
from attnspec.conformance.case_id import CaseError, make
from attnspec.conformance.suite import Suite
from attnspec.conformance.types import Case, Direction, Level, Unsupported
from attnspec.perf.contenders import Contender, contender
from attnspec.spec.language.cost import cost

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"batch": 1, "heads": 2, "kv_heads": 2, "queries": 64, "keys": 64, "feature": 16, "value_feature": 16},
    "small": {"batch": 1, "heads": 4, "kv_heads": 4, "queries": 512, "keys": 512, "feature": 64, "value_feature": 64},
    "grouped": {"batch": 1, "heads": 8, "kv_heads": 2, "queries": 512, "keys": 512, "feature": 64, "value_feature": 64},
    "2k": {"batch": 4, "heads": 16, "kv_heads": 16, "queries": 2048, "keys": 2048, "feature": 64, "value_feature": 64},
    "4k": {
        "batch": 4, "heads": 32, "kv_heads": 32, "queries": 4096, "keys": 4096, "feature": 128, "value_feature": 128
    },
    "4k-grouped": {
        "batch": 4, "heads": 32, "kv_heads": 8, "queries": 4096, "keys": 4096, "feature": 128, "value_feature": 128
    },
    "16k": {
        "batch": 1, "heads": 32, "kv_heads": 32, "queries": 16384, "keys": 16384, "feature": 64, "value_feature": 64
    },
    "decode": {
        "batch": 64, "heads": 32, "kv_heads": 8, "queries": 1, "keys": 8192, "feature": 128, "value_feature": 128
    },
}  # fmt: skip
"""Named sizes, by the part that a size plays; a mechanism's other sizes take what the suite's cases take."""
DEFAULT_SIZES = {"cpu": ("tiny", "small"), "cuda": ("2k", "4k", "16k", "decode")}
JUDGED_TOKENS = 1024
"""Gradients are judged in full and not by sampled rows: at most at this length."""
ITEM_BYTES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}
BACKWARD_WORK = 2
"""A product has two gradient products; what a kernel computes again to save memory is not owed to the equations."""
SAMPLE_SECONDS = 0.02


@dataclass
class Row:
    """One contender on one case. `seconds` is None where it was not timed, and `why` says why.

    `conforms` is None where it could not be judged: it does not take the case, or has no gradients.
    """

    contender: str
    version: str
    mechanism: str
    size: str
    sizes: dict[str, int]
    options: dict[str, Any]
    dtype: str
    computes_in: str
    direction: str
    judged_sizes: dict[str, int]
    conforms: bool | None = None
    seconds: float | None = None
    spread: float | None = None
    speedup: float | None = None
    roofline_share: float | None = None
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    peak_memory: int | None = None
    samples: int = 0
    why: str = ""


@dataclass
class Result:
    """A whole run. `peaks` are the machine's, measured: operations per second by dtype, and bytes per second."""

    against: str
    device: str
    level: str
    peaks: dict[str, float]
    environment: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    @property
    def failed(self) -> list[Row]:
        """Rows of contenders that were judged wrong: they make the run's exit code 1."""
        return [row for row in self.rows if row.conforms is False]


def bench(
    mechanism: str,
    candidates: Sequence[str],
    against: str,
    *,
    sizes: Sequence[str | Mapping[str, int]],
    dtypes: Sequence[str],
    directions: Sequence[Direction],
    options: Mapping[str, Any] | None = None,
    inputs: Sequence[str] = (),
    device: str = "cpu",
    level: Level = "smoke",
    repeats: int = 9,
    peak: dict[str, float] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Result:
    """Judge, then time, every candidate beside the alternative.

    Args:
        candidates, against: `equations`, `reference`, or what `attnspec check` takes.
        sizes: names out of `SIZES`, or sizes by part ("queries") or by the mechanism's own names ("N").
        options, inputs: of every case; optional inputs beyond the usual ones.
        level: of the judgement before.
        peak: what `peaks` found before; measured now without it.
        note: is told what goes on.

    Raises:
        CandidateError: an unknown contender. CaseError: no such size, or one that the mechanism's constraints forbid.
        SpecError: no such mechanism.
    """
    from attnspec.conformance.environment import fingerprint

    suite = Suite(mechanism)
    names = list(dict.fromkeys([against, *candidates]))
    contenders = [contender(name, suite, device, level) for name in names]
    result = Result(against, device, level, peak or peaks(device, dtypes), fingerprint("torch", device))
    for size in sizes:
        for direction in directions:
            for dtype in dtypes:
                timed = _case(suite, size, dtype, direction, options or {}, inputs)
                result.rows += _measure(suite, contenders, timed, size, device, repeats, result.peaks, note)
    return result


def _case(
    suite: Suite, size: str | Mapping[str, int], dtype: str, direction: Direction, options: Mapping[str, Any],
    inputs: Sequence[str], changed: Mapping[str, int] | None = None,
) -> Case:  # fmt: skip
    """The case of a size; where the constraints forbid a named size (not stated numbers), the nearest they allow."""
    if isinstance(size, str) and size not in SIZES:
        raise CaseError(f"size {size!r} is unknown; known: {', '.join(SIZES)}, or NAME=NUMBER,...")
    wanted = SIZES[size] if isinstance(size, str) else {**SIZES["tiny"], **size}
    problem: CaseError | None = None
    full = {**wanted, **(changed or {})}
    for sizes in shapes.alternatives(full) if isinstance(size, str) or changed else (full,):
        try:
            return make(
                suite.mechanism, "bench", sizes=sizes, options=options, inputs=inputs, dtype=dtype,
                direction=direction,
            )  # fmt: skip
        except CaseError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _judged(suite: Suite, case: Case) -> dict[str, int]:
    """What of a case is judged: one entry of the batch and one group of heads; gradients at a bounded length."""
    parts = shapes.roles(suite.mechanism).names
    held = {part: case.sizes[name] for part, name in parts.items() if name in case.sizes}
    changed = {"batch": min(1, held.get("batch", 1))}
    if held.get("kv_heads") and held.get("heads"):
        changed |= {"heads": max(1, held["heads"] // held["kv_heads"]), "kv_heads": 1}
    if case.direction == "backward":
        changed |= {part: min(held[part], JUDGED_TOKENS) for part in ("queries", "keys") if part in held}
    return changed


def _measure(
    suite: Suite, contenders: Sequence[Contender], case: Case, size: str | Mapping[str, int], device: str,
    repeats: int, peak: Mapping[str, float], note: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    small = _case(suite, size, case.dtype, case.direction, case.options, case.inputs, _judged(suite, case))
    data = suite.build(case)
    label = size if isinstance(size, str) else ",".join(f"{name}={value}" for name, value in size.items())
    rows: dict[str, Row] = {}
    jobs: dict[str, Callable[[], Any]] = {}
    for one in contenders:
        row = rows[one.name] = Row(
            one.name, one.version, suite.name, label, dict(case.sizes), dict(case.options), case.dtype,
            case.dtype if one.precision == "as given" else one.precision, case.direction, dict(small.sizes),
        )  # fmt: skip
        note(f"{case.id}: {one.name}")
        try:
            wrong = one.judge(small)
        except Unsupported as error:
            row.why = _not_timed(error)
            continue
        row.conforms = wrong is None
        if wrong is not None:
            row.why = f"not timed: {wrong}"
            continue
        try:
            job = one.job(case, data)
            before = _interpreted()
            job()
        except (Unsupported, NotImplementedError, RuntimeError, ValueError, MemoryError) as error:
            row.why = _not_timed(error)
            continue
        if _interpreted() > before:
            row.why = "not timed: it ran in Triton's interpreter, whose time says nothing about the kernel"
            continue
        jobs[one.name] = job
    work, traffic = _cost(suite, case)
    for name, (seconds, memory) in interleaved(jobs, repeats, device).items():
        row = rows[name]
        row.seconds, row.samples, row.peak_memory = statistics.median(seconds), len(seconds), memory
        row.spread = (max(seconds) - min(seconds)) / row.seconds
        row.flops_per_second, row.bytes_per_second = work / row.seconds, traffic / row.seconds
        row.roofline_share = max(work / peak[row.computes_in], traffic / peak["bytes"]) / row.seconds
    base = rows[contenders[0].name].seconds
    for row in rows.values():
        row.speedup = base / row.seconds if base is not None and row.seconds is not None else None
    return list(rows.values())


def _not_timed(error: Exception) -> str:
    return f"not timed: {' '.join(str(error).split())[:200]}"


def _interpreted() -> int:
    runtime = sys.modules.get("attnspec.impls.engines.runtime")
    return 0 if runtime is None else int(runtime.interpreted_launches)


def _cost(suite: Suite, case: Case) -> tuple[float, float]:
    """Operations (two per multiply-add) and compulsory bytes of the equations as written, from their cost model."""
    present = [*case.inputs]
    model = cost(suite.mechanism.program, case.options, present=present, itemsize=ITEM_BYTES[case.dtype])
    sizes = shapes.derived(suite.mechanism, case.sizes)
    values = {symbol: sizes[str(symbol)] for symbol in model.compulsory_bytes.free_symbols}
    factor = BACKWARD_WORK if case.direction == "backward" else 1
    return (
        2.0 * factor * model.total.at(sizes)["multiply_adds"], factor * float(model.compulsory_bytes.subs(values))
    )  # fmt: skip


def interleaved(
    jobs: Mapping[str, Callable[[], Any]], repeats: int, device: str
) -> dict[str, tuple[list[float], int | None]]:
    """Seconds of every job per call, the jobs taking turns, and on a GPU the memory that a call takes at most.

    Short jobs are called several times per sample.
    """
    import torch

    cuda = device == "cuda"

    def sample(job: Callable[[], Any], times: int) -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            job()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    calls = {}
    memory: dict[str, int | None] = {}
    for name, job in jobs.items():
        sample(job, 1)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        once = sample(job, 1)
        memory[name] = torch.cuda.max_memory_allocated() - held if cuda else None
        calls[name] = max(1, min(1000, int(SAMPLE_SECONDS / max(once, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, job in jobs.items():
                samples[name].append(sample(job, calls[name]))
    finally:
        if enabled:
            gc.enable()
    return {name: (taken, memory[name]) for name, taken in samples.items()}


def peaks(device: str, dtypes: Sequence[str]) -> dict[str, float]:
    """The machine's peaks as this run finds them: operations per second of a large matrix product by dtype (and in
    float64), and bytes per second of a large copy (reads and writes counted).
    """
    import torch

    kinds = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    size = 8192 if device == "cuda" else 768
    found = {}
    for dtype in dict.fromkeys([*dtypes, "fp64"]):
        a = torch.ones((size, size), dtype=kinds[dtype], device=device)
        ((seconds, _),) = interleaved({"product": lambda a=a: a @ a}, 5, device).values()  # type: ignore[misc]
        found[dtype] = 2.0 * size**3 / min(seconds)
    block = torch.zeros((256 if device == "cuda" else 16) * 2**20, dtype=torch.float32, device=device)
    other = torch.empty_like(block)
    ((seconds, _),) = interleaved({"copy": lambda: other.copy_(block)}, 5, device).values()
    found["bytes"] = 2.0 * block.numel() * block.element_size() / min(seconds)
    return found


__all__ = ["DEFAULT_SIZES", "SIZES", "Result", "Row", "bench", "interleaved", "peaks"]
