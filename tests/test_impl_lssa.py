"""Softplus attention on Triton against its equations, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.engines.mapped_launch import INTERPRETED  # noqa: E402
from attnspec.impls.lssa import lssa_softplus_attention  # noqa: E402
from attnspec.property_tests.random_calls import random_call  # noqa: E402
from attnspec.spec import load  # noqa: E402
from attnspec.tests.kernel_calls import agrees, gaps, strided  # noqa: E402

NAME = "lssa_softplus_attention"
FUNCTION = lssa_softplus_attention


def inputs(*names: str, B: int = 1, H: int = 2, N: int = 7, M: int = 9, D: int = 5, E: int = 4) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {"Q": (B, H, N, D), "K": (B, H, M, D), "V": (B, H, M, E)}
    out: dict[str, Any] = {n: torch.randn(s, generator=g).numpy().astype("f8") for n, s in shapes.items()}
    out["mask"] = (torch.rand(B, 1, N, M, generator=g) < 0.7).numpy()
    return {name: out[name] for name in ("Q", "K", "V", *names)}


@pytest.mark.parametrize("seed", [2, 5, 11])
def test_random_calls_equal_the_equations(seed: int) -> None:
    agrees(NAME, FUNCTION, *random_call(load(NAME), seed, largest=9), tolerance=5e-5)


@pytest.mark.parametrize("activation", ["softplus", "sigmoid", "exp"])
@pytest.mark.parametrize("normalize_qk", [True, False])
def test_every_activation_with_its_gradients(activation: str, normalize_qk: bool) -> None:
    # Scores of -40 and 40: the deep end of softplus, where the scores themselves would lose their digits.
    options = {"activation": activation, "normalize_qk": normalize_qk, "scale": 40.0 if normalize_qk else -5.0}
    agrees(NAME, FUNCTION, inputs(), options, tolerance=2e-5)


def test_long_rows_with_their_gradients() -> None:
    for options in ({}, {"reweight": True, "power": 3}):
        agrees(NAME, FUNCTION, inputs(N=3, M=20, D=130, E=200), options, tolerance=2e-5)


def test_scores_that_would_underflow_keep_their_ratios() -> None:
    x = {n: torch.tensor(v).float() for n, v in inputs(N=2, M=2, D=2, H=1).items()}
    x["Q"], x["K"] = torch.ones(1, 1, 2, 2), torch.tensor([[-200.0, 0.0], [-201.0, 0.0]])[None, None]
    out = FUNCTION(**x, normalize_qk=False, scale=1.0, causal=False)
    want = torch.softmax(torch.tensor([1.0, 0.0]), 0) @ x["V"][0, 0]
    torch.testing.assert_close(out[0, 0, 0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [
    {}, {"power": 1, "eps": 0.0}, {"power": 3, "offset_rows": 0, "eps": 0.5}, {"causal": False, "power": 2},
    {"offset_rows": 100}, {"activation": "sigmoid", "scale": 3.0},
], ids=str)  # fmt: skip
def test_the_second_stage_with_its_gradients(options: dict[str, Any]) -> None:
    agrees(NAME, FUNCTION, inputs("mask"), {"reweight": True} | options, tolerance=5e-5)


@pytest.mark.parametrize("config", INTERPRETED, ids=str)
def test_every_configuration_with_any_strides(config: Any) -> None:
    agrees(NAME, FUNCTION, inputs(N=70, M=67, H=1), {"reweight": True, "power": 3}, layout=strided, config=config,
           tolerance=5e-5)  # fmt: skip


@pytest.mark.parametrize("sizes", [{"N": 0}, {"M": 0}, {"B": 0}, {"N": 1, "M": 1}, {"D": 17, "E": 33}], ids=str)
@pytest.mark.parametrize("reweight", [False, True])
def test_small_and_odd_sizes(sizes: dict[str, int], reweight: bool) -> None:
    agrees(NAME, FUNCTION, inputs("mask", **sizes), {"reweight": reweight}, tolerance=5e-5)


def test_equal_keys_leave_nothing_in_the_second_stage() -> None:
    x = {n: torch.tensor(v).float() for n, v in inputs(N=9).items()}
    x["K"] = x["K"][:, :, :1].expand(-1, -1, 9, -1)
    assert not FUNCTION(**x, reweight=True)[:, :, 3:].any() and FUNCTION(**x, reweight=True)[:, :, :3].any()


def test_zero_rows_have_finite_gradients() -> None:
    x = inputs()
    x["Q"][:, :, 2] = 0.0
    x["K"][:, :, 3] = 0.0
    agrees(NAME, FUNCTION, x, {}, tolerance=1e-3)


def test_a_wrong_power_is_noticed() -> None:
    def steeper(*args: Any, power: int, **named: Any) -> Any:
        return FUNCTION(*args, power=power + 1, **named)

    found = gaps(NAME, steeper, inputs(), {"reweight": True, "power": 3})
    assert min(found[name] for name in ("O", "dQ", "dK", "dV")) > 1e-3


def test_what_is_masked_does_not_leak() -> None:
    x = {n: torch.tensor(v).float() for n, v in inputs(H=1, N=5, M=5).items()}
    for reweight in (False, True):
        clean = FUNCTION(**x, reweight=reweight)
        for name in ("K", "V"):
            spoilt = x | {name: x[name].clone()}
            spoilt[name][:, :, 4] = torch.nan
            out = FUNCTION(**spoilt, reweight=reweight)
            assert torch.equal(out[:, :, :4], clean[:, :, :4]) and not torch.isfinite(out[:, :, 4]).any()


@pytest.mark.parametrize(("change", "message"), [
    ({"activation": "relu"}, "activation"), ({"power": 0}, "power"), ({"eps": -1.0}, "eps"),
    ({"reweight": 1}, "reweight"),
    ({"V": torch.zeros(1, 2, 8, 4)}, "V"),
], ids=str)  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        FUNCTION(**({n: torch.tensor(v).float() for n, v in inputs().items()} | change))


def test_what_no_kernel_computes_is_refused() -> None:
    with pytest.raises(Unsupported, match="d = 257"):
        FUNCTION(*(torch.zeros(1, 1, 1, 257) for _ in range(3)))
    with pytest.raises(Unsupported, match="float64"):
        FUNCTION(*(torch.zeros(1, 1, 1, 2, dtype=torch.float64) for _ in range(3)))
