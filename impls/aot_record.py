"""What is kept of kernels compiled ahead of time, beside softmax attention: perf/results/aot.MECHANISM.json.

    python -m attnspec.impls.aot --record [--mechanism NAME,...] [--targets ...] [--only TEXT,...] [--jobs 2]
    python -m attnspec.impls.aot --check [--mechanism NAME,...]

A file holds a line per binary with a digest of its inputs: the sources of the kernel and of the jitted functions that
it uses (without comments), the types and constants of its arguments, the compile options and the target. A binary
whose record fits and is of the same inputs is not compiled again, so that runs may be interrupted, divided and
repeated after a change; what a run has compiled is written after each call. docs/aot_mechanisms.md is written from all
files. `--check` compiles nothing: it names what has no record of its inputs as they are now, or does not fit.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import sys
import textwrap
import tokenize
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

from attnspec.conformance.report.files import write
from attnspec.impls.aot import SHARED_LIMIT, TARGETS, Usage, judge_launch, one_line, parse_target, signature
from attnspec.impls.aot_calls import Call, calls, launches
from attnspec.impls.engines.launch import Launch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "perf" / "results"
PAGE = ROOT / "docs" / "aot_mechanisms.md"
TENSOR_CORES = ("HGMMA", "UTCHMMA", "HMMA", "v_mfma")
COPIES = ("LDGSTS", "UTMALDG")
KNOWN_FILE = RESULTS / "aot_known.toml"
USED = frozenset(entry.name for entry in fields(Usage))


def known() -> dict[str, tuple[int, str]]:
    """Binaries that do not fit, by "target variant": at most so many spills, and why they stay."""
    entries = tomllib.loads(KNOWN_FILE.read_text(encoding="utf-8"))["spill"]
    return {f"{t} {entry['variant']}": (entry["most"], entry["reason"]) for entry in entries for t in entry["targets"]}


@dataclass
class Binary(Usage):
    """One kernel of a call, compiled for a target; `variant` is the name that `aot_calls.launches` gives it."""

    call: str
    target: str
    variant: str
    inputs: str


@dataclass
class Kept:
    """The records of one mechanism, all compiled by one version of Triton."""

    mechanism: str
    triton: str
    binaries: list[Binary]

    def of(self, call: Call, target: str) -> list[Binary]:
        return [b for b in self.binaries if (b.call, b.target) == (call.name, target)]


def path_of(mechanism: str) -> Path:
    return RESULTS / f"aot.{mechanism}.json"


def read(mechanism: str) -> Kept | None:
    """The kept records, or None where there is no file."""
    if not path_of(mechanism).exists():
        return None
    found = json.loads(path_of(mechanism).read_text(encoding="utf-8"))
    return Kept(found["mechanism"], found["triton"], [Binary(**line) for line in found["binaries"]])


def keep(kept: Kept) -> None:
    """Write the file, a line per binary, in the order of calls and targets; calls that are listed no more go."""
    order = {call.name: n for n, call in enumerate(calls()) if call.mechanism == kept.mechanism}
    kept.binaries = [b for b in kept.binaries if b.call in order]
    kept.binaries.sort(key=lambda b: (TARGETS.index(b.target), order[b.call]))
    plain = Binary("", "", "", "")
    lines = []
    for binary in kept.binaries:
        # What it is first, then what it uses; zeros and empty texts are left out.
        entries = sorted(asdict(binary).items(), key=lambda entry: entry[0] in USED)
        line = {n: x for n, x in entries if x != getattr(plain, n)}
        lines.append(json.dumps(line))
    head = f'{{"mechanism": {json.dumps(kept.mechanism)}, "triton": {json.dumps(kept.triton)}, "binaries": [\n'
    write(path_of(kept.mechanism), head + ",\n".join(lines) + "\n]}\n")


@cache
def _words(function: Any) -> tuple[str, frozenset[str]]:
    """A function's source without comments, documentation and blank lines, and the names in it."""
    text = textwrap.dedent(inspect.getsource(function))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in skipped]
    shape = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    words: list[str] = []
    begins = True
    for token in tokens:
        if begins and token.type == tokenize.STRING:  # documentation; the end of its line goes with it
            continue
        if not (begins and token.type == tokenize.NEWLINE):
            words.append(tokenize.tok_name[token.type] if token.type in shape else token.string)
        begins = token.type in shape
    return " ".join(words), frozenset(t.string for t in tokens if t.type == tokenize.NAME)


