"""The released multi-scale deformable attention as a layer: projections and packed levels around the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.spec import load
from attnspec.tests.official import ROOT

NAME = "deformable_attention"


def readings() -> list[Callable[..., Any]]:
    return [
        lambda given: load(NAME).evaluate(given)["O"],
        lambda given: reference.find(NAME)[0](**given)["O"],
    ]


def unpacked(flat: Any, shapes: Any, rest: Any) -> Any:
    """`[b,j,...]`, levels one after the other, as `[b,l,y,x,...]` with `rest` where a level has no cell."""
    rows, columns = shapes.max(0)
    found = np.full((len(flat), len(shapes), rows, columns, *flat.shape[2:]), rest)
    start = 0
    for level, (height, width) in enumerate(shapes.tolist()):
        part = flat[:, start : start + height * width]
        found[:, level, :height, :width] = part.reshape(len(flat), height, width, *flat.shape[2:])
        start += height * width
    return found


def operator_inputs(found: dict[str, Any]) -> dict[str, Any]:
    """What the layer's projections make of its inputs. Cells outside the levels hold NaN: nobody reads them."""
    shapes = found["shapes"]
    values = np.einsum("bjf,fhe->bjhe", found["X"], found["Wv"]) + found["bv"]
    given = {
        "V": unpacked(values, shapes, np.nan).transpose(0, 4, 1, 2, 3, 5),
        "height": shapes[:, 0],
        "width": shapes[:, 1],
        "ref": found["ref"],
        "off": np.einsum("bif,hlkzf->bhilkz", found["z"], found["Woff"]) + found["boff"][:, None],
        "logits": np.einsum("bif,hlkf->bhilk", found["z"], found["Wa"]) + found["ba"][:, None],
    }
    if "pad" in found:
        given["mask"] = unpacked(found["pad"] == 0, shapes, False)
    return given


@pytest.mark.parametrize("reading", readings(), ids=["equations", "reference"])
@pytest.mark.parametrize("case", ["case0", "case1"])
def test_the_recorded_layer_comes_out(reading: Callable[..., Any], case: str) -> None:
    with np.load(ROOT / NAME / f"{case}.npz") as stored:
        found = dict(stored)
    got = reading(operator_inputs(found))
    assert np.abs(got - found["O"].transpose(0, 2, 1, 3)).max() < 1e-11
    assert np.abs(np.einsum("ohe,bhie->bio", found["Wo"], got) + found["bo"] - found["out"]).max() < 1e-11


@pytest.mark.parametrize("reading", readings(), ids=["equations", "reference"])
@pytest.mark.parametrize("case", ["case0", "case1"])
def test_the_recorded_locations_and_weights_are_those_used(reading: Callable[..., Any], case: str) -> None:
    """Points at the recorded locations, no offsets, and the logarithms of the recorded weights: the same output."""
    with np.load(ROOT / NAME / f"{case}.npz") as stored:
        found = dict(stored)
    given, loc = operator_inputs(found), found["loc"].transpose(0, 2, 1, 3, 4, 5)
    shapes = found["shapes"][:, ::-1].astype(float)
    given["ref"] = np.zeros(found["ref"].shape)
    given["off"] = loc * shapes[None, None, None, :, None]
    given["logits"] = np.log(found["A"].transpose(0, 2, 1, 3, 4))
    assert np.abs(reading(given) - found["O"].transpose(0, 2, 1, 3)).max() < 1e-11
