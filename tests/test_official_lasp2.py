"""The states that devices exchange on the way back, as official code computed them, come out.

OpenSparseLLMs/Linear-MoE b312754b9b8a2cb9eb15e373baabe263b8d409c1, linear_moe/sequence_modeling/lasp2/
lasp2_with_mask_triton_op.py, prepare_dm of every rank, in float64. Outputs and gradients of the same
cases: vectors/lasp2/cases.toml.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.reference.lasp2 import gradient_states
from attnspec.spec import load
from attnspec.tests.official import ROOT
from attnspec.tests.test_reference import gap


def stored(case: str) -> tuple[dict[str, Any], int]:
    with np.load(ROOT / "lasp2" / f"{case}.npz") as arrays:
        return dict(arrays), int(arrays["W"])


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_the_recorded_gradient_states_come_out(case: str) -> None:
    z, devices = stored(case)
    for b, h in np.ndindex(*z["Q"].shape[:2]):
        got = gradient_states(z["Q"][b, h], z["G"][b, h], 1.0, devices)
        assert gap(np.array(got), z["dM"][:, b, h]) < 1e-11


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_the_sent_states_of_gradients_in_place_of_values_are_the_gradient_states(case: str) -> None:
    """What a device returns is the state that it would send for keys Q and values G: both readings say so."""
    z, devices = stored(case)
    inputs, options = {"Q": z["K"], "K": z["Q"], "V": z["G"]}, {"devices": devices}
    for got in (load("lasp2").evaluate(inputs, options), reference.find("lasp2")[0](**inputs, **options)):
        assert gap(got["Mst"].transpose(1, 0, 2, 3, 4), z["dM"]) < 1e-11


def test_a_device_order_that_is_wrong_is_noticed() -> None:
    z, devices = stored("case1")
    got = gradient_states(z["Q"][0, 0], z["G"][0, 0], 1.0, devices)
    assert gap(np.array(got[::-1]), z["dM"][:, 0, 0]) > 1e-6
