"""Named semantics: what libraries disagree on, with legal values, defaults and conversions.

A candidate declares values (`declares = {"causal_alignment": "top_left", "empty_rows": "nan"}`) and is judged by what
it declared. Three kinds of declaration:

- the name of one of the mechanism's options: the candidate's own fixed value of it (`fixed_options`);
- a convention: the same function in other clothes. `to_candidate` converts what the candidate is given,
  `from_candidate` converts back what it returned (mask polarity, window counts, base of the LSE, map of heads);
- a difference: another function, or less of a promise. The oracle and the data take it into account.

`check` refuses unknown names and values, and names that mean nothing for the mechanism.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from attnspec.conformance.types import CaseData
from attnspec.spec.mechanism import Mechanism


class DeclarationError(ValueError):
    """A declaration that is unknown, or that says nothing about this mechanism. One line."""


@dataclass(frozen=True)
class Semantic:
    """One axis of disagreement. `needs` are names (inputs, options, definitions) that must exist in the mechanism."""

    name: str
    values: tuple[str, ...]
    needs: tuple[str, ...]
    doc: str

    @property
    def default(self) -> str:
        return self.values[0]


TABLE: dict[str, Semantic] = {
    entry.name: entry
    for entry in (
        Semantic(
            "empty_rows",
            ("zero", "nan", "mean", "undefined"),
            ("keep",),
            "the output of a query that may attend to nothing: zeros; NaN; the mean of all values (a finite mask "
            "value); or anything (such rows are then not judged)",
        ),
        Semantic(
            "padded_rows",
            ("zero", "undefined"),
            ("real_q",),
            "the output rows of padding queries (beyond q_length, negative segment): zeros, or anything",
        ),
        Semantic("lse_base", ("e", "2"), ("LSE",), "the base of the logarithm in which LSE is returned"),
        Semantic(
            "lse_empty",
            ("-inf", "+inf", "undefined"),
            ("LSE", "keep"),
            "the LSE of a query that may attend to nothing (with a sink: the sink's logit, whatever is declared)",
        ),
        Semantic(
            "lse_sink",
            ("included", "excluded"),
            ("LSE", "L", "sink"),
            "whether the returned LSE includes the sink's logit",
        ),
        Semantic("mask_polarity", ("true_attends", "true_masked"), ("mask",), "what True means in the boolean mask"),
        Semantic(
            "window_convention",
            ("inclusive", "count"),
            ("window_left",),
            "window_left = w: the key w positions back is still seen (inclusive), or w keys are seen, the query's own "
            "position included (count)",
        ),
        Semantic(
            "gqa_map",
            ("blocked", "strided"),
            ("Hk",),
            "query head h reads key head h // (H/Hk), or h % Hk",
        ),
        Semantic(
            "score_order",
            ("softcap_bias", "bias_softcap"),
            ("S0", "S1", "S2", "softcap", "bias"),
            "softcap of the scaled logits and then the bias, or of logits and bias together; the mask comes last",
        ),
        Semantic(
            "unseen_values",
            ("ignored", "multiplied"),
            ("keep",),
            "keys that a query may not see do not touch its result whatever they hold, or their values are multiplied "
            "by a weight of 0, so that NaN and inf behind the mask spread (finite values never do)",
        ),
        Semantic(
            "unseen_keys",
            ("exact", "rounding"),
            ("keep",),
            "changing a key that a query may not see leaves its result bit for bit, or up to rounding (a pivot that is "
            "taken before masking)",
        ),
        Semantic(
            "kv_lengths",
            ("checked", "unchecked"),
            ("K", "V"),
            "keys and values of different lengths raise an error, or something is computed from them: the caller must "
            "take care",
        ),
        Semantic(
            "determinism",
            ("forward", "all", "none"),
            (),
            "which results are bitwise equal when the same call is made again",
        ),
    )
}

EQUATIONS: dict[tuple[str, str], dict[str, str]] = {
    ("score_order", "bias_softcap"): {
        "S1": "S0[h,i,j] + bias[h,i,j] if present(bias) else S0[h,i,j]",
        "S2": "softcap * tanh(S1[h,i,j] / softcap) if present(softcap) else S1[h,i,j]",
        "dbias": "dS0[h,i,j]",
        "dS0": "(dS[h,i,j] * (1 - (S2[h,i,j] / softcap) ** 2) if keep[h,i,j] else 0) "
        "if present(softcap) else dS[h,i,j]",
    },
}
"""Differences that are other equations: definitions by name, with the right side that replaces theirs."""


def applies(semantic: Semantic, mechanism: Mechanism) -> bool:
    """Whether the semantic says anything about the mechanism."""
    known = {
        *mechanism.inputs, *mechanism.options, *mechanism.sizes, *mechanism.outputs, *mechanism.program.definitions
    }  # fmt: skip
    return set(semantic.needs) <= known


def table_for(mechanism: Mechanism) -> dict[str, Semantic]:
    """The semantics that a candidate for this mechanism may declare, beside the mechanism's options."""
    return {name: entry for name, entry in TABLE.items() if applies(entry, mechanism)}


