"""Laws: what must hold between two calls of a mechanism, stated in the equation language and checked for anyone.

An invariant, an identity or a claim is data in the mechanism's file:

    [[identity]]
    name = "gqa_is_mha_with_repeated_heads"
    statement = "grouped heads equal multi-head attention over repeated keys and values"
    other_sizes = { Hk = "H" }
    other = '''
    K_[g,j,d] = K[g // G,j,d]
    V_[g,j,e] = V[g // G,j,e]
    '''
    equal = "O[h,i,e] = O_[h,i,e]"

With `mechanism = "other"` the second call is one of another mechanism: `other` then defines each of its inputs in this
file's indices, `other_options` are its options, and its outputs carry the trailing underscore (`spec/foreign.py`).

The first call gets drawn inputs. The second call gets the same, changed by the equations in `other` (a name with a
trailing underscore belongs to the second call), `other_options` and `other_sizes`. Then `equal` states outputs of the
first call through those of the second, and `holds` states conditions that are true everywhere. Gradients are at hand
as `dQ`, `dK`, …, cotangents as `dO`, `dLSE`, when the law names `cotangents`; the definitions of the equations
(`P`, `keep`, …) are always those of the first call.

Used by the property tests for the spec itself, the reference and every implementation, and by the proofs with SymPy.
A law that refers to something unknown is refused when it is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from attnspec.spec import foreign
from attnspec.spec.language import (
    Declarations,
    InputDecl,
    OutputDecl,
    Program,
    SizeDecl,
    SpecError,
    children,
    evaluate,
    read,
    read_expression,
    rebuild,
)
from attnspec.spec.language.syntax import Kind, Name, Node

if TYPE_CHECKING:
    from attnspec.spec.mechanism import Mechanism

Evaluator = Callable[..., dict[str, Any]]
"""`evaluate` or `sympy_evaluate`."""


@dataclass(frozen=True)
class Draw:
    """An extra drawn quantity of a law, such as a permutation: its axes and where its values come from."""

    name: str
    axes: tuple[str, ...]
    values: str
    batch: bool = False


@dataclass(frozen=True)
class Law:
    """One invariant, identity or claim. Texts are equations; see the module's header for their meaning."""

    kind: str
    name: str
    statement: str
    given: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)
    indices: Mapping[str, str] = field(default_factory=dict)
    where: str = ""
    cotangents: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    draws: tuple[Draw, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)
    other: str = ""
    mechanism: str = ""
    without: tuple[str, ...] = ()
    other_options: Mapping[str, Any] = field(default_factory=dict)
    other_sizes: Mapping[str, str] = field(default_factory=dict)
    equal: str = ""
    holds: str = ""
    exact: bool = False
    prove: bool = False
    tiny: Mapping[str, int] = field(default_factory=dict)
    refuted: str = ""
    breaks: tuple[tuple[str, str], ...] = ()
    source: str = ""

    @property
    def two_calls(self) -> bool:
        return bool(self.other or self.other_options or self.other_sizes or self.without or self.mechanism)

    def speaks_of(self, output: str) -> bool:
        """Whether the law states something about an output of this name, or weighs it with a cotangent."""
        return output in self.cotangents or _mentions(f"{self.equal}\n{self.holds}", output)


def laws(mechanism: Mechanism) -> list[Law]:
    """All laws that the mechanism's file states.

    Raises:
        SpecError: an entry has an unknown key, or neither `equal` nor `holds`.
    """
    found = []
    for kind, entries in (
        ("invariant", mechanism.invariants),
        ("identity", mechanism.identities),
        ("claim", mechanism.claims),
    ):
        found += [_law(mechanism, kind, entry) for entry in entries]
    names = [law.name for law in found]
    for name in names:
        if names.count(name) > 1:
            raise SpecError(f"two laws are called {name!r}", file=mechanism.name)
    return found


