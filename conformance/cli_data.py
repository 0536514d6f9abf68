"""`attnspec mutants`, `attnspec coverage` and `attnspec vectors`: the commands around the judging."""

from __future__ import annotations

import argparse
import json

from attnspec.spec import load


def coverage(arguments: argparse.Namespace) -> int:
    """Print the coverage table, or its data as JSON."""
    from attnspec.conformance import coverage as account

    if arguments.json:
        print(json.dumps(account.document(planned=arguments.planned), indent=1))
    else:
        print(account.table(planned=arguments.planned))
    return 0


def vectors(arguments: argparse.Namespace) -> int:
    """Export golden vectors, or verify exported ones: 0 where they hold, 1 where not."""
    return _export(arguments) if arguments.action == "export" else _verify(arguments)


def _export(arguments: argparse.Namespace) -> int:
    from attnspec.conformance.vectors import export
    from attnspec.conformance.vectors_source import collect, tolerance

    mechanism = load(arguments.mechanism)
    found = collect(mechanism, arguments.level, arguments.dtype, arguments.seed)
    path = export(
        mechanism, found, arguments.out, level=arguments.level, seed=arguments.seed, tolerance=tolerance(mechanism)
    )
    manifest = json.loads(path.read_text(encoding="utf-8"))
    size = sum(file["bytes"] for file in manifest["files"]) / 1e6
    print(f"{len(manifest['cases'])} cases, {size:.1f} MB: {path}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from attnspec.conformance.vectors import read_manifest, verify

    problems = verify(arguments.out, load)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{len(read_manifest(arguments.out)['cases'])} cases agree with the equations")
    return 1 if problems else 0


def mutants(arguments: argparse.Namespace) -> int:
    """Run every known wrong variant: 0 where all are rejected or explained, 1 where not."""
    from attnspec.conformance import coverage, mutation
    from attnspec.conformance.progress import steps
    from attnspec.conformance.report.files import check_writable, write
    from attnspec.spec import mechanisms

    if arguments.json is not None:
        check_writable(arguments.json)
    names = [load(arguments.mechanism).name] if arguments.mechanism else mechanisms()
    reports = []
    for name in names:
        with steps(f"mutants of {name}") as step:
            reports.append(mutation.run(name, progress=step))
        print(mutation.table(reports[-1]))
    for report in reports if arguments.record else ():
        coverage.record(report.document())
    if arguments.json is not None:
        documents = [report.document() for report in reports]
        text = json.dumps(documents[0] if len(documents) == 1 else documents, indent=1)
        write(arguments.json, text + "\n")
    return 0 if all(report.ok for report in reports) else 1
