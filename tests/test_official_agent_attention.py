"""The released agent attention as a whole: pooled agents, interpolated biases, both softmaxes, the layer's output."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.spec import load
from attnspec.tests.official import ROOT

NAME = "agent_attention"
CASES = {"case0": (5, 2, False), "case1": (6, 3, True)}  # side of the map, side of the agents' grid, class token
CLOSED = -1e9  # a bias that leaves no weight


def readings() -> list[Callable[..., Any]]:
    return [
        lambda given, **options: load(NAME).evaluate(given, options)["O"],
        lambda given, **options: reference.find(NAME)[0](**given, **options)["O"],
    ]


def recorded(case: str) -> dict[str, Any]:
    with np.load(ROOT / NAME / f"{case}.npz") as stored:
        return dict(stored)


def pooling(side: int, grid: int, class_token: bool) -> Any:
    """`[r,i]`: adaptive average pooling of a square map to a square grid; bins overlap where they must."""
    bins = np.zeros((grid, side))
    for u in range(grid):
        first, end = u * side // grid, math.ceil((u + 1) * side / grid)
        bins[u, first:end] = 1 / (end - first)
    whole = np.einsum("uy,vx->uvyx", bins, bins).reshape(grid * grid, side * side)
    return np.concatenate([np.zeros((grid * grid, 1)), whole], axis=1) if class_token else whole


def stretching(side: int) -> Any:
    """`[y,7]`: half-pixel linear interpolation of 7 entries to `side`."""
    found = np.zeros((side, 7))
    for y in range(side):
        at = max((y + 0.5) * 7 / side - 0.5, 0.0)
        low = int(at)
        found[y, low] += 1 - (at - low)
        found[y, min(low + 1, 6)] += at - low
    return found


def biases(found: dict[str, Any], side: int, class_token: bool) -> tuple[Any, Any]:
    """B1 `[h,r,j]` and B2 `[h,i,r]` from the tables, the class token first."""
    up = stretching(side)
    first = np.einsum("ya,xc,hrac->hryx", up, up, found["an"]) + found["ah"][..., :, None] + found["aw"][..., None, :]
    second = np.einsum("ya,xc,hrac->hyxr", up, up, found["na"]) + found["ha"][:, :, None] + found["wa"][:, None]
    b1, b2 = first.reshape(*first.shape[:2], -1), second.reshape(len(second), -1, second.shape[-1])
    if class_token:
        b1 = np.concatenate([found["ac"][..., None], b1], axis=2)
        b2 = np.concatenate([found["ca"][:, None], b2], axis=1)
    return b1, b2


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("read", readings(), ids=["equations", "reference"])
def test_the_layer_computes_what_the_code_computes(case: str, read: Callable[..., Any]) -> None:
    found, (side, grid, class_token) = recorded(case), CASES[case]
    pool = pooling(side, grid, class_token)
    assert np.abs(pool @ found["Q"] - found["A"]).max() < 1e-14
    b1, b2 = biases(found, side, class_token)
    assert np.abs(b1 - found["B1"]).max() < 1e-14 and np.abs(b2 - found["B2"]).max() < 1e-14
    given = {name: found[name] for name in ("Q", "K", "V")} | {"pool": pool, "B1": b1, "B2": b2}
    assert np.abs(read(given, class_token=class_token) - found["O"]).max() < 1e-13
    given |= {name: found[name] for name in ("dwc_w", "dwc_b")}
    assert np.abs(read(given, class_token=class_token, width=side) - found["Y"]).max() < 1e-13


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("read", readings(), ids=["equations", "reference"])
def test_both_softmaxes_are_those_of_the_code(case: str, read: Callable[..., Any]) -> None:
    found = recorded(case)
    batch, heads, agents, width = found["A"].shape
    tokens, one_agent = found["K"].shape[2], np.where(np.eye(agents, dtype=bool), 0.0, CLOSED)
    shared = {"A": found["A"], "Q": found["Q"], "K": found["K"], "B1": found["B1"], "B2": found["B2"]}
    one_agent = np.broadcast_to(one_agent, (heads, agents, agents))
    none = np.zeros((batch, heads, agents, width))
    values = np.broadcast_to(np.eye(tokens), (batch, heads, tokens, tokens))
    assert np.abs(read({**shared, "V": values, "Q": none, "B2": one_agent}) - found["G"]).max() < 1e-14
    values = np.broadcast_to(np.eye(agents), (batch, heads, agents, agents))
    assert np.abs(read({**shared, "V": values, "K": none, "B1": one_agent}) - found["W"]).max() < 1e-14