def _law(mechanism: Mechanism, kind: str, entry: Mapping[str, Any]) -> Law:
    known = {f.name for f in dataclasses.fields(Law)} - {"kind", "draws"} | {"draw"}
    stray = sorted(set(entry) - known)
    if stray:
        raise SpecError(f"{kind} {entry.get('name')!r} has the unknown key {stray[0]!r}", file=mechanism.name)
    if not entry.get("equal") and not entry.get("holds"):
        raise SpecError(f"{kind} {entry.get('name')!r} states neither `equal` nor `holds`", file=mechanism.name)
    draws = tuple(
        Draw(name, tuple(d.get("axes", ())), d["values"], d.get("batch", False))
        for name, d in entry.get("draw", {}).items()
    )
    rest = {key: value for key, value in entry.items() if key != "draw"}
    for key in ("given", "without", "absent"):
        rest[key] = tuple(rest.get(key, ()))
        for name in rest[key]:
            if name not in mechanism.inputs:
                raise SpecError(
                    f"{kind} {entry['name']!r}: {key} names the unknown input {name!r}", file=mechanism.name
                )
    rest["cotangents"] = tuple(rest.get("cotangents", ()))
    rest["breaks"] = tuple((b["replace"], b["by"]) for b in rest.get("breaks", ()))
    return Law(kind, draws=draws, **rest)


@dataclass(frozen=True)
class Violation:
    """A law that does not hold: which line, where, and the two values."""

    law: str
    what: str
    index: tuple[int, ...]
    got: float
    want: float

    def __str__(self) -> str:
        return f"{self.law}: {self.what}{list(self.index)} is {self.got!r}, the law says {self.want!r}"


