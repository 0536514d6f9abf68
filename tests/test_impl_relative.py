"""Attention with learned data of the distance on Triton against its equations, in Triton's interpreter."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.engines.relative_launch import INTERPRETED, RelativeTile  # noqa: E402
from attnspec.impls.relative import music_relative_attention, urpe_attention  # noqa: E402
from attnspec.property_tests.random_calls import random_call  # noqa: E402
from attnspec.spec import load  # noqa: E402
from attnspec.tests.kernel_calls import agrees, gaps, strided  # noqa: E402

FUNCTIONS: dict[str, Any] = {"music_relative_attention": music_relative_attention, "urpe_attention": urpe_attention}
SMALL = RelativeTile(16, 1)


def inputs(
    name: str, B: int = 1, H: int = 2, N: int = 7, M: int = 9, D: int = 5, E: int = 4, P: int = 7, shared: bool = False
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    R = max(N + M - 1, 0)
    shapes: dict[str, tuple[int, ...]] = {"Q": (B, H, N, D), "K": (B, H, M, D), "V": (B, H, M, E)}
    if name == "music_relative_attention":
        shapes["rel"] = (1 if shared else H, P, D)
    else:
        shapes |= {"beta": (H, R), "gam": (H, R)}
    return {key: rng.normal(size=shape) for key, shape in shapes.items()}


def compare(name: str, given: dict[str, Any], options: dict[str, Any], **more: Any) -> None:
    agrees(name, FUNCTIONS[name], given, options, **more)


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_random_calls_equal_the_equations(name: str, seed: int) -> None:
    given, options = random_call(load(name), seed, largest=9)
    compare(name, given, options)


@pytest.mark.parametrize("far", ["zero", "clamp"])
@pytest.mark.parametrize("rule", [{}, {"causal": False}, {"block": 5}], ids=str)
def test_relative_vectors_across_tiles(rule: dict[str, Any], far: str) -> None:
    given = inputs("music_relative_attention", N=20, M=37, P=19, shared=far == "clamp")
    compare("music_relative_attention", given, rule | {"far": far}, layout=strided, config=SMALL)


@pytest.mark.parametrize("causal", [True, False])
def test_offsets_across_tiles(causal: bool) -> None:
    given = inputs("urpe_attention", B=2, H=1, N=37, M=20)
    given["mask"] = np.random.default_rng(1).random((2, 1, 37, 20)) < 0.7
    compare("urpe_attention", given, {"causal": causal}, layout=strided, config=SMALL)


@pytest.mark.parametrize("config", INTERPRETED, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_configuration(name: str, config: Any) -> None:
    compare(name, inputs(name, H=1, N=34, M=34, D=17, E=18), {"causal": True}, config=config, tolerance=3e-5)


@pytest.mark.parametrize("sizes", [{"N": 0}, {"M": 0}, {"B": 0}, {"N": 1, "M": 1}], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_lengths_of_zero_and_one(name: str, sizes: dict[str, Any]) -> None:
    compare(name, inputs(name, **sizes), {"causal": True})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_not_seen_does_not_leak(name: str) -> None:
    """Key 19 is seen by nobody, and row 3 sees nothing; what they hold shows nowhere, in no gradient."""
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    mask[..., 19] = mask[:, :, 3] = False

    def results(poison: float) -> list[Any]:
        x = {key: torch.tensor(value).float() for key, value in inputs(name, N=20, M=20).items()}
        x["K"][:, :, 19] = poison
        x["V"][:, :, 19] = -2 * poison
        x["Q"][:, :, 3] = poison
        leaves = [value.requires_grad_() for value in x.values()]
        O = FUNCTIONS[name](**x, mask=mask, config=SMALL)
        return [O.detach(), *torch.autograd.grad(O.sum(), leaves)]

    want = results(1.0)
    for poison in (torch.nan, torch.inf):
        for got, expected in zip(results(poison), want):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision_is_near_and_the_comparison_has_teeth(name: str) -> None:
    compare(name, inputs(name), {"causal": True}, dtype=torch.bfloat16, tolerance=0.08)
    wrong = gaps(name, lambda **x: FUNCTIONS[name](**x | {"scale": 0.41}), inputs(name), {"scale": 0.4})
    assert all(apart > 1e-3 for apart in wrong.values()), wrong


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_repeat_bit_for_bit(name: str) -> None:
    given = {key: torch.tensor(value).float().requires_grad_() for key, value in inputs(name).items()}
    runs = [torch.autograd.grad(FUNCTIONS[name](**given).square().sum(), list(given.values())) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_what_is_wrong_or_not_offered_is_said() -> None:
    music, urpe = (
        {key: torch.tensor(value).float() for key, value in inputs(name).items()} for name in FUNCTIONS
    )  # fmt: skip
    wide = {key: torch.zeros(1, 2, 2, 257) for key in "QKV"}
    table = {"beta_table": torch.zeros(2, 3), "bucket": torch.zeros(15, dtype=torch.int64)}
    for function, change, error, message in (
        (music_relative_attention, {"rel": torch.zeros(3, 7, 5)}, ValueError, "rel must be of 2 tables"),
        (music_relative_attention, {"rel": torch.zeros(2, 6, 5), "causal": False}, ValueError, "odd number of rows"),
        (music_relative_attention, {"causal": False, "block": 2}, ValueError, "no block"),
        (music_relative_attention, {"far": "wrap"}, ValueError, "far must be 'zero' or 'clamp'"),
        (music_relative_attention, {"block": 0}, ValueError, "block must be at least 1"),
        (music_relative_attention, wide | {"rel": torch.zeros(2, 7, 257)}, Unsupported, "at most 256"),
        (urpe_attention, {"gam": torch.zeros(2, 14)}, ValueError, "gam must be of length 15"),
        (urpe_attention, table, ValueError, "beta or beta_table"),
        (urpe_attention, {"bucket": table["bucket"]}, ValueError, "bucket goes together"),
        (urpe_attention, {"beta": None} | table | {"bucket": table["bucket"] + 3}, ValueError, r"within 0\.\.2"),
        (urpe_attention, {"mask": torch.ones(3, 1, 7, 9).bool()}, ValueError, "mask must be of shape"),
    ):
        with pytest.raises(error, match=message):
            function(**(music if function is music_relative_attention else urpe) | change)