def sources(kernel: Any) -> dict[str, str]:
    """By name: the source of a kernel and of the jitted functions that it uses, and the constants that they read."""
    from triton.language import constexpr

    found: dict[str, str] = {}
    left = [kernel.fn]
    while left:
        function = left.pop()
        name = f"{function.__module__}.{function.__qualname__}"
        if name in found:
            continue
        found[name], names = _words(function)
        for word in sorted(names & function.__globals__.keys()):
            value = function.__globals__[word]
            if isinstance(value, constexpr):
                found[f"{name}.{word}"] = repr(value.value)
            elif callable(getattr(value, "fn", None)):
                left.append(value.fn)
    return found


def digest(launch: Launch, target: str) -> str:
    """Of all that a binary is made from, but for the compiler."""
    inputs = target, sorted(sources(launch.kernel).items()), signature(launch), sorted(launch.options().items())
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]


def compiled(call: Call, target: str, known: dict[str, Binary]) -> list[Binary]:
    """The binaries of a call, those with `known` records (by inputs) not compiled again."""
    try:
        found = launches(call, parse_target(target))
    except Exception as error:  # one call's failure must not end the run: it is recorded
        return [Binary(call.name, target, call.name, "", problem=one_line(error))]
    out = []
    for variant, launch in found:
        inputs = digest(launch, target)
        if inputs in known:
            out.append(Binary(**asdict(known[inputs]) | {"call": call.name, "variant": variant}))
            continue
        record = judge_launch(variant, target, launch)
        used = {n: x for n, x in asdict(record).items() if n not in ("variant", "target", "ok")}
        out.append(Binary(call.name, target, variant, inputs, **used))
    return out


def _only_spills(binary: Binary, most: int) -> bool:
    """Whether all that is wrong with a binary are at most so many spills."""
    return 0 < binary.spills <= most and "; " not in binary.problem and binary.problem.startswith(f"{binary.spills} ")


def lacking(call: Call, target: str, kept: Kept | None) -> list[str]:
    """What keeps the records of a call from being complete and fitting, a line each."""
    now = [(variant, digest(launch, target)) for variant, launch in launches(call, parse_target(target))]
    there = {b.variant: b for b in kept.of(call, target)} if kept else {}
    out = [f"{target} {name}: recorded, but launched no more" for name in there.keys() - {name for name, _ in now}]
    excused = known()
    for variant, inputs in now:
        most, _ = excused.get(f"{target} {variant}", (None, ""))
        if variant not in there:
            out.append(f"{target} {variant}: not recorded")
        elif there[variant].inputs != inputs:
            out.append(f"{target} {variant}: changed since it was recorded")
        elif there[variant].problem and (most is None or not _only_spills(there[variant], most)):
            out.append(f"{target} {variant}: {there[variant].problem}")
        elif not there[variant].problem and most is not None:
            out.append(f"{target} {variant}: fits; it is no known exception any more")
    return out


