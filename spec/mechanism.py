"""A mechanism: its file, read, validated and ready to evaluate.

`load` is the way in. A `Mechanism` holds the declarations and the checked programs (forward, gradient, other forms)
and evaluates them; everything that judges, renders or costs a mechanism starts from here. It refuses files that do
not follow `schema/mechanism.schema.json`, inputs that break a constraint, and options of the wrong type.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from attnspec.spec.domains import domain
from attnspec.spec.language import (
    EXACT,
    Arithmetic,
    Declarations,
    EvaluationError,
    InputDecl,
    OptionDecl,
    OutputDecl,
    Program,
    SizeDecl,
    SpecError,
    evaluate,
    infer_sizes,
    read,
    read_expression,
    resolve_options,
    static_value,
)
from attnspec.spec.language.syntax import Node

ROOT = Path(__file__).parent / "mechanisms"
SCHEMA = Path(__file__).parent / "schema" / "mechanism.schema.json"


@dataclass(frozen=True)
class Rounding:
    """A rounding model: the tensors that an honest implementation may round to the input's dtype.

    `stored` are definitions of the forward equations, `gradient_stored` those of the backward equations.
    """

    name: str
    stored: frozenset[str]
    gradient_stored: frozenset[str]
    doc: str = ""


@dataclass(frozen=True)
class Constraint:
    """A static condition on sizes, options and the presence of inputs, with the sentence that a user reads."""

    rule: Node
    message: str


@dataclass(frozen=True, repr=False)
class Mechanism:
    """One attention mechanism as its file states it."""

    name: str
    family: str
    summary: str
    paper: Mapping[str, Any]
    declarations: Declarations
    program: Program
    gradient: Program | None
    gradient_of: Mapping[str, str]
    forms: Mapping[str, Program]
    roundings: Mapping[str, Rounding]
    default_rounding: str
    constraints: tuple[Constraint, ...]
    otherwise: Mapping[str, Node]
    usual: tuple[str, ...]
    probe: Mapping[str, Node]
    invariants: tuple[Mapping[str, Any], ...]
    identities: tuple[Mapping[str, Any], ...]
    claims: tuple[Mapping[str, Any], ...]
    evidence: tuple[Mapping[str, Any], ...]
    equivalent_mutants: tuple[Mapping[str, Any], ...]
    cost: Mapping[str, str]
    path: Path

    def __repr__(self) -> str:
        return f"<Mechanism {self.name}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @property
    def sizes(self) -> Mapping[str, SizeDecl]:
        return self.declarations.sizes

    @property
    def indices(self) -> Mapping[str, Node]:
        return self.declarations.indices

    @property
    def inputs(self) -> Mapping[str, InputDecl]:
        return self.declarations.inputs

    @property
    def options(self) -> Mapping[str, OptionDecl]:
        return self.declarations.options

    @property
    def outputs(self) -> Mapping[str, OutputDecl]:
        return self.declarations.outputs

    @property
    def batch(self) -> tuple[str, ...]:
        return self.declarations.batch

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Names of the inputs that have a gradient, in the file's order."""
        return tuple(name for name, decl in self.inputs.items() if decl.differentiable)

    def resolve(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, int], dict[str, Any]]:
        """Sizes from the inputs' shapes, and the options with their defaults.

        Raises:
            SpecError: an unknown, missing or ill-typed argument, shapes that contradict each other, or a constraint
                that does not hold; the message names the argument.
        """
        try:
            return self._resolve(inputs, dict(options or {}))
        except EvaluationError as error:
            raise EvaluationError(error.message, file=self.name) from None

    def _resolve(self, inputs: Mapping[str, Any], options: dict[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
        sizes = infer_sizes(self.declarations, inputs)
        present = frozenset(inputs)
        for name, fallback in self.otherwise.items():
            if name not in sizes:
                value = static_value(fallback, sizes=sizes, options=options, present=present)
                if value is not None:
                    sizes[name] = int(value)
        resolved = resolve_options(self.declarations, options, sizes)
        self._check_domains(inputs, sizes)
        given = present | {name for name, value in resolved.items() if value is not None}
        for constraint in self.constraints:
            holds = static_value(constraint.rule, sizes=sizes, options=resolved, present=given)
            if holds is False:
                shapes = ", ".join(f"{name}{tuple(getattr(a, 'shape', ()))}" for name, a in inputs.items())
                raise EvaluationError(f"{constraint.message}; got {shapes or 'no inputs'}")
        return sizes, resolved

    def _check_domains(self, inputs: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        for name, value in inputs.items():
            found = domain(self.inputs[name])
            if found is not None:
                found.check(name, value, sizes)

    def evaluate(
        self,
        inputs: Mapping[str, Any],
        options: Mapping[str, Any] | None = None,
        *,
        outputs: Sequence[str] | None = None,
        rows: Mapping[str, Sequence[int]] | None = None,
        xp: ModuleType | None = None,
        arithmetic: Arithmetic = EXACT,
        form: str | None = None,
        intermediates: bool = False,
    ) -> dict[str, Any]:
        """Evaluate the equations.

        Args:
            inputs: arrays by name, shape `[*batch, *axes]` of the declaration; float64 unless `xp` says otherwise.
            options: option values by name; the others take their defaults.
            outputs: which outputs (or any definitions) to compute; all outputs by default.
            rows: `{index: values}`: compute only these values of an output index.
            form: the name of another stated form; the equations themselves by default.

        Returns:
            Arrays by name, shape `[*batch, *axes]`; a restricted axis has the length of its list.

        Raises:
            SpecError: bad arguments (the message names them) or an element outside its tensor.
        """
        program = self.program if form is None else self._form(form)
        sizes, resolved = self.resolve(inputs, options)
        return evaluate(
            program, inputs, resolved, sizes=sizes, outputs=outputs, rows=rows, xp=xp,
            arithmetic=arithmetic, intermediates=intermediates,
        )  # fmt: skip

    def gradients(
        self,
        inputs: Mapping[str, Any],
        options: Mapping[str, Any] | None,
        cotangents: Mapping[str, Any],
        *,
        wrt: Sequence[str] | None = None,
        rows: Mapping[str, Sequence[int]] | None = None,
        method: str = "equations",
        arithmetic: Arithmetic = EXACT,
    ) -> dict[str, Any]:
        """Vector-Jacobian product: gradients of `sum_o <cotangent_o, output_o>`.

        Args:
            cotangents: arrays by output name (`"O"`, `"LSE"`), each of the output's shape; absent ones are zero.
            wrt: input names; all differentiable inputs that are given by default.
            method: "equations" evaluates the file's backward equations, "autograd" differentiates the forward
                equations with torch float64.

        Returns:
            Gradients by input name, each of the input's shape.
        """
        names = self._wrt(inputs, wrt)
        self._check_cotangents(cotangents)
        if method == "autograd":
            return self._autograd(inputs, options, cotangents, names)
        if method != "equations":
            raise SpecError(f"method must be 'equations' or 'autograd', got {method!r}", file=self.name)
        if self.gradient is None:
            raise SpecError("this mechanism states no backward equations; use method='autograd'", file=self.name)
        sizes, resolved = self.resolve(inputs, options)
        program, arguments, outputs = self.gradient_call(inputs, cotangents, names)
        for name, decl in program.declarations.inputs.items():
            if decl.role == "cotangent" and not decl.optional and name not in arguments:
                axes = (*decl.batch, *decl.axes)
                lengths = [static_value(self.indices[axis], sizes=sizes, options=resolved) for axis in axes]
                arguments[name] = np.zeros([int(length or 0) for length in lengths])
        got = evaluate(program, arguments, resolved, sizes=sizes, outputs=outputs, rows=rows, arithmetic=arithmetic)
        return {self.gradient_of[out]: self.collapse(self.gradient_of[out], got[out], inputs) for out in outputs}

    def gradient_call(
        self, inputs: Mapping[str, Any], cotangents: Mapping[str, Any], wrt: Sequence[str]
    ) -> tuple[Program, dict[str, Any], list[str]]:
        """The gradient program with its arguments and the definitions that hold the gradients of `wrt`."""
        if self.gradient is None:
            raise SpecError("this mechanism states no backward equations", file=self.name)
        arguments = dict(inputs) | {f"d{name}": value for name, value in cotangents.items()}
        outputs = [out for out, source in self.gradient_of.items() if source in wrt]
        return self.gradient, arguments, outputs

    def collapse(self, name: str, gradient: Any, inputs: Mapping[str, Any]) -> Any:
        """Sum a full gradient `[..., *batch, *axes]` over the axes along which input `name` was broadcast."""
        shape = tuple(inputs[name].shape)
        decl = self.inputs[name]
        extra = gradient.ndim - len(self.batch) - len(decl.axes)
        lead = [axis for axis, index in enumerate(self.batch) if index not in decl.batch]
        full = [extra + axis for axis in lead]
        if full:
            gradient = gradient.sum(tuple(full))
        summed = [
            extra + axis for axis, length in enumerate(shape) if length == 1 and gradient.shape[extra + axis] != 1
        ]
        for axis in summed:
            gradient = gradient.sum(axis, keepdims=True)
        return gradient

    def _wrt(self, inputs: Mapping[str, Any], wrt: Sequence[str] | None) -> list[str]:
        if wrt is None:
            return [name for name in self.differentiable if name in inputs]
        for name in wrt:
            if name not in self.inputs or not self.inputs[name].differentiable:
                choices = ", ".join(self.differentiable)
                raise SpecError(f"wrt names {name!r}, which has no gradient; those with one: {choices}", file=self.name)
            if name not in inputs:
                raise SpecError(f"wrt names {name!r}, which is not among the inputs given", file=self.name)
        return list(wrt)

    def _check_cotangents(self, cotangents: Mapping[str, Any]) -> None:
        unknown = sorted(set(cotangents) - set(self.outputs))
        if unknown:
            outputs = ", ".join(self.outputs)
            raise SpecError(f"cotangents name {unknown[0]!r}; the outputs are {outputs}", file=self.name)
        if not cotangents:
            raise SpecError("cotangents are empty: give one for at least one output", file=self.name)

    def _autograd(
        self,
        inputs: Mapping[str, Any],
        options: Mapping[str, Any] | None,
        cotangents: Mapping[str, Any],
        names: Sequence[str],
    ) -> dict[str, Any]:
        import numpy as np
        import torch

        tensors: dict[str, Any] = {}
        for name, value in inputs.items():
            tensor = torch.as_tensor(np.asarray(value)) if not isinstance(value, torch.Tensor) else value
            tensor = tensor.detach().to(torch.float64) if self.inputs[name].kind == "real" else tensor
            tensors[name] = tensor.clone().requires_grad_(name in names)
        results = self.evaluate(tensors, options, outputs=list(cotangents), xp=torch)
        total = torch.zeros((), dtype=torch.float64)
        for name, cotangent in cotangents.items():
            weight = torch.as_tensor(np.asarray(cotangent), dtype=torch.float64)
            value = results[name]
            # -inf entries (the LSE of an empty row) are constants: a zero cotangent times -inf must not become NaN.
            total = total + (torch.where(torch.isfinite(value), value, 0.0) * weight).sum()
        leaves = [tensors[name] for name in names]
        # Without tokens an output may depend on no input at all.
        grads = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
        return {
            name: (torch.zeros_like(leaf) if grad is None else grad).detach().numpy()
            for name, leaf, grad in zip(names, leaves, grads, strict=True)
        }

    def _form(self, form: str) -> Program:
        if form not in self.forms:
            known = ", ".join(self.forms) or "none"
            raise SpecError(f"unknown form {form!r}; stated forms: {known}", file=self.name)
        return self.forms[form]

    def rounding(self, name: str | None = None) -> Rounding:
        """The rounding model `name`, the file's default without one."""
        key = name or self.default_rounding
        if key not in self.roundings:
            known = ", ".join(self.roundings)
            raise SpecError(f"unknown rounding model {key!r}; known: {known}", file=self.name)
        return self.roundings[key]


def mechanisms() -> list[str]:
    """Names of all mechanisms in the package, sorted."""
    return sorted(path.stem for path in ROOT.glob("*/*.toml"))


def load(name: str | Path) -> Mechanism:
    """Load a mechanism by name, or from the path of a TOML file.

    Raises:
        SpecError: no such mechanism, or a malformed file; the message says where and what was expected.
    """
    if isinstance(name, Path) or str(name).endswith(".toml"):
        return _load(Path(name))
    found = {path.stem: path for path in ROOT.glob("*/*.toml")}
    if name not in found:
        known = ", ".join(sorted(found))
        raise SpecError(f"unknown mechanism; known: {known}", file=str(name))
    return _load(found[name])


@functools.cache
def _load(path: Path) -> Mechanism:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError("no such file", file=str(path)) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"not a readable TOML file: {error}", file=path.name) from None
    _validate(raw, path)
    return _build(raw, path)


@functools.cache
def _validator() -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def _validate(raw: Mapping[str, Any], path: Path) -> None:
    errors = sorted(_validator().iter_errors(raw), key=lambda error: [str(part) for part in error.absolute_path])
    if errors:
        place = ".".join(str(part) for part in errors[0].absolute_path) or "top level"
        raise SpecError(f"{place}: {errors[0].message}", file=path.name)
    names = [*raw["sizes"], *raw["indices"], *raw["inputs"], *raw.get("options", {})]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SpecError(f"{twice[0]!r} is declared twice among sizes, indices, inputs and options", file=path.name)


def _build(raw: Mapping[str, Any], path: Path) -> Mechanism:
    file = path.name

    def expression(text: str) -> Node:
        return read_expression(text, file=file)

    sizes = {
        name: SizeDecl(name, entry.get("min", 0), expression(entry["value"]) if "value" in entry else None)
        for name, entry in raw["sizes"].items()
    }
    inputs = {name: _input(name, entry) for name, entry in raw["inputs"].items()}
    options = {name: _option(name, entry, expression) for name, entry in raw.get("options", {}).items()}
    outputs = {
        name: OutputDecl(name, tuple(entry["axes"]), entry.get("doc", "")) for name, entry in raw["outputs"].items()
    }
    declarations = Declarations(
        sizes=sizes,
        indices={name: expression(text) for name, text in raw["indices"].items()},
        inputs=inputs,
        options=options,
        outputs=outputs,
        batch=tuple(raw.get("batch", ())),
    )
    _check_axes(declarations, file)
    macros = raw.get("macros", "")
    program = read(raw["equations"]["text"], declarations, macros=macros, file=file)
    gradient, gradient_of = _gradient(raw, declarations, macros, file)
    forms = {
        form["name"]: read(form["text"], declarations, macros=macros, file=f"{file} [form {form['name']}]")
        for form in raw.get("form", [])
    }
    roundings, default = _roundings(raw, program, gradient, forms, file)
    return Mechanism(
        name=raw["name"],
        family=raw["family"],
        summary=raw["summary"],
        paper=raw["paper"],
        declarations=declarations,
        program=program,
        gradient=gradient,
        gradient_of=gradient_of,
        forms=forms,
        roundings=roundings,
        default_rounding=default,
        constraints=tuple(Constraint(expression(c["rule"]), c["message"]) for c in raw.get("constraint", [])),
        otherwise={
            name: expression(entry["otherwise"]) for name, entry in raw["sizes"].items() if "otherwise" in entry
        },
        probe=_probe(raw, inputs, expression, file),
        usual=tuple(raw.get("usual", ())),
        invariants=tuple(raw.get("invariant", [])),
        identities=tuple(raw.get("identity", [])),
        claims=tuple(raw.get("claim", [])),
        evidence=tuple(raw.get("evidence", [])),
        equivalent_mutants=tuple(raw.get("equivalent_mutant", [])),
        cost=raw.get("cost", {}),
        path=path,
    )


def _input(name: str, entry: Mapping[str, Any]) -> InputDecl:
    return InputDecl(
        name,
        tuple(entry["axes"]),
        batch=tuple(entry.get("batch", ())),
        kind=entry.get("kind", "real"),
        role=entry["role"],
        optional=entry.get("optional", False),
        broadcast=tuple(entry.get("broadcast", ())),
        differentiable=entry.get("differentiable", False),
        domain=entry.get("domain", "normal"),
        doc=entry.get("doc", ""),
    )


def _option(name: str, entry: Mapping[str, Any], expression: Any) -> OptionDecl:
    default = entry.get("default")
    is_formula = isinstance(default, str) and entry["type"] in ("int", "float")
    return OptionDecl(
        name,
        entry["type"],
        default=None if is_formula else default,
        formula=expression(default) if is_formula else None,
        nullable=entry.get("nullable", False),
        choices=tuple(entry.get("choices", ())),
        minimum=entry.get("min"),
        maximum=entry.get("max"),
        doc=entry.get("doc", ""),
    )


def _check_axes(declarations: Declarations, file: str) -> None:
    """Every axis of an input or output must be a declared index."""
    tensors: list[InputDecl | OutputDecl] = [*declarations.inputs.values(), *declarations.outputs.values()]
    for what in tensors:
        batch = what.batch if isinstance(what, InputDecl) else ()
        for axis in (*batch, *what.axes):
            if axis not in declarations.indices:
                raise SpecError(f"{what.name} has the axis {axis!r}, which [indices] does not declare", file=file)
        if isinstance(what, InputDecl) and (stray := set(what.broadcast) - {*what.batch, *what.axes}):
            raise SpecError(f"{what.name} is broadcast over {sorted(stray)[0]!r}, which is no axis of it", file=file)


def _gradient(
    raw: Mapping[str, Any], declarations: Declarations, macros: str, file: str
) -> tuple[Program | None, Mapping[str, str]]:
    """Forward and backward equations as one program whose inputs include the cotangents `d<output>`."""
    if "gradient" not in raw:
        return None, {}
    cotangents = {
        f"d{name}": InputDecl(f"d{name}", out.axes, batch=declarations.batch, role="cotangent", optional=number > 0)
        for number, (name, out) in enumerate(declarations.outputs.items())
    }
    gradient_of = dict(raw["gradient"]["outputs"])
    for out, source in gradient_of.items():
        if source not in declarations.inputs:
            raise SpecError(
                f"gradient.outputs: {out} is said to be the gradient of unknown input {source!r}", file=file
            )
    outputs = {out: OutputDecl(out, declarations.inputs[source].axes) for out, source in gradient_of.items()}
    extended = dataclasses.replace(declarations, inputs={**declarations.inputs, **cotangents}, outputs=outputs)
    text = raw["equations"]["text"].rstrip("\n") + "\n" + raw["gradient"]["text"]
    return read(text, extended, macros=macros, file=file), gradient_of


def _probe(
    raw: Mapping[str, Any], inputs: Mapping[str, InputDecl], expression: Callable[[str], Node], file: str
) -> dict[str, Node]:
    """Constants of the probes, for real inputs only."""
    for name in raw.get("probe", {}):
        if name not in inputs or inputs[name].kind != "real":
            raise SpecError(f"probe names {name!r}, which is no real input", file=file)
    return {name: expression(text) for name, text in raw.get("probe", {}).items()}


def _roundings(
    raw: Mapping[str, Any], program: Program, gradient: Program | None, forms: Mapping[str, Program], file: str
) -> tuple[dict[str, Rounding], str]:
    in_forms = {name for form in forms.values() for name in form.definitions}
    entries = raw.get("rounding") or {"fused": {"default": True, "stored": []}}
    roundings = {}
    for name, entry in entries.items():
        backward = set(gradient.definitions) if gradient else set()
        for key, known in (("stored", {*program.definitions, *in_forms}), ("gradient_stored", backward)):
            stray = sorted(set(entry.get(key, ())) - known)
            if stray:
                raise SpecError(f"rounding.{name}.{key} names {stray[0]!r}, which no equation defines", file=file)
        roundings[name] = Rounding(
            name,
            frozenset(entry["stored"]),
            frozenset(entry.get("gradient_stored", ())),
            entry.get("doc", ""),
        )
    defaults = [name for name, entry in entries.items() if entry.get("default")]
    if len(defaults) != 1:
        raise SpecError(f"exactly one rounding model must be the default, got {defaults}", file=file)
    return roundings, defaults[0]
