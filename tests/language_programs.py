"""Hypothesis strategies for well-formed programs of the equation language, with declarations, inputs and options.

Programs are generated as text, so that the reader is tested too. Values that decide something (comparisons, ranks,
floors) are sums and products of few small dyadic numbers, which float64 holds exactly in any order of summation: two
evaluators must then decide alike. Everything else may be rounded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from attnspec.spec.language.reader import parse_node
from attnspec.spec.language.syntax import (
    Declarations,
    InputDecl,
    OptionDecl,
    OutputDecl,
    SizeDecl,
)

INDEX_SIZES = {"i": "N", "r": "N", "j": "M", "k": "M", "d": "D", "f": "D", "t": "T", "z": "N + 1", "b": "B"}
BOUND = ("i", "r", "j", "k", "d", "f", "t", "z")
NAN, INF = float("nan"), float("inf")


def _input(name: str, axes: str, kind: str = "real", batch: str = "", **more: Any) -> InputDecl:
    return InputDecl(name, tuple(axes), tuple(batch), kind, **more)  # type: ignore[arg-type]


INPUTS = {
    decl.name: decl
    for decl in (
        _input("x", "ij", batch="b"),
        _input("y", "jd", broadcast=("j",)),
        _input("q", "i"),
        _input("a", "td", batch="b"),
        _input("w", ""),
        _input("v", "ij"),  # with -inf
        _input("u", "jd"),  # with NaN and infinities
        _input("ok", "jd", "bool"),  # where u is finite
        _input("n", "i", "int", batch="b"),
        _input("p", "j", "int"),
        _input("m", "ij", "bool", batch="b", broadcast=("b", "i")),
        _input("o", "j", optional=True),
    )
}
OPTIONS = {
    "c": OptionDecl("c", "int", 2),
    "s": OptionDecl("s", "float", None, parse_node("1 / (D + 2)")),
    "flag": OptionDecl("flag", "bool", False),
    "mode": OptionDecl("mode", "enum", "low", choices=("low", "high")),
    "lim": OptionDecl("lim", "int", None, nullable=True),
}


@dataclass(frozen=True)
class Sample:
    """A program's text with everything that reading and evaluating it takes."""

    text: str
    declarations: Declarations
    inputs: dict[str, Any]
    options: dict[str, Any]
    sizes: dict[str, int]

    def __repr__(self) -> str:
        return f"Sample(sizes={self.sizes}, options={self.options}, given={sorted(self.inputs)})\n{self.text}\n"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What Hypothesis shows of a failing sample."""
        printer.text(repr(self))


@dataclass
class Builder:
    """Makes expressions; `choose(n)` picks a number below n, `defined` maps the definitions so far to (axes, kind)."""

    choose: Callable[[int], int]
    defined: dict[str, tuple[str, str]] = field(default_factory=dict)

    def pick(self, *options: Any) -> Any:
        return options[self.choose(len(options))]

    def maybe(self) -> bool:
        return self.choose(2) == 1

    def shuffled(self, items: Sequence[str], count: int) -> str:
        """`count` different items in any order."""
        rest = list(items)
        return "".join(rest.pop(self.choose(len(rest))) for _ in range(count))

    # Leaves

    def leaf(self, kind: str, scope: str) -> str:
        if kind == "int":
            named = [f"n[{s}]" for s in scope if s in "ir"] + [f"p[{s}]" for s in scope if s in "jk"]
            return str(self.pick("c", "N", "1", "2", "-1", *scope, *named))
        if kind == "bool":
            masks = [f"m[{a},{e}]" for a in scope for e in scope if a in "ir" and e in "jk"]
            masks += [f"ok[{a},{e}]" for a in scope for e in scope if a in "jk" and e in "df"]
            return str(self.pick("flag", 'mode == "low"', "present(lim)", "present(o)", "N > 1", *masks))
        candidates = [("q", "i"), ("x", "ij"), ("y", "jd"), ("a", "td"), ("w", "")]
        candidates += [(name, axes) for name, (axes, of) in self.defined.items() if of == kind]
        if kind == "real":
            candidates += [("v", "ij"), ("u", "jd")]
            candidates += [(name, axes) for name, (axes, of) in self.defined.items() if of == "exact"]
        name, axes = self.pick(*candidates)
        return self.element(name, axes, scope)

    def element(self, name: str, axes: str, scope: str) -> str:
        """An element of a tensor; subscripts that may leave it are guarded."""
        subscripts, guards = [], []
        for axis in axes:
            size = INDEX_SIZES[axis]
            same = [index for index in scope if INDEX_SIZES[index] == size]
            if same and self.choose(4):
                subscripts.append(self.pick(*same))
                continue
            at = self.pick(*(f"{index} - 1" for index in scope), *(f"{index} + 1" for index in scope), "0", "N - 1")
            gathers = [f"n[{index}]" for index in scope if index in "ir"] + [f"p[{s}]" for s in scope if s in "jk"]
            if gathers and self.maybe():
                at = self.pick(*gathers)
            subscripts.append(at)
            guards.append(f"0 <= {at} < {size}")
        text = f"{name}[{','.join(subscripts)}]" if axes else name
        return f"({text} if {' and '.join(guards)} else {self.pick('0', '1', '-2')})" if guards else text

    # Expressions

    def expression(self, kind: str, scope: str, depth: int) -> str:
        if depth <= 0:
            return self.leaf(kind, scope)
        forms = {"real": self.real, "exact": self.exact, "int": self.integer, "bool": self.condition}
        return str(forms[kind](scope, depth - 1))

    def shared(self, kind: str, scope: str, depth: int) -> str:
        """Forms that every numeric kind has."""
        form = self.pick("cond", "static", "optional", "minmax", "abs", "relu", "sign", "clip")
        a, b = self.expression(kind, scope, depth), self.expression(kind, scope, depth)
        if form == "cond":
            return f"({a} if {self.expression('bool', scope, depth)} else {b})"
        if form == "static":
            return f"({a} if flag and N > 0 else {b})"
        if form == "optional":
            index = next((index for index in scope if index in "jk"), None)
            given = f"o[{index}]" if index and kind != "int" else "lim" if kind == "int" else a
            test = "present(o)" if index and kind != "int" else "present(lim)"
            return f"({given} if {test} else {b})"
        if form == "minmax":
            return f"{self.pick('min', 'max')}({a}, {b})"
        if form == "clip":
            return f"clip({a}, -1, 2)"
        return f"{form}({a})"

    def reduction(self, ops: tuple[str, ...], kind: str, scope: str, depth: int) -> str:
        op = self.pick(*ops)
        index = self.pick(*BOUND)
        inner = scope.replace(index, "") + index
        more = ""
        if op in ("sum", "max", "any", "all") and self.choose(5) == 0:
            more = self.pick(*(other for other in BOUND if other != index))
            inner = inner.replace(more, "") + more
        body = self.expression(kind, inner, depth)
        needs = [self.uses(kind, name, inner) for name in (index, more) if name]
        join = " and " if kind == "bool" else self.pick(" + ", " * ", " - ") if op != "prod" else " + "
        body = join.join([f"({body})", *needs])
        condition = f" : {self.expression('bool', inner, max(depth, 1))}" if self.maybe() else ""
        names = f"{index},{more}" if more else index
        return f"{op}[{names}{condition}]({body})"

    def uses(self, kind: str, index: str, scope: str) -> str:
        """A leaf that surely depends on `index`."""
        if kind == "bool":
            return f"({index} >= {self.pick('0', '1', 'c')})"
        if kind == "int":
            return index
        named = {"i": "q[i]", "r": "q[r]", "j": "y[j,0]", "k": "y[k,0]", "t": "a[t,0]"}
        if index in "jkt":
            return f"({named[index]} if D > 0 else {index})"
        return named.get(index, index)

    def real(self, scope: str, depth: int) -> str:
        form = self.pick(
            "shared",
            "arithmetic",
            "arithmetic",
            "function",
            "positive",
            "reduce",
            "reduce",
            "softmax",
            "row",
            "row",
            "exact",
            "dirty",
            "decided",
            "decided",
            "divide",
        )
        if form == "shared":
            return self.shared("real", scope, depth)
        a = self.expression("real", scope, depth)
        if form == "arithmetic":
            return f"({a} {self.pick('+', '-', '*')} {self.expression('real', scope, depth)})"
        if form == "function":
            smooth = ("exp", "tanh", "sin", "cos", "sigmoid", "softplus", "silu", "gelu", "elu", "erf", "exp2")
            return f"{self.pick(*smooth)}(min({a}, 2))"
        if form == "positive":
            inside = self.expression("exact", scope, depth)
            return f"{self.pick('log', 'log1p', 'sqrt', 'rsqrt', 'log2')}(abs({inside}))"
        if form == "reduce":
            return self.reduction(("sum", "sum", "mean", "max", "min", "logsumexp", "prod"), "real", scope, depth)
        if form == "softmax":
            if not scope:
                return a
            index = self.pick(*scope)
            condition = f" : {self.expression('bool', scope, max(depth, 1))}" if self.maybe() else ""
            return f"softmax[{index}{condition}]({a} + {self.uses('real', index, scope)})"
        if form == "row":
            return self.row(scope, depth)
        if form == "exact":
            return self.expression("exact", scope, depth)
        if form == "dirty":
            rows, columns = [s for s in scope if s in "jk"] or ["k"], [s for s in scope if s in "df"] or ["f"]
            j, d = self.pick(*rows), self.pick(*columns)
            return str(
                self.pick(
                    f"sum[{j},{d} : ok[{j},{d}]](u[{j},{d}] * y[{j},{d}])",
                    f"prod[{j},{d} : ok[{j},{d}]](u[{j},{d}])",
                    f"logsumexp[{j},{d} : ok[{j},{d}]](u[{j},{d}])",
                    f"sum[{j},{d}](u[{j},{d}] if ok[{j},{d}] else 1)",
                )
            )
        if form == "divide":
            return f"({a} / ({self.expression('exact', scope, depth)} + 0.125))"  # no zero, whose sign nobody fixes
        return f"({a} if {self.expression('bool', scope, depth)} else {self.expression('real', scope, depth)})"

    def row(self, scope: str, depth: int) -> str:
        """A masked row of `v`, which holds -inf; rows that are empty or all -inf are common."""
        rows = [index for index in scope if index in "ir"]
        if not rows:
            return self.leaf("real", scope)
        i, k = self.pick(*rows), self.pick("j", "k")
        keep = self.expression("bool", scope.replace(k, "") + k, 1)
        return str(
            self.pick(
                f"logsumexp[{k} : {keep}](v[{i},{k}])",
                f"max[{k} : {keep}](v[{i},{k}])",
                f"sum[{k}](softmax[{k} : {keep}](v[{i},{k}]) * ({k} + 1))",
                f"prod[{k} : {keep}](v[{i},{k}])",
            )
        )

    def exact(self, scope: str, depth: int) -> str:
        form = self.pick("shared", "arithmetic", "reduce", "int", "leaf")
        if form == "shared":
            return self.shared("exact", scope, depth)
        if form == "arithmetic":
            return f"({self.expression('exact', scope, depth)} {self.pick('+', '-')} {self.leaf('exact', scope)})"
        if form == "reduce":
            return self.reduction(("sum", "max", "min"), "exact", scope, min(depth, 1))
        if form == "int":
            return f"({self.expression('int', scope, depth)} + 0.5)"
        return self.leaf("exact", scope)

    def integer(self, scope: str, depth: int) -> str:
        form = self.pick("shared", "arithmetic", "division", "sum", "rank", "rank", "argmax", "floor", "leaf", "power")
        if form == "shared":
            return self.shared("int", scope, depth)
        if form == "arithmetic":
            return f"({self.expression('int', scope, depth)} {self.pick('+', '-', '*')} {self.leaf('int', scope)})"
        if form == "division":
            return f"({self.expression('int', scope, depth)} {self.pick('//', '%')} {self.pick('2', '3', '(M + 1)')})"
        if form == "sum":
            return self.reduction(("sum",), "int", scope, min(depth, 1))
        if form == "rank" and scope:
            index = self.pick(*scope)
            condition = f" : {self.expression('bool', scope, max(depth, 1))}" if self.maybe() else ""
            body = (
                f"{self.expression('exact', scope, depth)} + {self.pick('0 * ', '')}{self.uses('exact', index, scope)}"
            )
            return f"{self.pick('rank', 'argsort')}[{index}{condition}]({body})"
        if form == "argmax":
            return self.reduction(("argmax",), "exact", scope, min(depth, 1))
        if form == "floor":
            return f"{self.pick('floor', 'ceil')}(clip({self.expression('exact', scope, depth)}, -9, 9))"
        if form == "power":
            return f"({self.leaf('int', scope)} ** 2)"
        return self.leaf("int", scope)

    def condition(self, scope: str, depth: int) -> str:
        form = self.pick(
            "compare", "compare", "chain", "logic", "not", "quantifier", "leaf", "equal", "guarded", "cond"
        )
        kind = self.pick("int", "exact")
        a = self.expression(kind, scope, depth)
        if form == "compare":
            return f"{a} {self.pick('<', '<=', '>', '>=', '==', '!=')} {self.expression(kind, scope, depth)}"
        if form == "chain":
            return f"{self.leaf('int', scope)} <= {a} < {self.leaf('int', scope)}"
        first, second = self.expression("bool", scope, depth), self.expression("bool", scope, depth)
        if form == "logic":
            return f"(({first}) {self.pick('and', 'or')} ({second}))"
        if form == "not":
            return f"(not ({first}))"
        if form == "equal":
            return f"(({first}) {self.pick('==', '!=')} ({second}))"
        if form == "cond":
            return f"({first} if {self.leaf('bool', scope)} else {second})"
        if form == "quantifier":
            return self.reduction(("any", "all"), "bool", scope, min(depth, 1))
        if form == "guarded":
            at = self.leaf("int", scope)
            return f"(0 <= {at} < N and q[{at}] > 0)"
        return self.leaf("bool", scope)

    # Equations

    def equation(self, name: str) -> list[str]:
        axes = self.shuffled(BOUND, self.choose(4))
        kind = self.pick("real", "real", "real", "exact", "int", "int", "bool")
        body = self.expression(kind, axes, 1 + self.choose(4))
        self.defined[name] = (axes, kind)
        return [f"{name}[{','.join(axes)}] = {body}" if axes else f"{name} = {body}"]

    def recurrence(self, name: str) -> list[str]:
        forward = self.maybe()
        edge, before = ("-1", "t-1") if forward else ("T", "t+1")
        new = self.expression("exact", "td", 1)
        start = self.expression("exact", "d", 1)
        form = self.pick("plain", "mixed", "group")
        lines = [f"{name}[{edge},d] = {start}"]
        if form == "plain":
            lines.append(f"{name}[t,d] = 0.5 * {name}[{before},d] + {new}")
        elif form == "mixed":
            lines.append(f"{name}[t,d] = sum[f]({name}[{before},f] * (0.25 if f <= d else 0.5)) + {new}")
        else:
            lines += [f"{name}h[{edge}] = 1", f"{name}[t,d] = tanh({name}[{before},d]) * {name}h[{before}] + {new}"]
            lines.append(f"{name}h[t] = 0.5 * {name}h[{before}] + max[d]({name}[t,d] if {name}[t,d] > -4 else 0)")
            self.defined[f"{name}h"] = ("t", "real")
        lines.append(
            f"{name}o[t,d] = {name}[{before},d] + {name}[{'T - 1' if forward else '0' if self.maybe() else 'T'},d]"
            if forward
            else f"{name}o[t,d] = {name}[{before},d] + {name}[T,d]"
        )
        self.defined[name] = ("td", "real")
        self.defined[f"{name}o"] = ("td", "real")
        return lines


@st.composite
def samples(draw: Any, largest: int = 3) -> Sample:
    """Programs of one to three equations or recurrences at sizes from 0 to `largest`; Hypothesis can shrink them."""
    return make_sample(lambda count: int(draw(st.integers(0, count - 1))), largest)


@st.composite
def wild_samples(draw: Any, largest: int = 3) -> Sample:
    """Like `samples`, from one seed: evenly mixed and richer programs, which do not shrink."""
    return make_sample(random.Random(draw(st.integers(0, 2**64 - 1))).randrange, largest)


def make_sample(choose: Callable[[int], int], largest: int = 3) -> Sample:
    """A sample in which `choose(n)` makes every choice among n."""
    sizes = {name: choose(largest + 1) for name in ("N", "M", "D", "T")} | {"B": 1 + choose(2)}
    builder = Builder(choose)
    lines: list[str] = []
    for position in range(1 + choose(3)):
        lines += builder.recurrence(f"S{position}") if choose(4) == 0 else builder.equation(f"A{position}")
    outputs = {
        name: OutputDecl(name, tuple(builder.shuffled(axes, len(axes)))) for name, (axes, _) in builder.defined.items()
    }
    declarations = Declarations(
        sizes={name: SizeDecl(name) for name in sizes},
        indices={name: parse_node(size) for name, size in INDEX_SIZES.items()},
        inputs=INPUTS,
        options=OPTIONS,
        outputs=outputs,
        batch=("b",),
    )
    values: dict[str, tuple[Any, ...]] = {
        "c": (0, 1, 2, 3), "s": (0.5, 2.0), "flag": (False, True), "mode": ("low", "high"), "lim": (0, 1, 2),
    }  # fmt: skip
    options = {name: builder.pick(*choices) for name, choices in values.items() if builder.maybe()}
    inputs = make_inputs(sizes, choose(2**32), builder.maybe(), builder.maybe())
    return Sample("\n".join(lines), declarations, inputs, options, sizes)


def make_inputs(sizes: dict[str, int], seed: int, optional: bool, broadcast: bool) -> dict[str, Any]:
    """Random inputs: reals are multiples of 1/2 with many ties, `v` holds -inf, `u` NaN and infinities."""
    generator = np.random.default_rng(seed)
    inputs: dict[str, Any] = {}
    lengths = {index: sizes[size] for index, size in INDEX_SIZES.items() if size in sizes}
    for name, decl in INPUTS.items():
        if decl.optional and not optional:
            continue
        axes = (*decl.batch, *decl.axes)
        shape = [1 if broadcast and axis in decl.broadcast else lengths[axis] for axis in axes]
        if decl.kind == "bool":
            inputs[name] = generator.random(shape) < 0.6
        elif decl.kind == "int":
            inputs[name] = generator.integers(-1, max(sizes["N"], sizes["M"]) + 1, shape)
        else:
            inputs[name] = generator.integers(-4, 5, shape) / 2
    inputs["v"] = np.where(generator.random(inputs["v"].shape) < 0.4, -INF, inputs["v"])
    special = generator.choice([NAN, INF, -INF], inputs["u"].shape)
    inputs["ok"] = generator.random(inputs["u"].shape) < 0.6
    inputs["u"] = np.where(inputs["ok"], inputs["u"], special)
    return inputs