def page(found: Iterable[Kept]) -> str:
    """docs/aot_mechanisms.md, of all records."""
    every = sorted(found, key=lambda kept: kept.mechanism)
    binaries = [b for kept in every for b in kept.binaries]
    bad = [b for b in binaries if b.problem]
    lines = [
        "# Kernels of the other mechanisms compiled ahead of time",
        "",
        "Written by `python -m attnspec.impls.aot --record`; do not edit. Softmax attention has [a page of its own]"
        "(aot.md).",
        "No GPU is needed and none was used: these are facts about the binaries, not timings. A spill to memory, or",
        "more shared memory than the target has, does not fit. One line per binary: `perf/results/aot.MECHANISM.json`.",
        "",
        f"Triton {', '.join(sorted({kept.triton for kept in every}))}. {len(binaries)} binaries of "
        f"{len({b.call for b in binaries})} typical calls of {len(every)} mechanisms, {len(bad)} do not fit.",
        "Shared memory that a block may have: "
        + ", ".join(f"{target} {size}" for target, size in SHARED_LIMIT.items())
        + ".",
        "",
        "Tensor cores, async copies: binaries with such instructions; kernels without products of tiles have none, nor",
        "do float32 products on CUDA, which are IEEE (no TF32). Scalar spills (AMD): scalar registers parked in lanes",
        "of vector registers, which are counted among the registers; they cost instructions but no memory.",
        "",
        "| mechanism | target | binaries | most registers | most shared memory | spills | scalar spills | tensor cores "
        "| async copies | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kept in every:
        for target in TARGETS:
            rows = [b for b in kept.binaries if b.target == target]
            if not rows:
                lines.append(f"| {kept.mechanism} | {target} | 0 | | | | | | | not compiled |")
                continue
            cores, copies = (sum(any(w in b.mix for w in words) for b in rows) for words in (TENSOR_CORES, COPIES))
            failed = sum(bool(b.problem) for b in rows)
            lines.append(
                f"| {kept.mechanism} | {target} | {len(rows)} | {max(b.registers for b in rows)} "
                f"| {max(b.shared for b in rows)} | {sum(b.spills for b in rows)} "
                f"| {sum(b.scalar_spills for b in rows)} | {cores} | {copies} "
                f"| {f'{failed} do not fit' if failed else 'ok'} |"
            )
    if bad:
        lines += ["", "## What does not fit", ""]
        excused = known()
        for binary in bad:
            why = excused.get(f"{binary.target} {binary.variant}", (0, "not known before"))[1]
            lines.append(f"- {binary.target} {binary.variant}: {binary.problem} ({why})")
    return "\n".join(lines) + "\n"


def recorded() -> list[Kept]:
    """All kept records of mechanisms that list calls."""
    found = (read(mechanism) for mechanism in sorted({call.mechanism for call in calls()}))
    return [kept for kept in found if kept is not None]


def check(work: Iterable[tuple[Call, str]]) -> int:
    """Print what the records of these calls lack; the exit code, 1 if anything."""
    kept: dict[str, Kept | None] = {}
    missing, count = 0, 0
    for call, target in work:
        if call.mechanism not in kept:
            kept[call.mechanism] = read(call.mechanism)
        for line in lacking(call, target, kept[call.mechanism]):
            print(line)
            missing += 1
        count += 1
    print(f"{count} calls on a target each: {missing} binaries not recorded as they are now, or not fitting")
    return 1 if missing else 0


def record(work: Sequence[tuple[Call, str]], triton: str, jobs: int) -> int:
    """Compile what has no fitting record of its inputs, and write after each call; the exit code.

    Raises:
        ValueError: the records of a mechanism are of another Triton.
    """
    kept: dict[str, Kept] = {}
    for mechanism in dict.fromkeys(call.mechanism for call, _ in work):
        kept[mechanism] = read(mechanism) or Kept(mechanism, triton, [])
        if kept[mechanism].triton != triton:
            name = path_of(mechanism).name
            raise ValueError(f"{name} is of Triton {kept[mechanism].triton}, this is {triton}: delete it to start anew")
    known = {b.inputs: b for part in kept.values() for b in part.binaries if b.inputs and not b.problem}
    count, bad = 0, 0
    job = partial(_job, known)
    with ProcessPoolExecutor(max_workers=jobs) if jobs > 1 else nullcontext() as pool:
        for (call, target), found in zip(work, pool.map(job, work) if pool else map(job, work)):
            part = kept[call.mechanism]
            part.binaries = [b for b in part.binaries if (b.call, b.target) != (call.name, target)] + found
            keep(part)
            write(PAGE, page(recorded()))
            count += len(found)
            for binary in found:
                if binary.problem:
                    bad += 1
                    print(f"{target} {binary.variant}: {binary.problem}", file=sys.stderr, flush=True)
    print(f"{count} binaries recorded: {count - bad} fit, {bad} do not")
    return 1 if bad else 0


def _job(known: dict[str, Binary], work: tuple[Call, str]) -> list[Binary]:
    return compiled(*work, known)
