"""Compile every kernel variant ahead of time, without a GPU, and record what the binaries use.

    python -m attnspec.impls.aot [--mechanism NAME,...] [--targets cuda:80,cuda:90,cuda:100,hip:gfx942]
                                 [--json FILE] [--markdown FILE] [--jobs 2] [--only TEXT,...] [--record | --check]

For each variant and target: registers, shared memory, spills and the instructions that show whether the tensor cores
and the asynchronous copies are used, read from the compiled binary (CUDA: cuobjdump on the cubin; AMD: the assembly's
metadata). A spill to memory or more shared memory than the target has is a failure: exit code 1. Exit code 2: could
not compile at all (no Triton, unknown target). `--record` and `--check` are explained in
`attnspec.impls.aot_record`.

Needs Triton's own tools only. Must not run under TRITON_INTERPRET, where there is nothing to compile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnspec.impls.aot_calls import Call
    from attnspec.impls.aot_variants import Variant
    from attnspec.impls.engines.launch import Launch

SOFTMAX = "softmax_attention"
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
# What one thread block may have. CUDA C++ programming guide, technical specifications per compute capability: 163 KiB
# for 8.0, 227 KiB for 9.0 and 10.0. AMD Instinct MI300 (CDNA3) ISA: 64 KiB of LDS.
SHARED_LIMIT = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "cuda:100": 227 * 1024, "hip:gfx942": 64 * 1024}
CUDA_MIX = ("HGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "FFMA", "LDGSTS", "UTMALDG", "LDG", "STL", "LDL", "MUFU.EX2")
AMD_MIX = ("v_mfma", "v_fma_f32", "buffer_load", "global_load", "scratch_store", "scratch_load", "v_exp_f32")


@dataclass(kw_only=True)
class Usage:
    """What one compiled kernel uses. `registers` are 32-bit vector registers per thread; memory is in bytes.

    `spills` (instructions) go to memory and fail; `scalar_spills` (AMD) are scalar registers parked in lanes of vector
    registers.
    """

    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    scalar_spills: int = 0
    mix: dict[str, int] = field(default_factory=dict)
    problem: str = ""


@dataclass
class Record(Usage):
    """One compiled variant of softmax attention, or one launch of another mechanism's call."""

    variant: str
    target: str
    ok: bool


