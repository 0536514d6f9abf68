"""The released code's clipped weights and gates, read off the outputs of values that show them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.spec import load
from attnspec.tests.official import ROOT

NAME = "clipped_softmax_gated_attention"


def readings() -> list[Callable[..., Any]]:
    return [
        lambda given, **options: load(NAME).evaluate(given, options)["O"],
        lambda given, **options: reference.find(NAME)[0](**given, **options)["O"],
    ]


def recorded(case: str) -> dict[str, Any]:
    with np.load(ROOT / NAME / f"{case}.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("reading", readings(), ids=["equations", "reference"])
@pytest.mark.parametrize(("case", "gamma"), [("case0", -0.04), ("case1", 0.0)])
def test_unit_vectors_as_values_show_the_clipped_weights(reading: Callable[..., Any], case: str, gamma: float) -> None:
    found = recorded(case)
    weights = found["C"]
    units = np.broadcast_to(np.eye(weights.shape[3]), weights.shape[:2] + 2 * (weights.shape[3],))
    given = {"Q": found["Q"], "K": found["K"], "V": np.array(units), "mask": found["allow"][:, None]}
    assert np.abs(reading(given, gamma=gamma) - weights).max() < 1e-11
    assert case == "case1" or (weights[:, :, found["allow"].all((0, 1))] == 0).any()


@pytest.mark.parametrize("reading", readings(), ids=["equations", "reference"])
def test_equal_values_show_the_gate(reading: Callable[..., Any]) -> None:
    found = recorded("case1")
    given = {name: found[name] for name in ("Q", "K", "X", "w", "bg")} | {"V": np.ones((*found["K"].shape[:3], 1))}
    assert np.abs(reading(given, causal=True, gsf=4.0)[..., 0] - 4 * found["pi"]).max() < 1e-11
