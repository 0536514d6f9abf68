"""Multi-head latent attention on Triton against its equations, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.engines.latent import configs  # noqa: E402
from attnspec.impls.mla import _rotated, mla  # noqa: E402
from attnspec.property_tests.random_calls import random_call  # noqa: E402
from attnspec.spec import load  # noqa: E402
from attnspec.tests.kernel_calls import agrees, gaps, strided  # noqa: E402

NAME = "mla"


def inputs(
    B: int = 2, H: int = 3, N: int = 5, M: int = 9, D: int = 4, U: int = 6, R: int = 7, E: int = 5
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "Qn": (B, H, N, D), "Qr": (B, H, N, U), "C": (B, M, R), "Kr": (B, M, U), "Wuk": (H, D, R), "Wuv": (H, E, R)
    }  # fmt: skip
    out: dict[str, Any] = {name: torch.randn(shape, generator=g).double().numpy() for name, shape in shapes.items()}
    return out


def calls(**sizes: int) -> dict[str, Any]:
    return {name: torch.tensor(value).float() for name, value in inputs(**sizes).items()}


@pytest.mark.parametrize("seed", range(4))
def test_random_calls_equal_the_equations(seed: int) -> None:
    given, options = random_call(load(NAME), seed, largest=9)
    agrees(NAME, mla, given, options, gradients=False)


def test_all_options_any_strides_sizes_beyond_a_tile() -> None:
    given = inputs(B=1, N=18, M=45, U=18, R=70)
    given |= {"norm_weight": given["C"][0, 0].copy(), "freq": torch.rand(9).double().numpy()}
    given |= {"mask": (torch.rand(1, 1, 18, 45) < 0.6).numpy(), "kv_length": torch.tensor([40]).numpy()}
    options = {"causal": True, "yarn_factor": 4.0, "yarn_mscale": 0.7, "scale": 0.3}
    agrees(NAME, mla, given, options, gradients=False, layout=strided, tolerance=1e-4)


@pytest.mark.parametrize("config", configs(7, 4, None), ids=str)
def test_every_configuration(config: Any) -> None:
    agrees(NAME, mla, inputs(B=1, N=13, M=70), {"causal": True}, gradients=False, config=config)


@pytest.mark.parametrize("sizes", [{"N": 0}, {"M": 0}, {"B": 0}, {"N": 1, "M": 1}, {"U": 0}, {"H": 1, "R": 1}], ids=str)
def test_lengths_of_zero_and_one(sizes: dict[str, int]) -> None:
    agrees(NAME, mla, inputs(**sizes), {"causal": True}, gradients=False)


def test_angles_of_far_positions_are_exact() -> None:
    """Angles in float32 would be off by a hundredth of a turn at the 300,000th token."""
    given = calls(B=1, N=2, M=3)
    freq = torch.tensor([1.0, 0.37, 0.01])
    far = _rotated(given["Kr"], torch.arange(3) + 300_000, freq)
    angle = (torch.arange(3).double() + 300_000)[:, None] * freq.double()
    turn = torch.polar(torch.ones_like(angle), angle)
    want = torch.view_as_real(torch.view_as_complex(given["Kr"].double().unflatten(-1, (-1, 2))) * turn).flatten(-2)
    torch.testing.assert_close(far.double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["causal", "mask", "kv_length"])
def test_hidden_tokens_do_not_leak(rule: str) -> None:
    given = calls(B=1, N=4, M=20)
    options = {
        "causal": {"causal": True}, "mask": {"mask": torch.ones(1, 1, 4, 20).tril(16).bool()},
        "kv_length": {"kv_length": torch.tensor([19])},
    }[rule]  # fmt: skip
    want, lse = mla(**given, **options)
    for value in (torch.nan, torch.inf):
        bad = given | {"C": given["C"].clone(), "Kr": given["Kr"].clone()}
        bad["C"][:, 19] = value
        bad["Kr"][:, 19] = torch.nan
        got, got_lse = mla(**bad, **options)
        rows = slice(0, 4 if rule == "kv_length" else 3)
        torch.testing.assert_close(got[:, :, rows], want[:, :, rows])
        torch.testing.assert_close(got_lse[:, :, rows], lse[:, :, rows])
        assert rule == "kv_length" or got[:, :, 3].isnan().all()


def test_half_precision_is_near_and_the_comparison_has_teeth() -> None:
    agrees(NAME, mla, inputs(), {"causal": True}, gradients=False, dtype=torch.bfloat16, tolerance=0.08)
    wrong = gaps(NAME, lambda **x: mla(**x | {"scale": 0.31}), inputs(), {"scale": 0.3}, gradients=False)
    assert min(wrong.values()) > 1e-3


def test_what_is_wrong_or_not_offered_is_said() -> None:
    given = calls()
    wide = {"C": torch.zeros(2, 9, 257), "Wuk": torch.zeros(3, 4, 257), "Wuv": torch.zeros(3, 5, 257)}
    for change, error, message in (
        ({"freq": torch.ones(2)}, ValueError, r"freq must be of shape \[3\]"),
        ({"Qr": given["Qr"][..., :5], "Kr": given["Kr"][..., :5], "freq": torch.ones(2)}, ValueError, "even number"),
        ({"kv_length": torch.tensor([3, 10])}, ValueError, r"kv_length must be within 0\.\.9"),
        ({"mask": torch.ones(2, 2, 5, 9).bool()}, ValueError, "mask must be of shape"),
        ({"yarn_factor": 0.5}, ValueError, "yarn_factor must be at least 1"),
        ({"C": given["C"].double()}, ValueError, "C must be of Qn's dtype"),
        (wide, Unsupported, "at most 256"),
        ({"Qn": given["Qn"].clone().requires_grad_()}, Unsupported, "no kernel has gradients"),
    ):
        with pytest.raises(error, match=message):
            mla(**given | change)
