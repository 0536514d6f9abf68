"""Does the suite ever reject an honest kernel by chance? Every adapter, many seeds, and a table of what failed.

    python -m attnspec.perf.flakes [--seeds 20] [--adapters torch-sdpa,jax-dense] [--level standard] [--out FILE.json]
    python -m attnspec.perf.flakes --merge FILE.json ... [--out FILE.json]

Each run is written as soon as it is done, and runs that the file already holds are not repeated, so that a sweep of
hours survives an interruption. The table goes to FILE.md too. A run that fails is a flake (or a kernel that is wrong);
the exit status is 1 then. `--merge` runs nothing: it adds the runs of other files to those of --out, and refuses two
different results for one run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
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
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="only add these files' runs to --out")
    arguments = parser.parse_args(argv)
    try:
        found = _read(arguments.out)
        if arguments.merge:
            found = merged([arguments.out, *arguments.merge])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if arguments.merge:
        _write(arguments.out, found)
    else:
        _sweep(found, arguments)
    lines = table(found)
    _write_text(arguments.out.with_suffix(".md"), lines + "\n")
    print(lines)
    return int(any(map(_failed, found.values())))


def _sweep(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Add every missing run to `found` and to the file."""
    adapters = [name for name in arguments.adapters.split(",") if name]
    for seed in range(arguments.seeds):
        for name in adapters:
            key = f"{arguments.mechanism}/{arguments.level}/{name}/{seed}"
            if key not in found:
                found[key] = judge(name, arguments.mechanism, arguments.level, seed)
                _write(arguments.out, found)
                print(f"{key}: {_line(found[key])}", file=sys.stderr, flush=True)


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """The runs of several files, in the order of adapter and seed; the first file may be missing.

    Raises:
        OSError: a file cannot be read.
        ValueError: two files hold different results for one run, or one holds no runs.
    """
    union: dict[str, Any] = {}
    for number, path in enumerate(files):
        if number and not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        for key, entry in _read(path).items():
            if union.setdefault(key, entry) != entry:
                raise ValueError(f"{path}: another result for {key} than a file before it")
    return dict(sorted(union.items(), key=lambda item: _order(item[0])))


def _order(key: str) -> tuple[str, str, str, int]:
    mechanism, level, name, seed = key.rsplit("/", 3)
    return mechanism, level, name, int(seed)


def judge(adapter: str, mechanism: str, level: str, seed: int) -> dict[str, Any]:
    """One run: its exit code, how many cases were judged, and the ids of those that failed."""
    from attnspec.conformance.outcome import INTERRUPTED
    from attnspec.conformance.runner import run

    report = run(adapter, mechanism, level=level, seed=seed)  # type: ignore[arg-type]
    if any(problem.startswith(INTERRUPTED) for problem in report.problems):
        raise KeyboardInterrupt  # half a run is none
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
        _, level, name, _ = _order(key)
        groups.setdefault((name, level), []).append(entry)
    for (name, level), entries in sorted(groups.items()):
        rms = max(entry["worst_rms_share"] for entry in entries)
        largest = max(entry["worst_max_share"] for entry in entries)
        judged = sum(entry["judged"] for entry in entries)
        wrong = sum(map(_failed, entries))
        lines.append(f"| {name} | {level} | {len(entries)} | {judged} | {wrong} | {rms:.0%}, {largest:.0%} |")
    return "\n".join(lines)


def _line(entry: Mapping[str, Any]) -> str:
    failed = f"{len(entry['failed'])} FAILED: {sorted(entry['failed'])[0]}" if entry["failed"] else "no failure"
    return f"{entry['judged']} judged in {entry['seconds']} s, {failed}"


def _failed(entry: Mapping[str, Any]) -> bool:
    return bool(entry["failed"]) or entry["exit_code"] != 0


def _read(path: Path) -> dict[str, Any]:
    """The runs of a file, none where there is no such file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict) or not all(
        key.count("/") >= 3 and isinstance(entry, dict) and "failed" in entry for key, entry in found.items()
    ):
        raise ValueError(f"{path}: not a file of this program: expected runs by mechanism/level/adapter/seed")
    return found


def _write(path: Path, found: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(found, indent=1) + "\n")


def _write_text(path: Path, text: str) -> None:
    from attnspec.conformance.report.files import write

    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, text)


if __name__ == "__main__":
    raise SystemExit(main())
