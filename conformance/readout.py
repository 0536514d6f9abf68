"""Reading a kernel's attention weights from the outside.

A kernel's output is linear in the values: with the identity for V, the output *is* the matrix of weights. `weights`
calls a candidate with slices of the identity and gives its weights beside the equations' own, so that an error of one
key can be seen where outputs only show that rows are wrong. It refuses (gives None) mechanisms whose value tensor does
not have the form `[..., key, feature]`, and cases that would need too many calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnspec.conformance.shapes import roles
from attnspec.conformance.types import CaseData
from attnspec.spec import Mechanism

Floats = NDArray[np.float64]
Call = Callable[[CaseData], Mapping[str, Any]]
"""Runs the candidate on these arrays; gives its outputs by name, or nothing where it did not return."""
MAX_CALLS = 24
MAX_WEIGHTS = 2**22


@dataclass(frozen=True)
class Slot:
    """Where the identity goes: the value input, the output that then holds weights, and the length of the key axis."""

    value: str
    output: str
    keys: int
    features: int


def slot(mechanism: Mechanism, data: CaseData) -> Slot | None:
    """The value input and output that can show the weights, or None."""
    key_index = roles(mechanism).key_index
    for name, decl in mechanism.inputs.items():
        if decl.role != "value" or name not in data.inputs or decl.axes[-2:-1] != (key_index,):
            continue
        shape = data.inputs[name].shape
        for output, declared in mechanism.outputs.items():
            axes = (*mechanism.batch, *declared.axes)
            if len(axes) == 4 and axes[-1] == decl.axes[-1] and decl.axes[-2] not in axes and shape[-2] and shape[-1]:
                return Slot(name, output, int(shape[-2]), int(shape[-1]))
    return None


def weights(mechanism: Mechanism, data: CaseData, call: Call) -> tuple[Floats, Floats] | None:
    """The candidate's weights and the equations' weights, both `[b, h, i, j]`.

    Args:
        data: the case's arrays; everything but the values is kept.
        call: runs the candidate.

    Returns:
        None where the weights cannot be read: no value input of the right form, too many calls, or no answer.
    """
    found = slot(mechanism, data)
    if found is None or -(-found.keys // found.features) > MAX_CALLS:
        return None
    lead = data.inputs[found.value].shape[:-2]
    identity = np.broadcast_to(np.eye(found.keys), (*lead, found.keys, found.keys))
    want = mechanism.evaluate(
        {**data.inputs, found.value: identity}, data.options, outputs=[found.output]
    )[found.output]  # fmt: skip
    if want.size > MAX_WEIGHTS:
        return None
    pieces = []
    for start in range(0, found.keys, found.features):
        values = np.zeros((*lead, found.keys, found.features))
        width = min(found.features, found.keys - start)
        values[..., start : start + width, :width] = np.eye(width)
        outputs = call(CaseData({**data.inputs, found.value: values}, dict(data.options), {}, dict(data.extra)))
        if found.output not in outputs:
            return None
        piece = np.asarray(outputs[found.output], dtype=np.float64)
        if piece.shape[:-1] != want.shape[:-1] or piece.shape[-1] != found.features:
            return None
        pieces.append(piece[..., :width])
    return np.concatenate(pieces, axis=-1), np.asarray(want, dtype=np.float64)
