"""The released recursive gated convolution as a module: its pointwise maps packed into one array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.spec import load
from attnspec.tests.official import ROOT

NAME = "hornet_gnconv"
CASES = {"case0": (3, 1 / 3), "case1": (5, 1.0)}  # order, factor of the depthwise output


def readings() -> list[Callable[..., Any]]:
    return [
        lambda given, **options: load(NAME).evaluate(given, options)["O"],
        lambda given, **options: reference.find(NAME)[0](**given, **options)["O"],
    ]


def packed(found: dict[str, Any], order: int) -> dict[str, Any]:
    """The mechanism's inputs; places of P and of its bias that are not read hold NaN."""
    channels = found["X"].shape[1]
    maps = np.full((order - 1, channels, channels // 2), np.nan)
    biases = np.full((order - 1, channels), np.nan)
    for k in range(order - 1):
        rows, columns = found[f"P{k}_w"].shape
        maps[k, :rows, :columns], biases[k, :rows] = found[f"P{k}_w"], found[f"P{k}_b"]
    return {
        "X": found["X"], "Win": found["Win_w"], "in_bias": found["Win_b"], "DW": found["DW_w"],
        "dw_bias": found["DW_b"], "P": maps, "p_bias": biases, "Wout": found["Wout_w"], "out_bias": found["Wout_b"],
    }  # fmt: skip


@pytest.mark.parametrize("reading", readings(), ids=["equations", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_the_recorded_module_comes_out(reading: Callable[..., Any], case: str) -> None:
    order, scale = CASES[case]
    with np.load(ROOT / NAME / f"{case}.npz") as stored:
        found = dict(stored)
    got = reading(packed(found, order), scale=scale)
    assert np.abs(got - found["O"]).max() < 1e-11 * np.abs(found["O"]).max()


@pytest.mark.parametrize("reading", readings(), ids=["equations", "reference"])
def test_the_recorded_depthwise_output_comes_out(reading: Callable[..., Any]) -> None:
    """Order 1 gives gates times a start of ones, so the depthwise stage shows by itself, a few channels at a time."""
    with np.load(ROOT / NAME / "case0.npz") as stored:
        found = dict(stored)
    channels = found["X"].shape[1]
    features = np.einsum("ac,bcyx->bayx", found["Win_w"], found["X"]) + found["Win_b"][:, None, None]
    start = features.shape[1] - found["DWq"].shape[1]
    for first in (0, found["DWq"].shape[1] - channels):
        part = slice(first, first + channels)
        given = {
            "X": features[:, start + first : start + first + channels],
            "Win": np.concatenate([np.zeros((channels, channels)), np.eye(channels)]),
            "in_bias": np.concatenate([np.ones(channels), np.zeros(channels)]),
            "DW": found["DW_w"][part],
            "dw_bias": found["DW_b"][part],
            "P": np.zeros((0, channels, channels // 2)),
            "Wout": np.eye(channels),
        }
        want = found["DWq"][:, part]
        assert np.abs(reading(given) - want).max() < 1e-11 * np.abs(want).max()
