"""Does the suite ever reject an honest kernel by chance? Every adapter, many seeds, and a table of what failed.

    python -m attnspec.perf.flakes [--seeds 20] [--adapters torch-sdpa,jax-dense] [--level standard] [--out FILE]

Each run is written as soon as it is done, and runs that the file already holds are not repeated, so that a sweep of
hours survives an interruption. A run that fails is a flake (or a kernel that is wrong); the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ADAPTERS = (
    "torch-sdpa", "torch-flex", "jax-dense", "jax-pallas", "jax-splash", "onnxruntime", "onnx-reference",
    "transformers-eager", "transformers-sdpa", "tinygrad",
)  # fmt: skip
OUT = Path(__file__).parent / "results" / "flakes.json"


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print the table; 1 where any run failed."""
    parser = argparse.ArgumentParser(prog="python -m attnspec.perf.flakes", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--adapters", default=",".join(ADAPTERS))
    parser.add_argument("--level", default="standard", choices=["smoke", "standard", "exhaustive"])
    parser.add_argument("--mechanism", default="softmax_attention")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    adapters = [name for name in arguments.adapters.split(",") if name]
    found = _read(arguments.out)
    for seed in range(arguments.seeds):
        for name in adapters:
            key = f"{arguments.mechanism}/{arguments.level}/{name}/{seed}"
            if key not in found:
                found[key] = judge(name, arguments.mechanism, arguments.level, seed)
                _write(arguments.out, found)
                print(f"{key}: {_line(found[key])}", file=sys.stderr, flush=True)
    print(table(found))
    return int(any(entry["failed"] for entry in found.values()))


def judge(adapter: str, mechanism: str, level: str, seed: int) -> dict[str, Any]:
    """One run: its exit code, how many cases were judged, and the ids of those that failed."""
    from attnspec.conformance.runner import run

    report = run(adapter, mechanism, level=level, seed=seed)  # type: ignore[arg-type]
    verdicts = [result for result in report.results if result.status not in ("refused", "not_supported", "skip")]
    failed = {result.case.id: result.message for result in verdicts if result.status != "pass"}
    worst = [entry for result in verdicts for entry in result.evidence if entry.max_limit]
    return {
        "exit_code": report.exit_code,
        "judged": len(verdicts),
        "failed": failed,
        "seconds": round(report.seconds, 1),
        "worst_rms_share": max((entry.rms_z / entry.rms_limit for entry in worst), default=0.0),
        "worst_max_share": max((entry.max_z / entry.max_limit for entry in worst), default=0.0),
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: runs, cases, failures and the closest approach to a limit, by adapter."""
    lines = [
        "| adapter | level | runs | cases judged | runs that failed | closest to a limit (RMS, largest) |",
        "|---|---|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for key, entry in found.items():
        _, level, name, _ = key.split("/")
        groups.setdefault((name, level), []).append(entry)
    for (name, level), entries in sorted(groups.items()):
        rms = max(entry["worst_rms_share"] for entry in entries)
        largest = max(entry["worst_max_share"] for entry in entries)
        judged = sum(entry["judged"] for entry in entries)
        wrong = sum(bool(entry["failed"]) or entry["exit_code"] != 0 for entry in entries)
        lines.append(f"| {name} | {level} | {len(entries)} | {judged} | {wrong} | {rms:.0%}, {largest:.0%} |")
    return "\n".join(lines)


def _line(entry: Mapping[str, Any]) -> str:
    failed = f"{len(entry['failed'])} FAILED: {sorted(entry['failed'])[0]}" if entry["failed"] else "no failure"
    return f"{entry['judged']} judged in {entry['seconds']} s, {failed}"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(path: Path, found: Mapping[str, Any]) -> None:
    from attnspec.conformance.report.files import write

    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
