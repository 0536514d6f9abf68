"""Feeds the equation reader garbage and hostile text; only SpecError may come out, within a second, and nothing runs.

    python -m attnspec.tests.fuzz_language --count 100000

prints how many inputs of each family were refused, accepted, slow or failed, and exits with 1 if any was slow or
failed. What is accepted is also evaluated on tiny inputs and exported to JSON and back. An audit hook watches for
execution, imports, files and processes while the reader works. `test_language_fuzz` runs some thousand inputs of it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from attnspec.spec import load
from attnspec.spec.language import SpecError, evaluate, read, read_expression
from attnspec.spec.language.export import from_json, to_json
from attnspec.spec.language.syntax import Declarations
from attnspec.tests.language_programs import make_inputs, make_sample

LIMIT = 1.0
"""Seconds of processor time that one input may take (other processes on the machine are not its fault)."""

LONGEST_TREE = 20_000
"""Characters of JSON that are read back: the schema's validator takes its time over more."""

FORBIDDEN = ("exec", "import", "open", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "code.__new__")
"""Audit events that no text may cause. (Parsing with `ast` raises `compile`, which runs nothing.)"""

HOSTILE = (
    "__import__('os').system('true')", "().__class__.__bases__[0].__subclasses__()",
    "eval('1')", "exec('1')", "open('/etc/passwd').read()", "q.shape", "q.__class__", "x[0,0].real", "lambda: 0",
    "(lambda j: j)(1)", "[j for j in q]", "{j for j in q}", "{j: j for j in q}", "sum(j for j in q)", "f'{q}'",
    "f'{__import__(\"os\")}'", "(z := 1)", "b'q'", "'q' * 10**9", "'a' 'b'", "...", "None", "1j", "q @ q",
    "q << 2", "~q", "1 & 2", "1 | 2", "1 ^ 2", "q is w", "q in w", "q not in w", "*q", "max(*q)", "max(**q)",
    "max(q, key=w)", "print(q)", "globals()", "getattr(q, 'x')", "sum[j](x[i,j])(1)", "x[i,j][0]", "x[i][j]",
    "x[:]", "x[0:1]", "x[::2]", "x[i,]", "x[()]", "x[]", "sum[](1)", "sum[j : j : j](1)", "sum[: j](1)",
    "sum[j:](1)", "sum[1](1)", "sum[j](1, 2)", "sum(1)", "sum[j]", "softmax[j]", "exp()", "exp(1, 2)", "exp",
    "present()", "present(1)", "present(q, w)", "await q", "yield", "yield q", "not", "if", "else", "q if w",
    "1 if flag", "0x10", "0b1", "0o7", "1_000", "1e999", "-1e999", "1e-999", "9" * 400, "9" * 4100,
    "9 ** 9 ** 9 ** 9", "10 ** 10 ** 10", "2 ** 63", "2 ** 64", "(-2) ** 63", "2.0 ** 99999", "0 ** -1", "1 // 0",
    "1 % 0", "1 / 0", "x[2 ** 62, 0]", "N ** N ** N ** N ** N", "(2 ** 62) * (2 ** 62)", "9223372036854775807 + 1",
    "c * 9223372036854775807", "floor(inf)", "ceil(1e300)", "floor(0 * inf)", "True + 1", "flag + 1", "mode",
    "mode + 1", "mode == 'nowhere'", "'low' == 'low'", "'low' < mode", "\"unterminated", "'''triple'''", "r'raw'",
    "__debug__", "__builtins__", "__name__", "_", "T", "A0", "undefined_name", "rank[j,k](x[j,k])", "rank[j](1)",
    "argmax[j,k](x[j,k])", "softmax[k](q[i])", "type(q)", "q = 1", "q == 1 == 2", "q; w", "q\n= 1", "import os",
    "from os import system", "del q", "assert q", "raise q", "class A: pass", "def f(): pass", "@q", "global q",
    "pass", "#", "", " ", "\\", "\\\n1", "q \\\n + 1", "\t1", "1\f", "1\v2", "\x00", "q\x00", "\ufeff1",
    "q\u2028w", "ｑ", "𝒙[i,j]", "ﬁ", "λ",
)  # fmt: skip
PIECES = (
    *"()[]{},:=+-*/%<>!.#'\"\\@~^&|;_ \n\t", "**", "//", "==", "<=", ":=", "->", "sum", "softmax", "rank", "if",
    "else", "and", "or", "not", "in", "is", "for", "lambda", "i", "j", "k", "d", "t", "q", "x", "w", "0", "1", "9",
    "1e9", "inf", "pi", "present", "exp", "T - 1", "x[i,j]", "S0[t-1,d]", "\x00", "é", "🙂",
)  # fmt: skip
DEEP = (
    ("(", ")"), ("-", ""), ("+", ""), ("not ", ""), ("exp(", ")"), ("q[", "]"), ("x[0,", "]"), ("sum[j](", ")"),
    ("1 if flag else ", ""), ("(1 if flag else ", ")"), ("2 ** ", ""), ("1 < ", ""), ("min(1,", ")"),
    ("l2norm[d](", ")"), ("layernorm[d](", ")"), ("softmax1[j](", ")"), ("[", "]"), ("{", "}"), ("1 + (", ")"),
    ("lambda: ", ""), ("softmax[j : ", "](1)"), ("square(", ")"), ("gelu_tanh(", ")"), ("f(", ")"), ("q.a", ""),
    ("q[0]", ""), ("1 + ", ""), ("flag and ", ""),
)  # fmt: skip


