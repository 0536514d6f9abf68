"""Rounding into floating-point formats is IEEE round-to-nearest-even, and unit roundoffs are its largest error."""

from __future__ import annotations

import math

import numpy as np
import pytest

from attnspec.spec.language import SpecError, round_to, unit_roundoff
from attnspec.spec.language.formats import FORMATS, format_of

NAMES = sorted(FORMATS)


def numbers_of_every_size(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scale = 2.0 ** rng.integers(-160, 140, 4000)
    return np.concatenate([rng.standard_normal(4000) * scale, rng.standard_normal(4000)])


@pytest.mark.parametrize("name", NAMES)
def test_rounding_twice_is_rounding_once(name: str) -> None:
    once = round_to(numbers_of_every_size(), name)
    np.testing.assert_array_equal(round_to(once, name), once)


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_relative_error_of_normal_numbers_is_the_unit_roundoff(name: str) -> None:
    x = np.random.default_rng(1).uniform(1, 2, 200_000)
    error = np.abs(round_to(x, name) - x) / x
    assert error.max() <= unit_roundoff(name)
    if name != "fp64":
        assert error.max() > 0.9 * unit_roundoff(name)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"fp64"}))
def test_ties_go_to_the_even_neighbour(name: str) -> None:
    unit = unit_roundoff(name)
    np.testing.assert_array_equal(round_to([1 + unit, 1 + 3 * unit, -1 - unit], name), [1, 1 + 4 * unit, -1])


@pytest.mark.parametrize("name", NAMES)
def test_special_values_stay(name: str) -> None:
    special = np.array([math.inf, -math.inf, 0.0, -0.0])
    got = round_to(special, name)
    np.testing.assert_array_equal(got, special)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(special))
    assert np.isnan(round_to(math.nan, name))


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16", "fp16"])
def test_overflow_begins_half_a_unit_beyond_the_largest_number(name: str) -> None:
    target = format_of(name)
    half = target.unit_roundoff * 2.0**target.greatest
    assert round_to(target.largest, name) == target.largest
    assert round_to(math.nextafter(target.largest + half, 0), name) == target.largest
    assert round_to(target.largest + half, name) == math.inf
    assert round_to(-target.largest * 2, name) == -math.inf


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16", "fp16"])
def test_subnormals_are_multiples_of_the_smallest_number(name: str) -> None:
    smallest = format_of(name).smallest
    np.testing.assert_array_equal(
        round_to(np.array([0.5, 0.51, 1.4, 2.5, 3.5]) * smallest, name), np.array([0, 1, 1, 2, 4]) * smallest
    )


@pytest.mark.parametrize(("name", "bits"), [("bf16", 16), ("tf32", 13)])
def test_bf16_and_tf32_are_fp32_with_a_shorter_significand(name: str, bits: int) -> None:
    x = round_to(numbers_of_every_size(2), "fp32")
    word = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    word += (1 << (bits - 1)) - 1 + ((word >> np.uint64(bits)) & np.uint64(1))
    word = (word >> np.uint64(bits)) << np.uint64(bits)
    np.testing.assert_array_equal(round_to(x, name), word.astype(np.uint32).view(np.float32).astype(np.float64))


def test_torch_rounds_alike() -> None:
    torch = pytest.importorskip("torch")
    x = numbers_of_every_size(3)
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        np.testing.assert_array_equal(round_to(x, name), torch.tensor(x).to(dtype).double().numpy())
    single = round_to(x, "fp32")
    np.testing.assert_array_equal(round_to(single, "bf16"), torch.tensor(single).float().bfloat16().double().numpy())


def test_rounding_gives_a_copy() -> None:
    x = np.ones(3)
    round_to(x, "fp64")[0] = 7
    assert x[0] == 1


@pytest.mark.parametrize("name", ["float32", "", "fp8"])
def test_an_unknown_format_is_refused_by_name(name: str) -> None:
    with pytest.raises(SpecError, match=f"unknown floating-point format '{name}'; expected one of fp64, fp32"):
        round_to(1.0, name)
    with pytest.raises(SpecError):
        unit_roundoff(name)
