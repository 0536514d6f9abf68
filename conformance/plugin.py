"""The pytest plugin: `pytest --attnspec my_kernels.py` gives each case as a test item.

    pytest --attnspec my_kernels.py                        every function there that @attnspec.candidate describes
    pytest --attnspec my_kernels.py:attention --attnspec-mechanism softmax_attention
    pytest tests --attnspec torch-sdpa --attnspec-mechanism softmax_attention      beside other tests

Without a path of its own pytest collects the cases only. A candidate that gives no case, and a run in which no case
came to a verdict, fail. Refused and skipped cases are skips with their reason, xfail entries xfails, and an xfail that
passes is a failure. Candidates run in a worker process (one per pytest process: pytest-xdist works).

This module is loaded by every pytest run on the machine, so it imports nothing of attnspec until its option is given.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from attnspec.conformance.types import Case, CaseResult, Report

PROPERTY = "attnspec_status"
EXPLAIN_SECONDS = 5.0
KEY = pytest.StashKey["Plugin"]()
# The outcomes that count as a verdict; the rest says that a case was not judged.
JUDGED = frozenset({"pass", "fail", "error", "crash", "timeout", "xfail", "xpass"})


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, all with the prefix --attnspec."""
    group = parser.getgroup("attnspec", "attention kernels against their equations")
    group.addoption(
        "--attnspec", action="append", default=[], metavar="CANDIDATE",
        help="judge a candidate: path/to/file.py, file.py:function, module:function, or an adapter's short name",
    )  # fmt: skip
    group.addoption("--attnspec-mechanism", metavar="M", help="what the candidates implement, unless @candidate says")
    group.addoption("--attnspec-level", default="standard", choices=("smoke", "standard", "exhaustive"))
    group.addoption("--attnspec-dtype", metavar="fp32,fp16,bf16", help="default: all that a candidate supports")
    group.addoption("--attnspec-device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--attnspec-direction", metavar="forward,backward")
    group.addoption("--attnspec-seed", type=int, default=0, metavar="S")
    group.addoption("--attnspec-select", action="append", default=[], metavar="GLOB", help="only matching case ids")
    group.addoption("--attnspec-expect", action="append", default=[], metavar="FILE", help="skip and xfail list (TOML)")
    group.addoption("--attnspec-timeout", type=float, default=60.0, metavar="SECONDS", help="for one case")


def pytest_configure(config: pytest.Config) -> None:
    """Take part only where a candidate is given."""
    if not config.getoption("--attnspec"):
        return
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        # No path was given: the run is about the candidates, not about whatever tests lie around.
        config.args = []
    plugin = Plugin(config)
    config.stash[KEY] = plugin
    config.pluginmanager.register(plugin, "attnspec-session")


class Plugin:
    """What lives as long as the pytest session: one worker per candidate, and the count of verdicts."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.targets: list[Target] = []
        self.seen: dict[str, int] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Add the items before `-k`, `-m` and others choose among them."""
        for name in self._candidates():
            target = Target.from_parent(session, name=name, nodeid=name, path=self.config.rootpath)
            self.targets.append(target)
            items += list(target.collect())

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the verdicts; with pytest-xdist the reports of all workers come through here."""
        for name, value in report.user_properties:
            if name == PROPERTY and report.when == "call":
                self.seen[str(value)] = self.seen.get(str(value), 0) + 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """End the workers, and do not let a run pass that judged nothing."""
        for target in self.targets:
            target.close()
        if hasattr(self.config, "workerinput") or session.config.getoption("collectonly"):
            return
        if not self._judged() and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The verdict beside pytest's own counts."""
        if self.config.getoption("collectonly"):
            return
        told = ", ".join(f"{number} {status}" for status, number in sorted(self.seen.items())) or "no case ran"
        terminalreporter.section("attnspec")
        terminalreporter.write_line(told)
        if not self._judged():
            terminalreporter.write_line("no case came to a verdict: the run fails", red=True)

    def _judged(self) -> bool:
        return any(status in JUDGED for status in self.seen)

    def _candidates(self) -> list[str]:
        names = []
        for text in self.config.getoption("--attnspec"):
            names += _described(text, self.config) if str(text).endswith(".py") else [str(text)]
        return names


