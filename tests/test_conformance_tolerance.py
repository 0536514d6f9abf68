"""Limits: quantiles that hold, and a chance of a wrong rejection that is what it says."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from attnspec.conformance import tolerance as t


@pytest.mark.parametrize(("tail", "wanted"), [(0.5, 0.0), (0.025, 1.959964), (1e-9, 5.997807), (1e-15, 7.941345)])
def test_normal_quantiles_are_right(tail: float, wanted: float) -> None:
    assert t.normal_quantile(tail) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("dof", [20, t.DOF, 60])
@pytest.mark.parametrize("tail", [0.025, 1e-4, 1e-9, 1e-14])
def test_student_quantiles_are_right_to_a_per_cent(tail: float, dof: int) -> None:
    # The tail beyond the quantile, by integrating the density over log x.
    found = t.student_quantile(tail, dof)
    x = np.exp(np.linspace(math.log(found), math.log(found) + 40, 200_001))
    scale = math.gamma((dof + 1) / 2) / (math.sqrt(dof * math.pi) * math.gamma(dof / 2))
    density = scale * (1 + x * x / dof) ** (-(dof + 1) / 2)
    beyond = float(np.trapezoid(density * x, np.log(x)))
    assert (beyond / tail) ** (1 / dof) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(("tail", "count", "wanted"), [(0.05, 1, 3.8415), (0.01, 10, 23.209), (0.001, 100, 149.449)])
def test_rms_quantiles_are_those_of_chi_square(tail: float, count: int, wanted: float) -> None:
    assert t.rms_quantile(tail, count) == pytest.approx(math.sqrt(wanted / count), rel=0.04)


def test_rms_quantiles_hold_for_simulated_noise() -> None:
    draws = np.random.default_rng(0).standard_normal((200_000, 8))
    rms = np.sqrt((draws**2).mean(axis=1))
    assert (rms > t.rms_quantile(1e-3, 8)).mean() == pytest.approx(1e-3, rel=0.4)


def test_a_longer_run_is_no_likelier_to_fail() -> None:
    rng = np.random.default_rng(1)
    for elements in (10, 1000):
        draws = np.abs(rng.standard_t(t.DOF, size=(2000, elements))).max(axis=1)
        exceeded = (draws * t.HONEST > t.largest_limit(elements, chance=0.01)).mean()
        assert 0.002 < exceeded < 0.03


def test_limits_grow_slowly_with_what_is_judged() -> None:
    small, large = t.limits(20, 2), t.limits(1_000_000, 50_000)
    assert small.largest < large.largest < 2 * small.largest
    assert t.HONEST < large.rms < 1.1 * t.HONEST < small.rms


def test_the_chances_of_a_run_add_up_to_what_is_stated() -> None:
    assert pytest.approx(t.CHANCE) == t.SHARES * t.PER_OUTPUT * t.JUDGEMENTS
    assert t.CHANCE <= 1e-6


def test_more_slices_make_a_slice_limit_wider() -> None:
    assert t.rms_limit(20) < t.rms_limit(20, slices=200) < 1.3 * t.rms_limit(20)


def test_the_documentation_states_the_limits_in_use() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "verdict.md").read_text(encoding="utf-8")
    for name, value in (("HONEST", t.HONEST), ("CHANCE", t.CHANCE), ("DOF", t.DOF)):
        line = next(row for row in text.splitlines() if row.startswith(f"| `{name}` |"))
        assert float(line.split("|")[2].replace(",", "")) == value
