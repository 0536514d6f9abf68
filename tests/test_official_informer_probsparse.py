"""The queries that the released code picks: values that tell an attending row from a filled-in one.

The file's measure (Msr) was not read from the code and is not compared; it shows that no choice was a close call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.spec import load
from attnspec.tests.official import ROOT

NAME = "informer_probsparse"
CASES: dict[str, dict[str, Any]] = {"case0": {"factor": 2}, "case1": {"factor": 3, "causal": True}}


def readings() -> list[Callable[..., Any]]:
    return [
        lambda given, options: load(NAME).evaluate(given, options)["O"],
        lambda given, options: reference.find(NAME)[0](**given, **options)["O"],
    ]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("read", readings(), ids=["equations", "reference"])
def test_the_active_queries_are_those_of_the_code(case: str, read: Callable[..., Any]) -> None:
    with np.load(ROOT / NAME / f"{case}.npz") as stored:
        found = dict(stored)
    (batch, heads, queries), keys = found["Q"].shape[:3], found["K"].shape[2]
    values = np.broadcast_to(np.eye(keys), (batch, heads, keys, keys))
    given = {"Q": found["Q"], "K": found["K"], "V": values, "samp": found["samp"]}
    filled = np.tri(queries, keys) if CASES[case].get("causal") else np.full((queries, keys), 1 / keys)
    attends = np.abs(read(given, CASES[case]) - filled).max(-1) > 1e-9
    for b, h in np.ndindex(batch, heads):
        chosen = set(found["T"][b, h].tolist())
        if CASES[case].get("causal"):
            chosen -= {0}  # the first row is the first value either way
        assert set(np.flatnonzero(attends[b, h])) == chosen


@pytest.mark.parametrize("case", CASES)
def test_no_recorded_choice_is_a_close_call(case: str) -> None:
    with np.load(ROOT / NAME / f"{case}.npz") as stored:
        measure, chosen = np.sort(stored["Msr"], axis=-1)[..., ::-1], stored["T"].shape[-1]
    assert (measure[..., chosen - 1] - measure[..., chosen]).min() > 1e-3
