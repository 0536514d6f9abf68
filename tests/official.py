"""Inputs and outputs that official code computed: `vectors/<mechanism>/cases.toml` says which array is which.

    source = "repository commit, file, function"
    tolerance = 1e-11                      # of what the code's own dtype allows; 1e-11 where it is float64

    [[case]]
    file = "case0.npz"
    options = { causal = true }
    inputs = { Q = "q : b i h d -> b h i d", s = "s" }       # array, and its axes in the file -> in the mechanism
    outputs = { O = "out : b i h e -> b h i e" }
    cotangents = { O = "dout : b i h e -> b h i e" }
    gradients = { Q = "dq : b i h d -> b h i d" }
    form = "blocks"                        # optional: judge this form of the equations

In an axes pattern `1` inserts an axis of length 1 on the right side, or drops one on the left side.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent / "vectors"


@dataclass(frozen=True)
class Case:
    """One recorded call. Arrays are in the mechanism's axes, float64."""

    mechanism: str
    name: str
    source: str
    tolerance: float
    inputs: Mapping[str, Any]
    options: Mapping[str, Any]
    outputs: Mapping[str, Any]
    cotangents: Mapping[str, Any] = field(default_factory=dict)
    gradients: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<{self.mechanism} {self.name}>"


def cases() -> list[Case]:
    """Every recorded call of every mechanism."""
    found = []
    for path in sorted(ROOT.glob("*/cases.toml")):
        about = tomllib.loads(path.read_text(encoding="utf-8"))
        for number, entry in enumerate(about["case"]):
            with np.load(path.parent / entry["file"]) as stored:
                arrays = {name: stored[name] for name in stored.files}
            parts = {
                part: {name: arranged(arrays, text) for name, text in entry.get(part, {}).items()}
                for part in ("inputs", "outputs", "cotangents", "gradients")
            }
            name, tolerance = f"{Path(entry['file']).stem}-{number}", about.get("tolerance", 1e-11)
            options = entry.get("options", {})
            found.append(Case(path.parent.name, name, about["source"], tolerance, options=options, **parts))
    return found


def arranged(arrays: Mapping[str, Any], text: str) -> Any:
    """The array that `name` or `name : axes -> axes` names, integers and booleans as they are, reals in float64."""
    name, _, pattern = text.partition(":")
    array = np.asarray(arrays[name.strip()])
    if array.dtype.kind == "f":
        array = array.astype(np.float64)
    if not pattern.strip():
        return array
    have, _, want = (part.split() for part in pattern.replace("->", "-> ").partition("->"))
    if len(have) != array.ndim:
        raise ValueError(f"{text!r}: the array has {array.ndim} axes, the pattern {len(have)}")
    array = array.reshape([length for axis, length in zip(have, array.shape, strict=True) if axis != "1"])
    have, named = ([axis for axis in axes if axis != "1"] for axes in (have, want))
    lengths = dict(zip(have, array.shape, strict=True))
    array = array.transpose([have.index(axis) for axis in named])
    return array.reshape([1 if axis == "1" else lengths[axis] for axis in want])
