"""A progress line for long runs, on standard error and only where that is a terminal.

`bar()` gives a context manager whose value is called after each case; in a pipe or a log it does nothing, so that no
report is ever interleaved with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from attnspec.conformance.outcome import FAILING
from attnspec.conformance.types import CaseResult

Step = Callable[[int, int, CaseResult], None]


@contextmanager
def bar(label: str, *, quiet: bool = False) -> Iterator[Step | None]:
    """Show how far a run is; yields None where nothing is to be shown."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[failed]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None, failed="")
        failed = 0

        def step(done: int, total: int, result: CaseResult) -> None:
            nonlocal failed
            failed += result.status in FAILING
            progress.update(task, completed=done, total=total, failed=f"[red]{failed} failed" if failed else "")

        yield step
