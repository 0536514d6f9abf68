"""Every Triton kernel of ours through the suite, and a table of what was judged: in Triton's interpreter without a GPU.

    python -m attnspec.perf.judged [--mechanism gla,mla] [--level standard] [--dtype fp32,bf16] [--device cpu]
                                   [--reports DIR] [--out FILE.json]

Each kernel's report is kept in DIR as MECHANISM.json; a kernel whose report is there (of the same level, device and
dtypes) is not judged again, so that hours survive an interruption: delete what has changed. The table goes to FILE.md
too, and `attnspec coverage` reads FILE.json. Exit status 1: a kernel does not conform.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnspec.conformance.report.files import write

OUT = Path(__file__).parent / "results" / "judged.json"
VERSIONS = ("python", "numpy", "torch", "triton")


def main(argv: Sequence[str] | None = None) -> int:
    """Judge what is missing, write and print the table."""
    about = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m attnspec.perf.judged", description=about)
    parser.add_argument("--mechanism", default="", help="comma separated (default: all that have a kernel)")
    parser.add_argument("--level", default="standard", choices=["smoke", "standard", "exhaustive"])
    parser.add_argument("--dtype", default="fp32,bf16", help="comma separated")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--reports", type=Path, default=Path("judged"), help="folder of reports (default: judged)")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(argv)
    try:
        kernels = wanted([name for name in given.mechanism.split(",") if name])
        found = read(given.out)
    except ValueError as error:
        parser.error(str(error))
    given.reports.mkdir(parents=True, exist_ok=True)
    dtypes = given.dtype.split(",")
    for mechanism, kernel in kernels.items():
        report = given.reports / f"{mechanism}.json"
        summary = _kept(report, given.level, given.device, dtypes)
        if summary is None:
            _judge(kernel, mechanism, given.level, given.device, dtypes, report)
            summary = _kept(report, given.level, given.device, dtypes)
        if summary is None:
            print(f"{mechanism}: no report came of it", file=sys.stderr)
            return 2
        found[mechanism] = summary
        write(given.out, json.dumps(found, indent=1, sort_keys=True) + "\n")
        write(given.out.with_suffix(".md"), table(found) + "\n")
    print(table(found))
    return int(any(entry["failed"] for entry in found.values()))


def wanted(names: Sequence[str]) -> dict[str, str]:
    """The kernels `module:function` of these mechanisms, of all that have one where none is named.

    Raises:
        ValueError: a mechanism without a kernel.
    """
    from attnspec.impls import written
    from attnspec.spec import mechanisms

    modules = {name: next(written(name), None) for name in mechanisms()}
    known = {name: f"attnspec.impls.{found[0]}:{name}" for name, found in modules.items() if found}
    for name in names:
        if name not in known:
            raise ValueError(f"--mechanism: {name!r} has no kernel; known: {', '.join(known)}")
    return {name: known[name] for name in names or known}


def read(path: Path) -> dict[str, Any]:
    """The entries of a file by mechanism; none where there is no such file. Raises ValueError for any other file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(x, dict) and "judged" in x for x in found.values()):
        raise ValueError(f"{path}: not a file of this program: expected entries by mechanism")
    return found


def _judge(kernel: str, mechanism: str, level: str, device: str, dtypes: Sequence[str], report: Path) -> None:
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    command = [
        sys.executable, "-m", "attnspec", "check", kernel, "--mechanism", mechanism, "--level", level,
        "--device", device, "--dtype", ",".join(dtypes), "--timeout", "600", "--quiet", "--json", str(report),
    ]  # fmt: skip
    print(f"{mechanism}: {kernel} at {level} ...", file=sys.stderr, flush=True)
    subprocess.run(command, env=os.environ | interpreted, check=False)


def _kept(report: Path, level: str, device: str, dtypes: Iterable[str]) -> dict[str, Any] | None:
    """The summary of a whole report of this level, device and dtypes."""
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
        summary = summarised(found)
    except (OSError, ValueError, KeyError):
        return None
    same = summary["level"] == level and summary["device"].startswith(device) and not found["problems"]
    return summary if same and set(summary["dtypes"]) == set(dtypes) else None


def summarised(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the table needs of a report: cases by outcome, and the closest approach to a limit as a share of it."""
    results = report["results"]
    evidence = [entry for result in results for entry in result["evidence"] if entry["max_limit"]]
    outcomes = report["counts"]
    beside = ("refused", "not_supported", "skip")
    return {
        "kernel": report["candidate"], "level": report["level"], "device": report["environment"]["device"],
        "dtypes": sorted({result["case"]["dtype"] for result in results}),
        "directions": sorted({result["case"]["direction"] for result in results}),
        "judged": sum(n for outcome, n in outcomes.items() if outcome not in beside),
        "refused": outcomes.get("refused", 0),
        "failed": sorted(r["case"]["id"] for r in results if r["status"] not in ("pass", *beside)),
        "worst_rms_share": round(max((e["rms_z"] / e["rms_limit"] for e in evidence), default=0.0), 3),
        "worst_max_share": round(max((e["max_z"] / e["max_limit"] for e in evidence), default=0.0), 3),
        "seconds": round(report["seconds"]),
        "versions": {name: report["environment"].get(name, "") for name in VERSIONS},
    }  # fmt: skip


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: one line per mechanism."""
    lines = [
        "Written by `python -m attnspec.perf.judged`; do not edit. On the CPU kernels run in Triton's interpreter.",
        "",
        "| mechanism | kernel | level | dtypes | directions | judged | failed | refused "
        "| closest to a limit (RMS, largest) |",
        "|---|---|---|---|---|---:|---:|---:|---:|",
    ]
    for name, e in sorted(found.items()):
        dtypes, directions = ", ".join(e["dtypes"]), ", ".join(e["directions"])
        lines.append(
            f"| {name} | `{e['kernel']}` on {e['device']} | {e['level']} | {dtypes} | {directions} | {e['judged']} "
            f"| {len(e['failed'])} | {e['refused']} | {e['worst_rms_share']:.0%}, {e['worst_max_share']:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