class TookTooLong(BaseException):
    """The watchdog fired."""


@dataclass
class Tally:
    """What happened to the inputs of a run."""

    refused: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    slowest_family: str = ""

    @property
    def count(self) -> int:
        return self.refused.total() + self.accepted.total() + len(self.failures)


@functools.cache
def declarations() -> Declarations:
    """The declarations that generated programs have, without outputs, so that any equation may stand alone."""
    sample = make_sample(random.Random(0).randrange)
    decl = sample.declarations
    return Declarations(decl.sizes, decl.indices, decl.inputs, decl.options, {}, decl.batch)


@functools.cache
def corpus() -> tuple[str, ...]:
    """Well-formed texts to damage."""
    generated = [make_sample(random.Random(seed).randrange).text for seed in range(300)]
    return (*generated, *load("softmax_attention").program.text.splitlines())


# Families of inputs: each makes (equations, macros) from a generator.


def garbage(rng: random.Random) -> tuple[str, str]:
    """Random characters: bytes, any code points, or pieces of the language."""
    length = rng.choice((1, 5, 30, 200, 3000))
    kind = rng.randrange(3)
    if kind == 0:
        return "".join(chr(rng.randrange(256)) for _ in range(length)), ""
    if kind == 1:
        return "Y = " + "".join(
            chr(rng.choice((rng.randrange(0x110000), rng.randrange(128)))) for _ in range(length)
        ), ""
    return rng.choice(("", "Y = ", "Y[i] = ")) + " ".join(rng.choice(PIECES) for _ in range(length // 3 + 1)), ""


def mutated(rng: random.Random) -> tuple[str, str]:
    """A well-formed text with a few characters or pieces changed."""
    text = rng.choice(corpus())
    for _ in range(rng.randrange(1, 6)):
        a = rng.randrange(len(text) + 1)
        b = min(len(text), a + rng.choice((0, 1, 1, 2, 8)))
        c = rng.randrange(len(text) + 1)
        d = min(len(text), c + rng.randrange(12))
        text = text[:a] + rng.choice(("", rng.choice(PIECES), text[c:d], rng.choice(HOSTILE))) + text[b:]
    return text, ""


def hostile(rng: random.Random) -> tuple[str, str]:
    """Python that is no equation, alone or inside a well-formed one."""
    text = rng.choice(HOSTILE)
    frame = rng.choice(
        (
            "{}",
            "Y = {}",
            "Y[i] = {}",
            "Y = 1 + ({})",
            "Y[i] = sum[j : {}](x[i,j])",
            "Y[{}] = 1",
            "Y[i] = x[i,{}]",
            "Y = exp({}) if {} else {}",
            "{} = 1",
        )
    )
    return frame.replace("{}", text), rng.choice(
        ("", "", "", f"m(x) = {text}", f"{text}(x) = 1", f"m[{text}](x) = x", f"m(x={text}) = x")
    )


def deep(rng: random.Random) -> tuple[str, str]:
    """Deep nesting of one or two kinds."""
    depth = rng.choice((10, 59, 61, 100, 500, 1500, 20_000))
    opening, closing = rng.choice(DEEP)
    other, end = rng.choice(DEEP)
    more = rng.choice((0, 1, depth))
    text = opening * depth + other * more + rng.choice(("1", "q[i]", "flag", "")) + end * more + closing * depth
    return f"Y[i] = {text}", ""


def enormous(rng: random.Random) -> tuple[str, str]:
    """Very long equations, names, numbers, and very many equations."""
    length = rng.choice((3_900, 4_100, 50_000, 500_000))
    kinds: tuple[Callable[[], str], ...] = (
        lambda: "Y = " + "1 + " * (length // 4) + "1",
        lambda: "Y = " + "q" * length,
        lambda: "Y = " + str(rng.randrange(1, 10)) * length,
        lambda: "Y = 0." + "3" * length,
        lambda: "\n".join(f"y{k} = {k}" for k in range(length // 10)),
        lambda: "\n" * length,
        lambda: "Y = (" + "\n" * length + "1)",
        lambda: "# " + "x" * length,
        lambda: "Y = min(" + ",".join(["1"] * (length // 2)) + ")",
        lambda: "Y = 1" + " < 1" * (length // 4),
        lambda: "Y = flag" + " and flag" * (length // 9),
        lambda: "Y = '" + "x" * length + "'",
        lambda: "Y = q[" + ",".join(["0"] * (length // 2)) + "]",
        lambda: "\n".join(f"y{k} = y{(k + 1) % 390} + y{(k * 7) % 390}" for k in range(390)),
        lambda: "\n".join(f"y{k} = y{k + 1}" for k in range(390)) + "\ny390 = 1",
        lambda: "\n".join(f"y{k}[t] = y{(k + 1) % 390}[t-1] + y{(k * 7) % 390}[t-1]" for k in range(390)),
    )
    return rng.choice(kinds)(), ""


def explosive(rng: random.Random) -> tuple[str, str]:
    """Macros that grow quadratically or exponentially, refer to themselves, or nest."""
    levels = rng.choice((3, 10, 30, 200))
    fan = rng.choice((2, 3, 10))
    grow = "\n".join(f"m{k + 1}(x) = " + " + ".join([f"m{k}(x)"] * fan) for k in range(levels))
    doubled = "\n".join(f"m{k + 1}(x) = m{k}(x * x)" for k in range(levels))
    call = f"Y[i] = m{levels}(q[i])"
    kinds = (
        (call, f"m0(x) = x * x\n{grow}"),
        (call, f"m0(x) = x\n{doubled}"),
        ("Y[i] = " + "square(" * levels + "q[i]" + ")" * levels, ""),
        ("Y[i] = " + "layernorm[d](" * (levels // 3) + "q[i] + d" + ")" * (levels // 3), ""),
        ("Y[i] = m(q[i])", "m(x) = m(x)"),
        ("Y[i] = m(q[i])", "m(x) = n(x)\nn(x) = m(x)"),
        ("Y[i] = m[j](q[i])", "m[j](x) = sum[k](x)"),
        ("Y[i] = m(q[i])", "m(x) = " + "x + " * 900 + "x"),
        ("\n".join(f"y{k}[i] = m(m(m(q[i])))" for k in range(100)), "m(x) = " + "x * " * 30 + "x"),
    )
    return rng.choice(kinds)


FAMILIES = (garbage, mutated, hostile, deep, enormous, explosive)
WEIGHTS = (26, 42, 20, 8, 2, 2)


def use(text: str, macros: str, rng: random.Random) -> bool:
    """Read, and if that succeeds evaluate and export; whether it was accepted."""
    if rng.random() < 0.1:
        with contextlib.suppress(SpecError):
            read_expression(text)
    try:
        program = read(text, declarations(), macros=macros, file="fuzz")
    except SpecError as error:
        one_line(error)
        return False
    sizes = dict.fromkeys(("N", "M", "D", "T", "B"), 2)
    inputs = make_inputs(sizes, 0, True, False)
    try:
        evaluate(program, inputs, {}, sizes=sizes, outputs=[*program.definitions][-3:])
    except SpecError as error:
        one_line(error)
    data = json.dumps(to_json(program))
    if len(data) < LONGEST_TREE and from_json(json.loads(data)) != program:
        raise AssertionError("the tree does not survive JSON")
    return True


def one_line(error: SpecError) -> None:
    """Every error is one line of reasonable length, with no control characters in it."""
    shown = str(error)
    if len(shown) > 600 or not shown.isprintable():
        raise AssertionError(f"an error that is not one clear line: {shown[:200]!r}") from error


class Guard:
    """Notes forbidden audit events, and interrupts what takes far too long, while it is active."""

    def __init__(self) -> None:
        self.active = False
        self.events: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.active and event.startswith(FORBIDDEN):
            self.events.append(f"{event} {str(arguments)[:80]}")

    def run(self, action: Callable[[], bool], limit: float) -> bool:
        import signal

        def fire(*_: Any) -> None:
            raise TookTooLong

        can_alarm = hasattr(signal, "SIGALRM")
        if can_alarm:
            before = signal.signal(signal.SIGALRM, fire)
            signal.setitimer(signal.ITIMER_REAL, limit)
        self.active = True
        try:
            return action()
        finally:
            self.active = False
            if can_alarm:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)


@functools.cache
def guard() -> Guard:
    """The one guard of this process (audit hooks cannot be removed)."""
    return Guard()


def fuzz(count: int, seed: int = 0, *, progress: Callable[[int], None] | None = None, limit: float = LIMIT) -> Tally:
    """Run `count` inputs. Input number k depends on `seed` and k alone."""
    tally = Tally()
    warm = random.Random(0)
    for text, macros in (
        ("Y = sum[j](softmax[j](x[0,j])) + erf(w) + gelu(w)", ""),
        ("Y = q", "m(x) = x"),
        ("Y = (", ""),
    ):
        use(text, macros, warm)
    for number in range(count):
        rng = random.Random(f"{seed}:{number}")
        family = rng.choices(FAMILIES, WEIGHTS)[0]
        text, macros = family(rng)
        name = family.__name__
        start = time.process_time()
        try:
            accepted = guard().run(functools.partial(use, text, macros, rng), 20 * limit)
            (tally.accepted if accepted else tally.refused)[name] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            tally.failures.append(
                f"{seed}:{number} {name}: {type(error).__name__}: {str(error)[:200]} "
                f"for {text[:200]!r} {macros[:100]!r}"
            )
        taken = time.process_time() - start
        if taken > limit:
            tally.failures.append(f"{seed}:{number} {name}: took {taken:.1f} s for {text[:200]!r}")
        if taken > tally.slowest:
            tally.slowest, tally.slowest_family = taken, name
        if guard().events:
            tally.failures.append(f"{seed}:{number} {name}: caused {guard().events[:3]} with {text[:200]!r}")
            guard().events.clear()
        if progress is not None and number % 1000 == 999:
            progress(number + 1)
    return tally


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fuzz the reader of the equation language.")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    shown = (lambda done: print(f"\r{done} inputs", end="", file=sys.stderr)) if sys.stderr.isatty() else None
    start = time.perf_counter()
    tally = fuzz(given.count, given.seed, progress=shown)
    taken = time.perf_counter() - start
    for family in FAMILIES:
        name = family.__name__
        print(f"{name:>10}: {tally.refused[name]:>6} refused, {tally.accepted[name]:>6} accepted")
    print(
        f"{tally.count} inputs in {taken:.0f} s; the slowest took {tally.slowest:.3f} s of processor time "
        f"({tally.slowest_family}); {len(tally.failures)} failures"
    )
    for failure in tally.failures[:20]:
        print(failure)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
