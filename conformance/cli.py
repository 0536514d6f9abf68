"""The command line: arguments, exit codes, and one clear line for everything that goes wrong.

Each command's work stands in a module of its own (`cli_show`, `cli_check`, ...), imported when the command runs.
Exit codes: 0 conforms (or done), 1 does not conform, 2 could not judge: usage, bad input, missing device. Results go to
standard output, messages and progress to standard error, progress only where that is a terminal.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, NoReturn

from attnspec.conformance.types import LEVELS

DTYPES = ("fp32", "fp16", "bf16", "fp64")
DIRECTIONS = ("forward", "backward")
DEVICES = ("cpu", "cuda")
INTERRUPTED = 130

EPILOG = """\
exit codes: 0 conforms, 1 does not conform, 2 could not judge (usage, import, missing device)

a kernel of one's own:
    attnspec check my_kernels.py:attention --mechanism softmax_attention
arguments are matched by name (q, k, v, causal, scale, window, bias, mask, ...); @attnspec.candidate says what differs.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        with _termination_interrupts():
            module = import_module(f"attnspec.conformance.{arguments.module}")
            code: int = getattr(module, arguments.function)(arguments)
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output went away; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except KeyboardInterrupt:
        print("attnspec: interrupted", file=sys.stderr)
        return INTERRUPTED
    except MemoryError:
        print("attnspec: out of memory", file=sys.stderr)
        return 2
    except Exception as error:
        if not _is_users(error):
            traceback.print_exc()
            print("attnspec: this is a defect of attnspec, not a verdict", file=sys.stderr)
            return 2
        print(f"attnspec {arguments.command}: {_one_line(error)}", file=sys.stderr)
        return 2
    return code


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """A request to terminate, as CI sends it, ends a run like Ctrl-C: workers stop, what was judged is reported."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parser() -> Parser:
    """The whole command line."""
    top = Parser(
        prog="attnspec",
        description="Executable equations of attention mechanisms, and the suite that judges kernels against them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action=_Version, nargs=0, help="print the version and stop")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    _list(commands)
    _show(commands)
    _check(commands)
    _merge(commands)
    _repro(commands)
    _mutants(commands)
    _coverage(commands)
    _vectors(commands)
    _bench(commands)
    _atlas(commands)
    return top


def _command(commands: Any, name: str, module: str, function: str, help_text: str, **more: Any) -> Parser:
    command: Parser = commands.add_parser(name, help=help_text, description=more.pop("description", help_text), **more)
    command.set_defaults(module=module, function=function)
    return command


def _list(commands: Any) -> None:
    command = _command(commands, "list", "cli_show", "list_mechanisms", "list the mechanisms")
    command.add_argument("--family", metavar="F", help="only this family")
    command.add_argument("--json", action="store_true", help="as JSON")


def _show(commands: Any) -> None:
    command = _command(
        commands, "show", "cli_show", "show", "show a mechanism's equations",
        description="Show a mechanism: its equations as text or LaTeX, or the checked tree as JSON.",
    )  # fmt: skip
    command.add_argument("name", metavar="NAME", help="a mechanism's name, or the path of a mechanism file")
    command.add_argument("--format", choices=("text", "latex", "json"), default="text")


def _check(commands: Any) -> None:
    command = _command(
        commands, "check", "cli_check", "check", "judge a candidate",
        description="Judge a candidate against a mechanism's equations.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_argument(
        "candidate", metavar="CANDIDATE", help="module:function, path/to/file.py:function, or an adapter's short name"
    )
    command.add_argument("--mechanism", metavar="M", help="what it implements; needed unless @candidate says so")
    command.add_argument("--level", choices=LEVELS, default="standard")
    command.add_argument(
        "--dtype", type=_several("dtype", DTYPES), metavar="fp32,fp16,bf16", help="default: all that it supports"
    )
    command.add_argument("--device", choices=DEVICES, default="cpu")
    command.add_argument(
        "--direction", type=_several("direction", DIRECTIONS), metavar="forward,backward", help="default: both"
    )
    command.add_argument("--seed", type=_seed, default=0, metavar="S", help="of the random values (default 0)")
    command.add_argument("--select", action="append", default=[], metavar="GLOB", help="only cases whose id matches")
    command.add_argument("--shard", metavar="2/4", help="only this part of the cases; see `attnspec merge`")
    command.add_argument("--timeout", type=_positive, metavar="SECONDS", help="for one case")
    command.add_argument("--expect", action="append", default=[], metavar="FILE", help="skip and xfail list (TOML)")
    command.add_argument("--list-cases", action="store_true", help="print the ids of the cases and stop")
    command.add_argument("--no-explain", action="store_true", help="do not shrink and diagnose failures")
    command.add_argument("--quiet", "-q", action="store_true", help="print the verdict and the failures only")
    command.add_argument("--json", metavar="FILE", help="write the report as JSON")
    command.add_argument("--junit", metavar="FILE", help="write the report as JUnit XML")
    command.add_argument("--markdown", metavar="FILE", help="write the report as Markdown")


def _merge(commands: Any) -> None:
    command = _command(
        commands, "merge", "cli_check", "merge", "join the reports of a run in parts",
        description="Join the JSON reports of shards (or selections) of one run; the verdict is that of the whole.",
    )  # fmt: skip
    command.add_argument("reports", nargs="+", metavar="FILE", help="written by attnspec check --json")
    command.add_argument("--quiet", "-q", action="store_true", help="print the verdict and the failures only")
    command.add_argument("--json", metavar="FILE", help="write the report as JSON")
    command.add_argument("--junit", metavar="FILE", help="write the report as JUnit XML")
    command.add_argument("--markdown", metavar="FILE", help="write the report as Markdown")


def _repro(commands: Any) -> None:
    command = _command(commands, "repro", "cli_check", "repro", "run one case again and explain it")
    command.add_argument("case", metavar="CASE", help="a case's id, as reports print it")
    command.add_argument("--candidate", required=True, metavar="MODULE:NAME")
    command.add_argument("--device", choices=DEVICES, default="cpu")
    command.add_argument("--timeout", type=_positive, metavar="SECONDS")
    command.add_argument("--json", metavar="FILE", help="write the report as JSON")


def _mutants(commands: Any) -> None:
    command = _command(
        commands, "mutants", "cli_data", "mutants", "test the tests: which wrong variants are rejected",
        description="Run mechanical mutants of the equations and planted wrong kernels through the suite.",
    )  # fmt: skip
    command.add_argument("--mechanism", metavar="M", help="default: all mechanisms")
    command.add_argument("--json", metavar="FILE", help="write the result as JSON")
    command.add_argument("--record", action="store_true", help="keep the counts for the coverage table (in a checkout)")


def _coverage(commands: Any) -> None:
    command = _command(commands, "coverage", "cli_data", "coverage", "what exists for each mechanism, from the files")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--planned", action="store_true", help="also the mechanisms that have no file yet")


def _vectors(commands: Any) -> None:
    command = _command(commands, "vectors", "cli_data", "vectors", "golden vectors for other languages")
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    export = actions.add_parser(
        "export",
        help="write inputs, outputs and tolerances",
        description="Write golden vectors: safetensors and a manifest.",
    )
    export.add_argument("--mechanism", required=True, metavar="M")
    export.add_argument("--out", required=True, metavar="DIR")
    export.add_argument("--level", choices=LEVELS, default="smoke")
    export.add_argument("--dtype", type=_several("dtype", DTYPES), default=("fp32",), metavar="fp32,fp16,bf16")
    export.add_argument("--seed", type=_seed, default=0, metavar="S")
    verify = actions.add_parser(
        "verify", help="read exported vectors back and evaluate them again", description="Check exported vectors."
    )
    verify.add_argument("out", metavar="DIR")


def _bench(commands: Any) -> None:
    command = _command(
        commands, "bench", "cli_bench", "bench", "time what conforms beside a named alternative",
        description="Judge contenders, then time them in turns; ratios, and shares of the roofline of the equations.",
    )  # fmt: skip
    command.add_argument("--mechanism", required=True, metavar="M", help="one, or several with commas")
    command.add_argument(
        "--candidate", action="append", metavar="CANDIDATE",
        help="as for check, or `equations`, `reference`; may be repeated (default: our kernel; on a CPU the reference)",
    )  # fmt: skip
    command.add_argument("--against", default="equations", metavar="CANDIDATE", help="the alternative of the ratios")
    command.add_argument(
        "--size", action="append", metavar="NAME|queries=512,D=64",
        help="tiny, small, grouped, 2k, 4k, 4k-grouped, 16k, decode, or numbers; may be repeated",
    )  # fmt: skip
    command.add_argument(
        "--set", action="append", default=[], metavar="causal=true|+bias", help="an option, or an optional input"
    )
    command.add_argument("--dtype", type=_several("dtype", DTYPES), metavar="fp32,fp16,bf16")
    command.add_argument("--direction", type=_several("direction", DIRECTIONS), metavar="forward,backward")
    command.add_argument("--device", choices=DEVICES, default="cpu")
    command.add_argument("--level", choices=LEVELS, default="smoke", help="of the judgement before (default smoke)")
    command.add_argument("--repeats", type=_count, default=9, metavar="N", help="samples of each (default 9)")
    command.add_argument("--json", metavar="FILE", help="write measurements and the machine's fingerprint")
    command.add_argument("--markdown", metavar="FILE", help="write the table")
    command.add_argument("--plot", metavar="FILE.svg", help="draw the ratios (needs matplotlib)")


def _atlas(commands: Any) -> None:
    command = _command(
        commands, "atlas", "cli_show", "atlas", "write a page of HTML for every mechanism",
        description="Write the atlas: a static page for every mechanism and an index. Needs PyTorch for the pictures.",
    )  # fmt: skip
    command.add_argument("--out", required=True, metavar="DIR", help="made if missing; pages in it are replaced")
    command.add_argument("--mechanism", metavar="M", help="only this page and the index; default: all")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from attnspec import __version__

        print(f"attnspec {__version__}")
        parser.exit(0)


def _several(what: str, known: Sequence[str]) -> Any:
    def read(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        stray = [name for name in names if name not in known]
        if stray or not names:
            got = repr(stray[0]) if stray else "nothing"
            raise argparse.ArgumentTypeError(f"{what} {got} is unknown; choose from {', '.join(known)}")
        return names

    return read


def _seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; expected an integer from 0 to 2**32 - 1")
    return value


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; expected an integer from 1 to 1000")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def _is_users(error: Exception) -> bool:
    """Whether the error is about what came in; anything else is a defect of ours and deserves its traceback."""
    from attnspec.conformance.api import CannotJudgeError
    from attnspec.conformance.candidate import CandidateError
    from attnspec.conformance.case_id import CaseError
    from attnspec.conformance.report.files import FileError
    from attnspec.conformance.semantics import DeclarationError
    from attnspec.conformance.shards import ShardError
    from attnspec.spec.language.errors import SpecError

    kinds = (CannotJudgeError, CandidateError, CaseError, DeclarationError, FileError, ShardError, SpecError)
    return isinstance(error, kinds)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
