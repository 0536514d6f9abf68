"""Splits of unequal length, as official code computed them one by one and merged them, come out of both readings.

Dao-AILab/flash-attention 0251105a2fb19d2957484b7f023cd8c115286ced, flash_attn/cute/testing.py attention_ref per
split and hopper/test_flash_attn.py attention_combine_ref in float64. The code takes ranges of keys; cuts at the starts
of all but the first are the same splits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.spec import load
from attnspec.tests.official import ROOT
from attnspec.tests.test_reference import gap

READINGS = {
    "equations": lambda inputs, options: load("flash_decoding_split_kv").evaluate(inputs, options),
    "reference": lambda inputs, options: reference.find("flash_decoding_split_kv")[0](**inputs, **options),
}


def stored(case: str) -> dict[str, Any]:
    with np.load(ROOT / "flash_decoding_split_kv" / f"{case}.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("case", ["case0", "case1"])
@pytest.mark.parametrize("reading", READINGS)
def test_the_recorded_splits_and_their_merge_come_out(reading: str, case: str) -> None:
    z = stored(case)
    inputs = {"Q": z["Q"], "K": z["K"], "V": z["V"], "kv_length": z["m"], "cuts": z["R"][:, 1:, 0]}
    options = {"causal": bool(z["causal"]), "window_left": int(z["window_left"]) if z["window_left"] >= 0 else None}
    got = READINGS[reading](inputs, options)
    assert gap(got["Op"], np.moveaxis(z["Op"], 0, 1)) < 1e-11
    assert gap(got["Lp"], np.moveaxis(z["Lp"], 0, 1)) < 1e-11
    for name, key in (("O", "O"), ("LSE", "L"), ("O", "O_full"), ("LSE", "L_full")):
        assert gap(got[name], z[key]) < 1e-11, key


def test_the_recorded_ranges_are_what_cuts_can_say() -> None:
    for case in ("case0", "case1"):
        z = stored(case)
        assert np.array_equal(z["R"][:, 1:, 0], z["R"][:, :-1, 1])
        assert not z["R"][:, 0, 0].any()
        assert np.array_equal(z["R"][:, -1, 1], z["m"])


def test_other_cuts_give_other_parts_and_the_same_whole() -> None:
    z = stored("case1")
    inputs = {"Q": z["Q"], "K": z["K"], "V": z["V"], "kv_length": z["m"], "cuts": z["R"][:, 1:, 0] - 1}
    got = READINGS["reference"](inputs, {"causal": True})
    assert gap(got["O"], z["O"]) < 1e-11
    assert gap(got["Op"], np.moveaxis(z["Op"], 0, 1)) > 1e-6
