"""The weights of the released landmark attention: with the identity as values, the output is them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.spec import load
from attnspec.tests.official import ROOT

NAME = "landmark_attention"


def readings() -> list[Callable[..., Any]]:
    return [lambda given: load(NAME).evaluate(given)["O"], lambda given: reference.find(NAME)[0](**given)["O"]]


@pytest.mark.parametrize("case", ["case0", "case1"])
@pytest.mark.parametrize("read", readings(), ids=["equations", "reference"])
def test_the_weights_are_those_of_the_code(case: str, read: Callable[..., Any]) -> None:
    with np.load(ROOT / NAME / f"{case}.npz") as stored:
        found = dict(stored)
    weights = found["P"]
    values = np.broadcast_to(np.eye(weights.shape[-1]), (*weights.shape[:2], *weights.shape[-1:] * 2))
    given = {"Q": found["Q"], "K": found["K"], "V": values, "landmark": found["L"]}
    assert np.abs(read(given) - weights).max() < 1e-14


def test_the_recorded_rows_lose_the_weight_of_empty_blocks() -> None:
    with np.load(ROOT / NAME / "case1.npz") as stored:
        sums = stored["P"].sum(-1)
        flags = stored["L"]
    assert sums.min() == 0 and flags[:, 0].any()  # the landmark in front sees nothing
    assert ((sums > 0.01) & (sums < 0.99)).any()