def check(mechanism: Mechanism, declares: Mapping[str, Any]) -> dict[str, Any]:
    """The declarations with every default filled in.

    Raises:
        DeclarationError: an unknown name or value, or one that says nothing about this mechanism.
    """
    table = table_for(mechanism)
    found: dict[str, Any] = {name: entry.default for name, entry in table.items()}
    for name, value in declares.items():
        if name in mechanism.options:
            found[name] = _option_value(mechanism, name, value)
        elif name in table:
            if value not in table[name].values:
                legal = ", ".join(table[name].values)
                raise DeclarationError(f"declares {name} = {value!r}; legal values: {legal}")
            found[name] = value
        elif name in TABLE:
            needs = ", ".join(TABLE[name].needs)
            raise DeclarationError(f"declares {name}, which says nothing about {mechanism.name} (needs {needs})")
        else:
            known = [*table, *mechanism.options]
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise DeclarationError(f"declares {name!r}, which is no named semantic and no option{hint}")
    return found


def _option_value(mechanism: Mechanism, name: str, value: Any) -> Any:
    decl = mechanism.options[name]
    if value is None and decl.nullable:
        return None
    right = {
        "bool": isinstance(value, bool),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, (int, float)) and not isinstance(value, bool),
        "enum": value in decl.choices,
    }[decl.type]
    if not right:
        legal = ", ".join(decl.choices) if decl.type == "enum" else f"a value of type {decl.type}"
        raise DeclarationError(f"declares {name} = {value!r}; expected {legal}")
    return value


def declared(declares: Mapping[str, Any] | None, name: str) -> str:
    """The declared value of a semantic of the table, or its default."""
    return str((declares or {}).get(name, TABLE[name].default))


def fixed_options(
    mechanism: Mechanism, options: Mapping[str, Any], declares: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The options by which the oracle judges: the case's own, and the declared ones where the case says nothing."""
    own = {name: value for name, value in (declares or {}).items() if name in mechanism.options}
    return {**own, **options}


def differences(declares: Mapping[str, Any] | None) -> dict[str, Any]:
    """The declarations that are not the default: what a report names beside its verdict."""
    return {
        name: value for name, value in (declares or {}).items() if name not in TABLE or value != TABLE[name].default
    }


def to_candidate(mechanism: Mechanism, data: CaseData, declares: Mapping[str, Any] | None) -> CaseData:
    """The data in the candidate's conventions; the arrays are shared where nothing changes."""
    inputs, options, cotangents = dict(data.inputs), dict(data.options), dict(data.cotangents)
    if declared(declares, "mask_polarity") == "true_masked" and inputs.get("mask") is not None:
        inputs["mask"] = ~np.asarray(inputs["mask"], dtype=bool)
    if declared(declares, "window_convention") == "count":
        for side in ("window_left", "window_right"):
            if options.get(side) is not None:
                options[side] = int(options[side]) + 1
    if declared(declares, "gqa_map") == "strided":
        order = _head_order(mechanism, inputs)
        inputs = {name: _permuted(mechanism, name, value, order) for name, value in inputs.items()}
        cotangents = {name: _permuted(mechanism, name, value, order) for name, value in cotangents.items()}
    return replace(data, inputs=inputs, options=options, cotangents=cotangents)


def from_candidate(
    mechanism: Mechanism,
    data: CaseData,
    outputs: Mapping[str, Any],
    gradients: Mapping[str, Any],
    declares: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the candidate returned, in the spec's conventions."""
    found, grads = dict(outputs), dict(gradients)
    if "LSE" in found:
        lse = np.asarray(found["LSE"], dtype=np.float64)
        if declared(declares, "lse_empty") == "+inf":
            # Only +inf becomes -inf: a -inf where +inf was declared must show.
            lse = np.where(np.isposinf(lse), -np.inf, np.where(np.isneginf(lse), np.inf, lse))
        if declared(declares, "lse_base") == "2":
            lse = lse * math.log(2.0)
        found["LSE"] = lse
    if declared(declares, "gqa_map") == "strided":
        order = np.argsort(_head_order(mechanism, data.inputs))
        found = {name: _permuted(mechanism, name, value, order) for name, value in found.items()}
        grads = {name: _permuted(mechanism, name, value, order) for name, value in grads.items()}
    return found, grads


def _head_order(mechanism: Mechanism, inputs: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """`order[h]`: the query head of the spec that the candidate sees as its head h under the strided map."""
    heads = _length(mechanism, inputs, "H")
    kv_heads = _length(mechanism, inputs, "Hk")
    group = heads // max(kv_heads, 1)
    return np.array([(h % kv_heads) * group + h // kv_heads for h in range(heads)], dtype=np.int64)


def _length(mechanism: Mechanism, inputs: Mapping[str, Any], size: str) -> int:
    sizes, _ = mechanism.resolve({name: value for name, value in inputs.items() if value is not None})
    return sizes[size]


def _permuted(mechanism: Mechanism, name: str, value: Any, order: np.ndarray[Any, Any]) -> Any:
    """Reorder the axis of query heads of an input, an output or a cotangent."""
    from attnspec.spec.language.syntax import Name

    decl = mechanism.inputs.get(name)
    if decl is not None:
        axes: tuple[str, ...] = (*decl.batch, *decl.axes)
    elif name in mechanism.outputs:
        axes = (*mechanism.batch, *mechanism.outputs[name].axes)
    else:
        return value
    for place, axis in enumerate(axes):
        size = mechanism.indices.get(axis)
        if isinstance(size, Name) and size.id == "H" and value is not None and np.shape(value)[place] == len(order):
            return np.take(np.asarray(value), order, axis=place)
    return value
