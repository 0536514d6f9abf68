"""`attnspec check` and `attnspec repro`: judge, print the report, write the files, exit with the verdict."""

from __future__ import annotations

import argparse
from pathlib import Path

from attnspec.conformance import api
from attnspec.conformance.progress import bar
from attnspec.conformance.report.files import check_writable
from attnspec.conformance.types import Report


def check(arguments: argparse.Namespace) -> int:
    """Judge a candidate; the value is the exit code."""
    for path in (arguments.json, arguments.junit, arguments.markdown):
        if path is not None:
            check_writable(path)
    mechanism = arguments.mechanism or api.stated_mechanism(arguments.candidate)
    directions = arguments.direction or api.DIRECTIONS
    if arguments.list_cases:
        report, cases = api.plan(
            arguments.candidate, mechanism, level=arguments.level, dtypes=arguments.dtype, device=arguments.device,
            directions=directions, seed=arguments.seed, select=arguments.select,
        )  # fmt: skip
        for case in cases:
            print(case.id)
        if not cases:
            raise api.CannotJudgeError(f"{report.candidate}: no case at level {report.level} matches")
        return 0
    with bar("judging", quiet=arguments.quiet) as step:
        report = api.check(
            arguments.candidate,
            mechanism,
            level=arguments.level,
            dtypes=arguments.dtype,
            device=arguments.device,
            directions=directions,
            seed=arguments.seed,
            select=arguments.select,
            shard=arguments.shard,
            expect=arguments.expect,
            timeout=arguments.timeout or api.TIMEOUT,
            explain=not arguments.no_explain,
            progress=step,
        )
    _write(report, arguments.candidate, json=arguments.json, junit=arguments.junit, markdown=arguments.markdown)
    return _show(report, arguments.candidate, quiet=arguments.quiet)


def merge(arguments: argparse.Namespace) -> int:
    """Join reports; the value is the exit code of the whole run."""
    from attnspec.conformance import shards
    from attnspec.conformance.report.json_report import read_json

    for path in (arguments.json, arguments.junit, arguments.markdown):
        if path is not None:
            check_writable(path)
    report = shards.merge([read_json(path) for path in arguments.reports])
    _write(report, report.candidate, json=arguments.json, junit=arguments.junit, markdown=arguments.markdown)
    return _show(report, report.candidate, quiet=arguments.quiet)


def repro(arguments: argparse.Namespace) -> int:
    """Run one case again; the value is the exit code."""
    if arguments.json is not None:
        check_writable(arguments.json)
    report = api.repro(
        arguments.case, arguments.candidate, device=arguments.device, timeout=arguments.timeout or api.TIMEOUT
    )
    _write(report, arguments.candidate, json=arguments.json)
    return _show(report, arguments.candidate)


def _show(report: Report, candidate: str, *, quiet: bool = False) -> int:
    from attnspec.conformance.report.terminal import show

    show(api.renamed(report, candidate), api.axes_of(report.mechanism), quiet=quiet)
    return report.exit_code


def _write(
    report: Report,
    candidate: str,
    *,
    json: str | Path | None = None,
    junit: str | Path | None = None,
    markdown: str | Path | None = None,
) -> None:
    named = api.renamed(report, candidate)
    if json is not None:
        from attnspec.conformance.report.json_report import write_json

        write_json(named, json)
    if junit is not None:
        from attnspec.conformance.report.junit import write_junit

        write_junit(named, junit)
    if markdown is not None:
        from attnspec.conformance.report.markdown import write_markdown

        write_markdown(named, markdown, api.axes_of(report.mechanism))
