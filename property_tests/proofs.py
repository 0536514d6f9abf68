"""Proofs: a law that asks for one is shown for all real values of its inputs at one tiny size, with SymPy.

Inputs become symbols, both calls are evaluated symbolically, and the two sides of every `equal` line are proved equal.
Sizes stay tiny, so this proves the algebra (which no sampling can) and leaves the sizes to the sampled tests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sympy

from attnspec.conformance.shapes import derived
from attnspec.property_tests.draw import shape_of, size_of
from attnspec.spec.language.prove import Counterexample, prove_equal
from attnspec.spec.language.symbolic import sympy_evaluate
from attnspec.spec.laws import Draw, Law, Trial
from attnspec.spec.mechanism import Mechanism

TINY = {"H": 2, "N": 2, "M": 2}


def symbolic_trial(mechanism: Mechanism, law: Law) -> Trial:
    """The law with symbols for reals, masks that drop one pair, and the first of each option's choices."""
    sizes = {name: TINY.get(name, 1) for name, size in mechanism.sizes.items() if size.value is None}
    sizes |= {name: low for name, (low, _) in law.sizes.items()} | dict(law.tiny)
    sizes = derived(mechanism, sizes)
    options: dict[str, Any] = {}
    for name, choices in law.options.items():
        value = choices[0] if isinstance(choices, list) else choices
        if value != "null":
            options[name] = value
    if "scale" in mechanism.options:
        options.setdefault("scale", 0.5)  # a rational, so that the proof stays exact
    present = [name for name, decl in mechanism.inputs.items() if not decl.optional]
    present += [name for name in mechanism.usual if name not in law.absent]
    present += [name for name in law.given if name not in present]
    inputs = {}
    for name in present:
        decl = mechanism.inputs[name]
        shape = tuple(size_of(mechanism, axis, sizes) for axis in (*decl.batch, *decl.axes))
        inputs[name] = _symbols(name, shape, decl.kind, law.values.get(name, "normal"))
    lengths = {**sizes, **mechanism.resolve(inputs, options)[0]}
    extra = {draw.name: _extra(mechanism, law, draw, lengths) for draw in law.draws}
    return Trial(mechanism, law, inputs, options, extra)


def prove(mechanism: Mechanism, law: Law) -> bool | Counterexample:
    """Prove the law's `equal` lines; a counterexample with numbers when one is false."""
    trial = symbolic_trial(mechanism, law)

    def call(mechanism: Mechanism, inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        # An option may be a symbol here; those fix no sizes.
        plain = {name: value for name, value in options.items() if isinstance(value, (bool, int, float, str))}
        sizes, _ = mechanism.resolve(inputs, plain)
        return sympy_evaluate(mechanism.program, inputs, options, sizes=sizes, outputs=list(mechanism.outputs))

    first = call(mechanism, trial.inputs, trial.options)
    second, other_inputs = None, None
    if law.two_calls:
        other_inputs, other_options = trial.second_call(sympy_evaluate)
        second = call(trial.target, other_inputs, other_options)
    context = trial.context(first, second, other_inputs)
    wanted = trial.wanted(context, sympy_evaluate)
    return prove_equal({name: context[name] for name in wanted}, wanted)


def _symbols(name: str, shape: tuple[int, ...], kind: str, values: str) -> Any:
    if kind == "bool":
        kept = np.ones(shape, dtype=bool)
        kept.flat[-1:] = kept.size == 1
        return kept
    out = np.empty(shape, dtype=object)
    for place in np.ndindex(*shape):
        label = "_".join([name, *map(str, place)])
        positive = True if values == "positive" else None
        out[place] = sympy.Integer(0) if values == "zero" else sympy.Symbol(label, real=True, positive=positive)
    return out


def _extra(mechanism: Mechanism, law: Law, draw: Draw, sizes: dict[str, int]) -> Any:
    if draw.values.startswith("integer:"):
        return np.asarray(1)
    shape = shape_of(mechanism, law, draw, sizes)
    if draw.values == "permutation":
        return np.arange(shape[0])[::-1].copy()
    return _symbols(draw.name, shape, "real", draw.values)
