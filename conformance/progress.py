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
    """Show how far a run is and how many cases failed; yields None where nothing is to be shown."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    with _display(label) as update:
        failed = 0

        def step(done: int, total: int, result: CaseResult) -> None:
            nonlocal failed
            failed += result.status in FAILING
            update(done, total, f"[red]{failed} failed" if failed else "")

        yield step


@contextmanager
def steps(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show how many of a number of steps are done; yields None where nothing is to be shown."""
    if not sys.stderr.isatty():
        yield None
        return
    with _display(label) as update:
        yield lambda done, total: update(done, total, "")


@contextmanager
def status(label: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done, a text at a time; where nothing is to be shown the texts are dropped."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status(label) as shown:
        yield lambda text: shown.update(f"{label} {text}")


@contextmanager
def _display(label: str) -> Iterator[Callable[[int, int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[aside]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None, aside="")
        yield lambda done, total, aside: progress.update(task, completed=done, total=total, aside=aside)
