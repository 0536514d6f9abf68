"""A mechanism: its file, read, validated and ready to evaluate.

`load` is the way in. A `Mechanism` holds the declarations and the checked programs (forward, gradient, other forms)
and evaluates them; everything that judges, renders or costs a mechanism starts from here. It refuses files that do
not follow `schema/mechanism.schema.json`, inputs that break a constraint, and options of the wrong type.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping, Sequence
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
    resolve_options,
    static_value,
)
from attnspec.spec.language.syntax import Node
from attnspec.spec.mechanism_file import Constraint, Rounding, StatedCase, parts

ROOT = Path(__file__).parent / "mechanisms"


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
    form_gradients: Mapping[str, Program]
    form_docs: Mapping[str, str]
    form_gradient_texts: Mapping[str, str]
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
    equivalent_mutants: Mapping[str, str]
    cases: tuple[StatedCase, ...]
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
        form: str | None = None,
    ) -> dict[str, Any]:
        """Vector-Jacobian product: gradients of `sum_o <cotangent_o, output_o>`.

        Args:
            cotangents: arrays by output name (`"O"`, `"LSE"`), each of the output's shape; absent ones are zero.
            wrt: input names; all differentiable inputs that are given by default.
            method: "equations" evaluates the file's backward equations, "autograd" differentiates the forward
                equations with torch float64.
            form: with the definitions that this form states for the gradients; the equations' own by default.

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
        program, arguments, outputs = self.gradient_call(inputs, cotangents, names, form)
        for name, decl in program.declarations.inputs.items():
            if decl.role == "cotangent" and not decl.optional and name not in arguments:
                axes = (*decl.batch, *decl.axes)
                lengths = [static_value(self.indices[axis], sizes=sizes, options=resolved) for axis in axes]
                arguments[name] = np.zeros([int(length or 0) for length in lengths])
        got = evaluate(program, arguments, resolved, sizes=sizes, outputs=outputs, rows=rows, arithmetic=arithmetic)
        return {self.gradient_of[out]: self.collapse(self.gradient_of[out], got[out], inputs) for out in outputs}

    def gradient_call(
        self, inputs: Mapping[str, Any], cotangents: Mapping[str, Any], wrt: Sequence[str], form: str | None = None
    ) -> tuple[Program, dict[str, Any], list[str]]:
        """The gradient program (of a form, where that states one) with its arguments and the definitions that hold the
        gradients of `wrt`.
        """
        if self.gradient is None:
            raise SpecError("this mechanism states no backward equations", file=self.name)
        if form is not None:
            self._form(form)
        arguments = dict(inputs) | {f"d{name}": value for name, value in cotangents.items()}
        outputs = [out for out, source in self.gradient_of.items() if source in wrt]
        return self.form_gradients.get(form or "", self.gradient), arguments, outputs

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
    return Mechanism(**parts(raw, path), path=path)


