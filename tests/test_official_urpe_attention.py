"""The softmax that the released URPE code returns: with the identity as values and no factors, the output is it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.spec import load
from attnspec.tests.official import ROOT

NAME = "urpe_attention"


def readings() -> list[Callable[..., Any]]:
    return [lambda given: load(NAME).evaluate(given)["O"], lambda given: reference.find(NAME)[0](**given)["O"]]


@pytest.mark.parametrize("case", ["case0", "case1"])
@pytest.mark.parametrize("read", readings(), ids=["equations", "reference"])
def test_the_weights_before_the_factors_are_those_of_the_code(case: str, read: Callable[..., Any]) -> None:
    with np.load(ROOT / NAME / f"{case}.npz") as stored:
        found = dict(stored)
    weights = found["P"]
    values = np.broadcast_to(np.eye(weights.shape[-1]), (*weights.shape[:2], *weights.shape[-1:] * 2))
    given = {"Q": found["Q"], "K": found["K"], "V": values, "beta": found["beta"], "mask": found["allow"][:, None]}
    assert np.abs(read(given) - weights).max() < 1e-14
    assert np.abs(read({**given, "gam": found["gam"]}) - weights * toeplitz(found["gam"])).max() < 1e-14


def toeplitz(table: Any) -> Any:
    """`[h,i,j]`: the entry of offset j - i of a table whose middle entry is offset 0."""
    n = (table.shape[-1] + 1) // 2
    return np.stack([table[:, n - 1 - i : 2 * n - 1 - i] for i in range(n)], axis=1)
