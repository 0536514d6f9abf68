"""The test run as a whole: how Triton is imported, parts of a run, and what each part costs.

Triton decides at its import whether it interprets, and other libraries import it too: so that is settled here, before
any test module is imported. `--shard 2/4` runs the second quarter of the tests, by a hash of their names; `--parts`
prints seconds and memory by mechanism and by file, `--parts-json FILE` writes them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest


def _accelerator() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


if not _accelerator():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attnspec tests")
    group.addoption("--shard", metavar="2/4", help="only this part of the tests")
    group.addoption("--parts", action="store_true", help="print what each part of the run costs")
    group.addoption("--parts-json", metavar="FILE", help="write what each part of the run costs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    text = config.getoption("--shard")
    if text:
        from attnspec.conformance.shards import ShardError, parse

        try:
            shard = parse(text)
        except ShardError as error:
            raise pytest.UsageError(str(error)) from None
        gone = [item for item in items if not shard.holds(item.nodeid)]
        items[:] = [item for item in items if shard.holds(item.nodeid)]
        config.hook.pytest_deselected(items=gone)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # Kibibytes on Linux, bytes on macOS: the largest so far of the process that ran the test.
    scale = 1024 if os.uname().sysname == "Linux" else 1
    report.user_properties.append(("memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale))
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    target = config.getoption("--parts-json")
    if not target and not config.getoption("--parts"):
        return
    parts = _parts(terminalreporter.stats)
    if target:
        Path(target).write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    if config.getoption("--parts"):
        for title, entries in parts.items():
            terminalreporter.section(f"seconds, tests and memory by {title}")
            for name, cost in sorted(entries.items(), key=lambda entry: -entry[1]["seconds"]):
                mebibytes = cost["memory"] >> 20
                terminalreporter.line(f"{cost['seconds']:9.1f} s {cost['tests']:6d} {mebibytes:6d} MiB  {name}")


def _parts(stats: dict[str, list[Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Cost by mechanism (the name in a test's parameters) and by file; memory is the process's peak up to then."""
    from attnspec.spec import mechanisms

    # The longest name first: one may be part of another.
    known = sorted(mechanisms(), key=len, reverse=True)
    found: dict[str, dict[str, dict[str, Any]]] = {"mechanism": {}, "file": {}}
    for report in (entry for entries in stats.values() for entry in entries if isinstance(entry, pytest.TestReport)):
        name = next((name for name in known if name in report.nodeid), "(none)")
        for part, label in (("mechanism", name), ("file", report.nodeid.partition("::")[0])):
            cost = found[part].setdefault(label, {"seconds": 0.0, "tests": 0, "memory": 0})
            cost["seconds"] += report.duration
            cost["tests"] += report.when == "call"
            cost["memory"] = max([cost["memory"], *(size for key, size in report.user_properties if key == "memory")])
    return found
