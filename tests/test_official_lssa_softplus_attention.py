"""The recorded weights of both stages, read off the outputs of unit vectors as values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.spec import load
from attnspec.tests.official import ROOT

NAME = "lssa_softplus_attention"


def readings() -> list[Callable[..., Any]]:
    return [
        lambda given, **options: load(NAME).evaluate(given, options)["O"],
        lambda given, **options: reference.find(NAME)[0](**given, **options)["O"],
    ]


@pytest.mark.parametrize("reading", readings(), ids=["equations", "reference"])
@pytest.mark.parametrize("case", ["case0", "case1"])
def test_unit_vectors_as_values_show_the_weights(reading: Callable[..., Any], case: str) -> None:
    with np.load(ROOT / NAME / f"{case}.npz") as stored:
        found = dict(stored)
    shape = found["A"].shape
    given = {"Q": found["Q"], "K": found["K"], "V": np.array(np.broadcast_to(np.eye(shape[3]), shape))}
    assert np.abs(reading(given) - found["A"]).max() < 1e-11
    second = reading(given, reweight=True, power=int(found["p"]), eps=float(found["eps"]))
    assert np.abs(second - found["A2"]).max() < 1e-11