def parse_target(text: str) -> tuple[str, int | str]:
    """("cuda", 90) from cuda:90."""
    if text not in TARGETS:
        raise ValueError(f"unknown target {text!r}; known: {', '.join(TARGETS)}")
    from attnspec.impls.engines.runtime import parsed

    return parsed(text)


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """(types, constants, alignments) of a launch's arguments, by the rules of Triton's just-in-time compiler.

    Absent tensors and integers equal to 1 are constants; pointers and multiples of 16 are marked divisible by 16.
    """
    import torch

    names = {
        torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
        torch.int32: "i32", torch.int64: "i64", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
    }  # fmt: skip
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    alignments: dict[Any, Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + names[value.dtype]
            alignments[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        elif parameter.do_not_specialize:
            types[name] = "i32"
        elif value == 1:
            types[name], constants[name] = "constexpr", 1
        else:
            types[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                alignments[(index,)] = [["tt.divisibility", 16]]
    return types, constants, alignments


def compile_launch(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel of a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch = parse_target(target)
    types, constants, alignments = signature(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=alignments)
    warp = 32 if backend == "cuda" else 64
    return triton.compile(source, target=GPUTarget(backend, arch, warp), options=launch.options())


def _count(text: str, words: Iterable[str]) -> dict[str, int]:
    found = {word: len(re.findall(rf"(?<![\w.]){re.escape(word)}", text)) for word in words}
    return {word: n for word, n in found.items() if n}


def cuda_resources(kernel: Any) -> dict[str, Any]:
    """Registers, stack and instruction counts out of the cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)", code)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage gave no usage line: {code[:200]!r}")
    mix = _count(code, CUDA_MIX)
    return {
        "registers": int(found[1]), "stack": int(found[2]) + int(found[4]), "mix": mix,
        "spills": mix.get("STL", 0) + mix.get("LDL", 0), "scalar_spills": 0,
    }  # fmt: skip


def amd_resources(kernel: Any) -> dict[str, Any]:
    """Registers, scratch and instruction counts out of the assembly and its metadata."""
    code = kernel.asm["amdgcn"]

    def field_of(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", code)
        if found is None:
            raise RuntimeError(f"the assembly's metadata has no .{name}")
        return int(found[1])

    return {
        "registers": field_of("vgpr_count"), "stack": field_of("private_segment_fixed_size"),
        "mix": _count(code, AMD_MIX),
        "spills": field_of("vgpr_spill_count"), "scalar_spills": field_of("sgpr_spill_count"),
    }  # fmt: skip


def judge(variant: Variant, target: str) -> Record:
    """Compile one variant of softmax attention for one target, and compare what it uses with what the target has."""
    from attnspec.impls.aot_variants import launch_of

    return _judge(variant.name, target, lambda: launch_of(variant, parse_target(target)))


def judge_call(call: Call, target: str) -> list[Record]:
    """The same for every kernel that a typical call launches."""
    from attnspec.impls.aot_calls import launches

    try:
        found = launches(call, parse_target(target))
    except Exception as error:  # one call's failure must not end the run: it is recorded
        return [Record(call.name, target, False, problem=one_line(error))]
    return [judge_launch(name, target, launch) for name, launch in found]


def judge_launch(name: str, target: str, launch: Launch) -> Record:
    """The same for one launch."""
    return _judge(name, target, lambda: launch)


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _judge(name: str, target: str, launch: Callable[[], Launch]) -> Record:
    record = Record(name, target, False)
    try:
        kernel = compile_launch(launch(), target)
        used = cuda_resources(kernel) if target.startswith("cuda") else amd_resources(kernel)
    except Exception as error:  # one variant's failure must not end the run: it is recorded
        record.problem = one_line(error)
        return record
    record.shared = int(kernel.metadata.shared)
    for name, value in used.items():
        setattr(record, name, value)
    problems = []
    if record.spills or (record.stack and target.startswith("hip")):
        problems.append(f"{record.spills} spills, {record.stack} bytes of stack")
    if record.shared > SHARED_LIMIT[target]:
        problems.append(f"{record.shared} bytes of shared memory, {target} has {SHARED_LIMIT[target]}")
    record.problem = "; ".join(problems)
    record.ok = not problems
    return record


def _job(work: tuple[Variant | Call, str]) -> list[Record]:
    from attnspec.impls.aot_calls import Call

    item, target = work
    return judge_call(item, target) if isinstance(item, Call) else [judge(item, target)]


def listed(names: Iterable[str], target: str) -> Iterator[Variant | Call]:
    """What is compiled for the mechanisms `names` (none: for all).

    Raises:
        ValueError: a mechanism without kernels, or whose module lists no calls.
    """
    from attnspec.impls.aot_calls import calls
    from attnspec.impls.aot_variants import variants

    wanted = set(names)
    known = {SOFTMAX} | {call.mechanism for call in calls()}
    if wanted - known:
        raise ValueError(f"no kernels of {min(wanted - known)!r}; known: {', '.join(sorted(known))}")
    if not wanted or SOFTMAX in wanted:
        yield from dict.fromkeys(variants(parse_target(target)))
    yield from (call for call in calls() if not wanted or call.mechanism in wanted)


def versions() -> dict[str, str]:
    import torch
    import triton

    return {"triton": triton.__version__, "torch": torch.__version__.split("+")[0], "python": sys.version.split()[0]}


def markdown(records: list[Record], about: dict[str, str]) -> str:
    """The table for docs/aot.md, grouped by kernel."""
    bad = [r for r in records if not r.ok]
    lines = [
        "# Kernels compiled ahead of time",
        "",
        "Written by `python -m attnspec.impls.aot --json perf/results/aot_softmax.json --markdown docs/aot.md`;",
        "do not edit. No GPU is needed and none was used: these are facts about the binaries, not timings.",
        "A spill to memory, or more shared memory than the target has, fails.",
        "",
        f"Triton {about['triton']}, torch {about['torch']}. {len(records)} binaries of "
        f"{len({r.variant for r in records})} variants, {len(bad)} failed.",
        "",
        "| target | binaries | most registers | most shared memory | most stack | spills | scalar spills "
        "| tensor cores | async copies |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    tensor_core = ("HGMMA", "UTCHMMA", "HMMA", "v_mfma")
    for target in sorted({r.target for r in records}, key=TARGETS.index):
        rows = [r for r in records if r.target == target]
        shared = f"{max(r.shared for r in rows)} of {SHARED_LIMIT[target]}"
        cores = sum(any(m in r.mix for m in tensor_core) for r in rows)
        copies = sum("LDGSTS" in r.mix or "UTMALDG" in r.mix for r in rows)
        registers, spills = max(r.registers for r in rows), sum(r.spills for r in rows)
        stack = max(r.stack for r in rows)
        scalar = f"{sum(r.scalar_spills for r in rows)} in {sum(r.scalar_spills > 0 for r in rows)} binaries"
        lines.append(
            f"| {target} | {len(rows)} | {registers} | {shared} | {stack} | {spills} | {scalar} | {cores} | {copies} |"
        )
    lines += [
        "",
        "Tensor cores, async copies: binaries with such instructions. Scalar spills (AMD): scalar registers parked in",
        "lanes of vector registers, which are counted among the registers; they cost instructions but no memory.",
        "",
        "float32 products are IEEE (no TF32) and use no tensor cores on CUDA. Names: kernel, options, dtype, head",
        "sizes D x E, tile (queries x keys, w warps, s stages). Options and sizes of a name: `impls/aot_variants.py`.",
    ]
    for target in sorted({r.target for r in records}, key=TARGETS.index):
        lines += [
            "",
            f"## {target}",
            "",
            "| variant | registers | shared | spills | instructions | |",
            "|---|---|---|---|---|---|",
        ]
        for r in (r for r in records if r.target == target):
            mix = ", ".join(f"{name} {n}" for name, n in r.mix.items())
            spilled = f"{r.spills} ({r.scalar_spills} scalar)" if r.scalar_spills else str(r.spills)
            lines.append(f"| {r.variant} | {r.registers} | {r.shared} | {spilled} | {mix} | {r.problem or 'ok'} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m attnspec.impls.aot", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--mechanism", default="", help="comma separated (default: all that have kernels)")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma separated (default: all)")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--only", default="", help="only variants (or calls) with one of these texts in their name")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--record", action="store_true", help="keep records of the mechanisms beside softmax attention")
    what.add_argument("--check", action="store_true", help="compile nothing: say what those records lack")
    given = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("aot: TRITON_INTERPRET is set: there is nothing to compile; unset it", file=sys.stderr)
        return 2
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        from attnspec.impls.aot_calls import Call

        targets = [target.strip() for target in given.targets.split(",")]
        for target in targets:
            parse_target(target)
        names = [name.strip() for name in given.mechanism.split(",") if name.strip()]
        kept = given.record or given.check
        work = [
            (item, target)
            for target in targets
            for item in listed(names, target)
            if any(text in item.name for text in given.only.split(",")) and (isinstance(item, Call) or not kept)
        ]
        about = versions()
    except (ValueError, ImportError) as error:
        print(f"aot: {error}", file=sys.stderr)
        return 2
    if not work:
        print(f"aot: no variant's name contains {given.only!r}", file=sys.stderr)
        return 2
    if kept:
        from attnspec.impls import aot_record

        chosen = [(item, target) for item, target in work if isinstance(item, Call)]
        try:
            return aot_record.check(chosen) if given.check else aot_record.record(chosen, about["triton"], given.jobs)
        except ValueError as error:
            print(f"aot: {error}", file=sys.stderr)
            return 2
    records: list[Record] = []
    with ProcessPoolExecutor(max_workers=max(1, given.jobs)) as pool:
        for record in (record for found in pool.map(_job, work, chunksize=4) for record in found):
            records.append(record)
            if not record.ok:
                print(f"{record.target} {record.variant}: {record.problem}", file=sys.stderr, flush=True)
    bad = sum(not r.ok for r in records)
    if given.json:
        text = json.dumps({"about": about, "limits": SHARED_LIMIT, "records": [asdict(r) for r in records]}, indent=1)
        given.json.write_text(text + "\n")
    if given.markdown:
        given.markdown.write_text(markdown(records, about))
    print(f"{len(records)} binaries for {', '.join(targets)}: {len(records) - bad} fit, {bad} do not")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