@dataclass(repr=False)
class Trial:
    """A law with its drawn inputs: `inputs` and `options` of the first call, `extra` of the law itself."""

    mechanism: Mechanism
    law: Law
    inputs: dict[str, Any]
    options: dict[str, Any]
    extra: dict[str, Any]
    cotangents: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        given = {**self.inputs, **self.extra}
        shapes = ", ".join(f"{name}{list(np.shape(value))}" for name, value in given.items())
        return f"<Trial of {self.law.name}: {shapes}; options {self.options}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @property
    def target(self) -> Mechanism:
        """The mechanism of the second call."""
        from attnspec.spec.mechanism import load

        return load(self.law.mechanism) if self.law.mechanism else self.mechanism

    def second_call(self, evaluator: Evaluator = evaluate) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs and options of the second call."""
        law, mechanism = self.law, self.mechanism
        if law.mechanism:
            return foreign.second_call(self, evaluator)
        sizes, resolved = mechanism.resolve(self.inputs, self.options)
        free = {name: size for name, size in sizes.items() if mechanism.sizes[name].value is None}
        changed = dict(self.options)
        for name, value in law.other_options.items():
            if value == "null":
                changed.pop(name, None)
            elif isinstance(value, str) and value not in mechanism.options[name].choices:
                changed[name] = self.static(value, free, resolved, evaluator)
            else:
                changed[name] = value
        inputs = {name: value for name, value in self.inputs.items() if name not in law.without}
        if law.other:
            other_sizes = {
                name: int(self.static(text, free, resolved, evaluator)) for name, text in law.other_sizes.items()
            }
            program = self._other_program()
            second = {f"{name}_": size for name, size in {**free, **other_sizes}.items()}
            context = {**self.inputs, **self.extra, **self.definitions(law.other)}
            used = {name: value for name, value in context.items() if _mentions(law.other, name)}
            values = evaluator(program, used, _set(resolved), sizes={**free, **second})
            for name, value in values.items():
                target = name.removesuffix("_")
                decl = mechanism.inputs[target]
                # What the second call's input does not have along the batch is the same for all of it.
                shared = tuple(0 if axis not in decl.batch else slice(None) for axis in mechanism.batch)
                inputs[target] = _cast(value[shared], decl.kind)
        return inputs, changed

    def static(self, text: str, sizes: Mapping[str, int], options: Mapping[str, Any], evaluator: Evaluator) -> Any:
        """The value of an expression in sizes, options and the law's scalar draws."""
        base = self.mechanism.declarations
        scalars = {name: value for name, value in self.extra.items() if np.ndim(value) == 0 and _mentions(text, name)}
        inputs = {draw.name: self._draw_decl(draw, "") for draw in self.law.draws if draw.name in scalars}
        declarations = Declarations(base.sizes, base.indices, inputs, base.options, {"value": OutputDecl("value", ())})
        program = read(f"value = {text}", declarations, file=f"{self.mechanism.name} [{self.law.name}]")
        return evaluator(program, scalars, _set(options), sizes=sizes)["value"].item()

    def _other_program(self) -> Program:
        """The equations of `other`: free indices run over the second call's sizes."""
        mechanism, law = self.mechanism, self.law
        base = mechanism.declarations
        sizes = _doubled_sizes(base)
        # `j` on the left runs over the second call's M; the first call's tensors get their own index of size M.
        program_indices = {name: _rename_sizes(node, base, "_") for name, node in base.indices.items()}
        program_indices |= {f"{name}_first": node for name, node in base.indices.items()}
        for name, text in law.indices.items():
            node = read_expression(text, file=law.name)
            program_indices |= {name: node, f"{name}_first": node}
        names = [*base.inputs, *(draw.name for draw in law.draws), *mechanism.program.definitions]
        mentioned = [name for name in names if _mentions(law.other, name)]
        inputs = {name: self.context_decl(name, "_first") for name in mentioned}
        names = [line.split("[")[0].split("=")[0].strip() for line in _lines(law.other)]
        outputs = {}
        for name in names:
            target = name.removesuffix("_")
            if not name.endswith("_") or target not in mechanism.inputs:
                raise SpecError(
                    f"law {law.name!r}: `other` defines {name!r}; expected an input's name with a trailing underscore",
                    file=mechanism.name,
                )
            outputs[name] = OutputDecl(name, mechanism.inputs[target].axes)
        declarations = Declarations(sizes, program_indices, inputs, base.options, outputs, base.batch)
        return read(law.other, declarations, file=f"{mechanism.name} [{law.name}.other]")

    def definitions(self, text: str) -> dict[str, Any]:
        """The first call's tensors, from the equations, that `text` mentions; outputs excepted."""
        wanted = [
            name
            for name in self.mechanism.program.definitions
            if name not in self.mechanism.outputs and _mentions(text, name)
        ]
        return self.mechanism.evaluate(self.inputs, self.options, outputs=wanted) if wanted else {}

    def _draw_decl(self, draw: Draw, suffix: str) -> InputDecl:
        kind: Kind = "int" if draw.values.startswith(("permutation", "integer")) else "real"
        batch = self.mechanism.batch if draw.batch else ()
        return InputDecl(draw.name, tuple(f"{a}{suffix}" for a in draw.axes), batch=batch, kind=kind)

    def verdict(
        self,
        first: Mapping[str, Any],
        second: Mapping[str, Any] | None,
        *,
        other_inputs: Mapping[str, Any] | None = None,
        gradients: Mapping[str, Any] | None = None,
        other_gradients: Mapping[str, Any] | None = None,
        tolerance: float,
    ) -> Violation | None:
        """Compare what the law says with what came.

        Args:
            first, second: outputs of the two calls, `gradients` and `other_gradients` theirs where the law needs them.
            tolerance: allowed difference relative to 1 + the largest finite magnitude of the tensor.
        """
        context = self.context(first, second, other_inputs, gradients, other_gradients)
        violation = self._equal(context, tolerance) if self.law.equal else None
        if violation is None and self.law.holds:
            violation = self._holds(context, tolerance)
        return violation

    def context(
        self,
        first: Mapping[str, Any],
        second: Mapping[str, Any] | None = None,
        other_inputs: Mapping[str, Any] | None = None,
        gradients: Mapping[str, Any] | None = None,
        other_gradients: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Every tensor that the law's equations may mention, by the name that they use."""
        law = self.law
        context: dict[str, Any] = {**self.inputs, **self.extra, **first}
        context |= self.definitions(law.equal + "\n" + law.holds)
        context |= {f"{name}_": value for name, value in (other_inputs or {}).items()}
        context |= {f"{name}_": value for name, value in (second or {}).items()}
        context |= {f"d{name}": value for name, value in self.cotangents.items()}
        context |= {f"d{name}": value for name, value in (gradients or {}).items()}
        context |= {f"d{name}_": value for name, value in (other_gradients or {}).items()}
        return context

    def wanted(self, context: Mapping[str, Any], evaluator: Evaluator = evaluate) -> dict[str, Any]:
        """What the law's `equal` lines say that each named tensor is, from the other tensors in `context`."""
        lines = []
        for line in _lines(self.law.equal):
            head, _, body = line.partition("=")
            lines.append(f"want_{head.strip()} = {body.strip()}")
        values = self._context_values("\n".join(lines), context, evaluator)
        return {name.removeprefix("want_"): value for name, value in values.items()}

    def _equal(self, context: Mapping[str, Any], tolerance: float) -> Violation | None:
        for name, want in self.wanted(context).items():
            have = np.asarray(context[name], dtype=float)
            want = np.broadcast_to(np.asarray(want, dtype=float), have.shape)
            violation = compare(self.law.name, name, have, want, 0.0 if self.law.exact else tolerance)
            if violation is not None:
                return violation
        return None

    def _holds(self, context: Mapping[str, Any], tolerance: float) -> Violation | None:
        values = self._context_values(self.law.holds, {**context, "tol": np.asarray(tolerance)}, evaluate)
        for name, value in values.items():
            value = np.asarray(value, dtype=bool)
            if not value.all():
                index = tuple(int(k) for k in np.argwhere(~value)[0])
                return Violation(self.law.name, name, index, 0.0, 1.0)
        return None

    def _context_values(self, text: str, context: Mapping[str, Any], evaluator: Evaluator) -> dict[str, Any]:
        mechanism = self.mechanism
        base = mechanism.declarations
        sizes = _doubled_sizes(base)
        indices = dict(base.indices)
        indices |= {f"{name}_second": _rename_sizes(node, base, "_") for name, node in base.indices.items()}
        indices |= {name: read_expression(size, file=self.law.name) for name, size in self.law.indices.items()}
        used = {name: value for name, value in context.items() if _mentions(text, name)}
        inputs = {name: self.context_decl(name) for name in used if not foreign.is_output(self, name)}
        for name in set(used) - set(inputs):
            inputs[name] = foreign.output_decl(self, name, used[name], indices)
        outputs = {}
        for line in _lines(text):
            head = line.partition("=")[0]
            name, _, axes = head.strip().partition("[")
            outputs[name.strip()] = OutputDecl(
                name.strip(), tuple(a.strip() for a in axes.rstrip("] ").split(",") if a.strip())
            )
        declarations = Declarations(sizes, indices, inputs, base.options, outputs, base.batch)
        program = read(text, declarations, file=f"{mechanism.name} [{self.law.name}]")
        first_sizes, resolved = mechanism.resolve(self.inputs, self.options)
        known = {**first_sizes, **self._second_sizes(context)}
        return evaluator(program, used, _set(resolved), sizes=known, outputs=list(outputs))

    def _second_sizes(self, context: Mapping[str, Any]) -> dict[str, int]:
        """Sizes of the second call, `M_` and so on, as far as its inputs tell: an output alone need not."""
        mechanism = self.mechanism
        given = {name: context[f"{name}_"] for name in mechanism.inputs if f"{name}_" in context}
        if self.law.mechanism or not given:
            return {}
        try:
            sizes, _ = mechanism.resolve(given)
        except SpecError:  # the second call's options, unknown here, may be what the constraints ask for
            return {}
        return {f"{name}_": size for name, size in sizes.items()}

    def context_decl(self, name: str, first_suffix: str = "") -> InputDecl:
        """Declaration of a tensor that a law's equations mention, with its axes over the right call's sizes."""
        mechanism = self.mechanism
        if name == "tol":
            return InputDecl("tol", ())
        for draw in self.law.draws:
            if draw.name == name:
                return self._draw_decl(draw, first_suffix)
        second = name.endswith("_")
        plain = name.removesuffix("_")
        suffix = "_second" if second else first_suffix
        broadcast: tuple[str, ...] = ()
        kind: Kind
        if plain in mechanism.inputs:
            decl = mechanism.inputs[plain]
            axes, batch, broadcast, kind = decl.axes, decl.batch, decl.broadcast, decl.kind
        elif plain in mechanism.outputs:
            axes, batch, kind = mechanism.outputs[plain].axes, mechanism.batch, "real"
        elif plain[:1] == "d" and plain[1:] in mechanism.outputs:
            axes, batch, kind = mechanism.outputs[plain[1:]].axes, mechanism.batch, "real"
        elif plain[:1] == "d" and plain[1:] in mechanism.inputs:
            decl = mechanism.inputs[plain[1:]]
            axes, batch, broadcast, kind = decl.axes, decl.batch, decl.broadcast, "real"
        elif plain in mechanism.program.definitions and not second:
            definition = mechanism.program.definitions[plain]
            axes = tuple(s.id for s in definition.subscripts if isinstance(s, Name))
            batch, kind = mechanism.batch, mechanism.program.kinds[plain]
        else:
            raise SpecError(f"law {self.law.name!r} refers to {name!r}, which is unknown there", file=mechanism.name)
        return InputDecl(
            name,
            tuple(f"{axis}{suffix}" for axis in axes),
            batch=batch,
            kind=kind,
            broadcast=tuple(f"{axis}{suffix}" if axis in axes else axis for axis in broadcast),
        )


def compare(law: str, what: str, got: Any, want: Any, tolerance: float) -> Violation | None:
    """None when equal within `tolerance` relative to 1 + the largest finite magnitude; infinities must match."""
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    finite = np.isfinite(want) & np.isfinite(got)
    span = 1.0 + float(np.max(np.abs(want), initial=0.0, where=finite))
    with np.errstate(invalid="ignore"):
        close = finite & (np.abs(got - want) <= tolerance * span)
    bad = ~(same | close)
    if not bad.any():
        return None
    with np.errstate(invalid="ignore"):
        gap = np.where(bad, np.where(finite, np.abs(got - want), np.inf), -1.0)
    index = tuple(int(k) for k in np.unravel_index(int(np.argmax(gap)), gap.shape))
    return Violation(law, what, index, float(got[index]), float(want[index]))


def _lines(text: str) -> list[str]:
    stripped = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in stripped if line]


def _mentions(text: str, name: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])", text) is not None


def _set(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _cast(value: Any, kind: str) -> Any:
    if np.asarray(value).dtype.kind == "O":  # symbols
        return value
    return np.asarray(value).astype({"real": np.float64, "int": np.int64, "bool": bool}[kind])


def _doubled_sizes(base: Declarations) -> dict[str, SizeDecl]:
    """Sizes `M` of the first call and `M_` of the second."""
    sizes = dict(base.sizes)
    for name, decl in base.sizes.items():
        value = _rename_sizes(decl.value, base, "_") if decl.value is not None else None
        sizes[f"{name}_"] = SizeDecl(f"{name}_", decl.minimum, value)
    return sizes


def _rename_sizes(node: Node, base: Declarations, suffix: str) -> Node:
    """The expression with every size name suffixed."""
    if isinstance(node, Name):
        return dataclasses.replace(node, id=node.id + suffix) if node.id in base.sizes else node
    return rebuild(node, tuple(_rename_sizes(child, base, suffix) for child in children(node)))


__all__ = ["Draw", "Law", "Trial", "Violation", "compare", "laws"]