class Target(pytest.Collector):
    """One candidate: its cases are the items below it."""

    session_: Any = None
    worker: Any = None
    expectations: Any = None

    def collect(self) -> Iterator[pytest.Item]:
        """Load the candidate in a worker and list the cases.

        Raises:
            pytest.UsageError: it cannot be judged; one line says why.
        """
        option = self.config.getoption
        from attnspec.conformance import api, expectations
        from attnspec.conformance.process import Worker

        try:
            if option("--attnspec-expect"):
                self.expectations = expectations.load(option("--attnspec-expect"))
            self.worker = Worker()
            report, cases = api.plan(
                self.name,
                option("--attnspec-mechanism"),
                level=option("--attnspec-level"),
                dtypes=_listed(option("--attnspec-dtype")),
                device=option("--attnspec-device"),
                directions=_listed(option("--attnspec-direction")) or api.DIRECTIONS,
                seed=option("--attnspec-seed"),
                select=option("--attnspec-select"),
                worker=self.worker,
            )
        except ValueError as error:
            self.close()
            raise pytest.UsageError(f"--attnspec {self.name}: {' '.join(str(error).split())}") from None
        if not cases:
            self.close()
            raise pytest.UsageError(f"--attnspec {self.name}: no case matches")
        self.report: Report = report
        for case in cases:
            yield CaseItem.from_parent(self, name=case.id, case=case)
        yield from self._problems([case.id for case in cases])

    def _problems(self, case_ids: Sequence[str]) -> Iterator[pytest.Item]:
        if self.expectations is None:
            return
        from attnspec.conformance import api

        option = self.config.getoption
        name = option("--attnspec-mechanism") or api.stated_mechanism(self.name)
        self.expectations.everything = lambda: api.every_id(
            self.name, name, device=option("--attnspec-device"), seed=option("--attnspec-seed")
        )
        for problem in self.expectations.problems(case_ids):
            yield ProblemItem.from_parent(self, name=f"expectations[{problem}]", problem=problem)

    def judge(self, case: Case) -> CaseResult:
        """The result of one case, with the expectation lists applied and failures explained."""
        from attnspec.conformance.session import Session
        from attnspec.conformance.suite import Suite
        from attnspec.conformance.types import CaseResult

        reason = self.expectations.skips(case.id) if self.expectations is not None else None
        if reason:
            return CaseResult(case, "skip", message=reason)
        if self.session_ is None:
            self.session_ = Session(
                self.name,
                Suite(case.mechanism),
                device=self.config.getoption("--attnspec-device"),
                timeout=self.config.getoption("--attnspec-timeout"),
                station=self.worker,
            )
        result: CaseResult = self.session_.judge(case)
        return result if self.expectations is None else self.expectations.settle(result)

    def explain(self, result: CaseResult) -> None:
        """Fill in the diagnosis of the first failures; the later ones are most often the same again."""
        from attnspec.conformance.explain import EXPLAINED, explain_failure

        explained = getattr(self, "explained", 0)
        if result.status == "fail" and explained < EXPLAINED:
            self.explained = explained + 1
            result.diagnosis = explain_failure(self.session_, result, EXPLAIN_SECONDS)

    def close(self) -> None:
        """End the worker process."""
        if self.session_ is not None:
            self.session_.close()
        if self.worker is not None:
            self.worker.close()


class CaseItem(pytest.Item):
    """One case as a test."""

    def __init__(self, *, case: Case, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.case = case
        self.target: Target = keywords["parent"]

    def runtest(self) -> None:
        """Judge the case and end as its status says."""
        from attnspec.conformance.outcome import FAILING

        result = self.target.judge(self.case)
        self.user_properties.append((PROPERTY, result.status))
        if result.status == "xfail":
            pytest.xfail(result.message)
        if result.status in FAILING:
            self.target.explain(result)
            raise FailedError(result)
        if result.status != "pass":
            pytest.skip(f"{result.status}: {result.message}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The explanation instead of a traceback through this plugin."""
        if not isinstance(excinfo.value, FailedError):
            return super().repr_failure(excinfo, style)
        from attnspec.conformance import api
        from attnspec.conformance.report.text import explanation

        result = excinfo.value.result
        report = api.renamed(self.target.report, self.target.name)
        told = explanation(result, report, api.axes_of(result.case.mechanism))
        return "\n".join(f"{label:<10} {text}" for label, text in told)

    def reportinfo(self) -> tuple[Path, None, str]:
        """What pytest prints in front of the result."""
        return self.target.path, None, self.name


class ProblemItem(pytest.Item):
    """An entry of an expectation list that does not hold: always fails."""

    def __init__(self, *, problem: str, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.problem = problem

    def runtest(self) -> None:
        pytest.fail(self.problem, pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.config.rootpath, None, self.name


class FailedError(Exception):
    """A case failed; carries its result."""

    def __init__(self, result: CaseResult) -> None:
        super().__init__(result.message or result.status)
        self.result = result


def _listed(text: str | None) -> Any:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else None


def _described(text: str, config: pytest.Config) -> list[str]:
    """`file.py:function` of every function in a file that @candidate describes."""
    from attnspec.conformance.candidate import CandidateError
    from attnspec.conformance.described import names_in

    path = Path(text) if Path(text).is_absolute() else config.invocation_params.dir / text
    try:
        names = names_in(path)
    except CandidateError as error:
        raise pytest.UsageError(f"--attnspec {text}: {error}") from None
    if not names:
        raise pytest.UsageError(
            f"--attnspec {text}: no function there is decorated with @attnspec.candidate(...); "
            f"name one as {text}:function"
        )
    return [f"{text}:{name}" for name in names]


def _loaded() -> list[str]:
    """The parts of attnspec that are loaded: this module alone as long as no option is given (for the tests)."""
    return sorted(name for name in sys.modules if name.startswith("attnspec"))
