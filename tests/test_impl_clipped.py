"""Clipped softmax and gated attention on Triton against its equations, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.clipped import clipped_softmax_gated_attention  # noqa: E402
from attnspec.impls.engines.mapped_launch import INTERPRETED  # noqa: E402
from attnspec.property_tests.random_calls import random_call  # noqa: E402
from attnspec.spec import load  # noqa: E402
from attnspec.tests.kernel_calls import agrees, gaps, strided, tensors  # noqa: E402

NAME = "clipped_softmax_gated_attention"
FUNCTION = clipped_softmax_gated_attention
GATES = {"w": ("X", "bg", "w"), "mlp": ("X", "bg", "w1", "b1", "w2"), "wa": ("X", "bg", "wa"), "bg": ("bg",)}


def inputs(*names: str, B: int = 1, H: int = 2, N: int = 7, M: int = 9, D: int = 5, E: int = 4) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "Q": (B, H, N, D), "K": (B, H, M, D), "V": (B, H, M, E), "X": (B, N, H * D), "bg": (H,), "w": (H, D),
        "w1": (H, 3, D), "b1": (H, 3), "w2": (H, 3), "wa": (H, H * D),
    }  # fmt: skip
    out: dict[str, Any] = {n: torch.randn(s, generator=g).numpy().astype("f8") for n, s in shapes.items()}
    out["mask"] = (torch.rand(B, 1, N, M, generator=g) < 0.7).numpy()
    return {name: out[name] for name in ("Q", "K", "V", *names)}


def given(*names: str, **sizes: int) -> dict[str, Any]:
    return tensors(inputs(*names, **sizes))


@pytest.mark.parametrize("seed", [1, 4, 13])
def test_random_calls_equal_the_equations(seed: int) -> None:
    agrees(NAME, FUNCTION, *random_call(load(NAME), seed, largest=9))


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_and_its_gradients(gate: str) -> None:
    options = {"gamma": -0.1, "zeta": 1.1, "gate_mean": gate == "mlp", "gsf": 3.0, "causal": True}
    agrees(NAME, FUNCTION, inputs("mask", *GATES[gate]), options)


@pytest.mark.parametrize("config", INTERPRETED, ids=str)
def test_every_configuration_with_any_strides(config: Any) -> None:
    options = {"causal": True, "alpha": 0.5, "max_length": 20}
    agrees(NAME, FUNCTION, inputs("bg", N=70, M=67, H=1), options, layout=strided, config=config)


@pytest.mark.parametrize("sizes", [{"N": 0}, {"M": 0}, {"B": 0}, {"N": 1, "M": 1}, {"D": 17, "E": 33}], ids=str)
def test_small_and_odd_sizes(sizes: dict[str, int]) -> None:
    agrees(NAME, FUNCTION, inputs("mask", "bg", **sizes), {"gamma": -0.05})


def test_half_precision_is_near_the_equations() -> None:
    agrees(NAME, FUNCTION, inputs("bg"), {"gamma": -0.03}, dtype=torch.bfloat16, tolerance=0.03)


def test_a_wrong_map_is_noticed() -> None:
    def unclipped(*args: Any, gamma: float, **named: Any) -> Any:
        return FUNCTION(*args, **named)

    found = gaps(NAME, unclipped, inputs(), {"gamma": -0.2})
    assert min(found[name] for name in ("O", "dQ", "dK", "dV")) > 1e-3


def test_what_is_masked_does_not_leak_and_what_is_seen_shows() -> None:
    x = given(H=1, N=5, M=5)
    clean = FUNCTION(**x, causal=True, gamma=-0.1)
    for name, bad in (("K", torch.nan), ("V", torch.nan), ("V", torch.inf)):
        spoilt = x | {name: x[name].clone()}
        spoilt[name][:, :, 3] = bad
        Q = spoilt["Q"].clone().requires_grad_()
        out = FUNCTION(**(spoilt | {"Q": Q}), causal=True, gamma=-0.1)
        assert torch.equal(out[:, :, :3], clean[:, :, :3]) and not torch.isfinite(out[:, :, 3:]).any()
        out[:, :, :3].sum().backward()
        assert torch.isfinite(Q.grad[:, :, :3]).all(), name


@pytest.mark.parametrize(("change", "message"), [
    ({"alpha": 1.0}, "alpha needs max_length"), ({"gamma": 0.1}, "gamma"), ({"zeta": -1.0}, "zeta"),
    ({"bg": torch.zeros(3)}, "bg"), ({"w": torch.zeros(2, 5)}, "X and a gate"),
    ({"w1": torch.zeros(2, 3, 5)}, "together"),
    ({"mask": torch.ones(1, 1, 7, 1, dtype=torch.bool)}, "mask"), ({"causal": 1}, "causal"),
    ({"K": torch.zeros(1, 2, 9, 6)}, "K"),
], ids=str)  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        FUNCTION(**(given() | change))


def test_features_beyond_the_kernels_are_refused() -> None:
    with pytest.raises(Unsupported, match="e = 257"):
        FUNCTION(**given(E=257, N=1, M=1))
