"""The regions that the released router keeps: values that name their region show which regions a query has read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.spec import load
from attnspec.tests.official import ROOT

NAME = "biformer_bra"
CASES = {"case0": {"n_win": 3, "topk": 4}, "case1": {"n_win": 2, "topk": 2}}


def readings() -> list[Callable[..., Any]]:
    return [
        lambda given, options: load(NAME).evaluate(given, options)["O"],
        lambda given, options: reference.find(NAME)[0](**given, **options)["O"],
    ]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("read", readings(), ids=["equations", "reference"])
def test_the_regions_read_are_those_of_the_code(case: str, read: Callable[..., Any]) -> None:
    with np.load(ROOT / NAME / f"{case}.npz") as stored:
        found = dict(stored)
    kept, (batch, heads, down, across) = found["I"], found["Q"].shape[:4]
    side = CASES[case]["n_win"]
    region = (np.arange(down) // (down // side))[:, None] * side + np.arange(across) // (across // side)
    values = np.broadcast_to(np.eye(side * side)[region], (batch, heads, down, across, side * side))
    read_from = read({"Q": found["Q"], "K": found["K"], "V": values}, CASES[case]) > 1e-12
    for b, h, y, x in np.ndindex(batch, heads, down, across):
        assert set(np.flatnonzero(read_from[b, h, y, x])) == set(kept[b, region[y, x]].tolist())
