"""The linear memory of Titans on Triton against its equations, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.engines.memory_launch import TILES  # noqa: E402
from attnspec.impls.titans import titans_memory  # noqa: E402
from attnspec.property_tests import implementations  # noqa: E402
from attnspec.property_tests.checking import unreturned  # noqa: E402
from attnspec.property_tests.random_calls import random_call  # noqa: E402
from attnspec.spec import load  # noqa: E402
from attnspec.spec.laws import laws  # noqa: E402
from attnspec.tests.kernel_calls import agrees, gaps, strided  # noqa: E402

NAME = "titans_memory"


def inputs(*names: str, B: int = 1, H: int = 1, N: int = 5, D: int = 4, E: int = 3) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "Q": (B, H, N, D), "K": (B, H, N, D), "V": (B, H, N, E), "alpha": (B, H, N), "eta": (B, H, N),
        "theta": (B, H, N), "W0": (1, H, E, D), "S0": (B, H, E, D),
    }  # fmt: skip
    out: dict[str, Any] = {name: torch.randn(shape, generator=g).double() for name, shape in shapes.items()}
    out["K"] = torch.nn.functional.normalize(out["K"], dim=-1)
    out |= {name: out[name].sigmoid() for name in ("alpha", "eta", "theta")}
    return {name: x.numpy() for name, x in out.items() if name != "S0" or name in names}


def tensors(given: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.tensor(value).float() for name, value in given.items()}


@pytest.mark.parametrize("seed", [3, 8, 9])
def test_random_calls_equal_the_equations(seed: int) -> None:
    given, options = random_call(load(NAME), seed, largest=5)
    agrees(NAME, titans_memory, given, options, gradients=False)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("read", ["pre", "post"])
def test_chunks_within_a_tile_and_over_several(chunk: int, read: str, tile: int) -> None:
    given = inputs("S0", N=37, D=17, E=33)
    options = {"chunk": chunk, "read": read, "loss": "mean"}
    agrees(NAME, titans_memory, given, options, layout=strided, gradients=False, tile=tile)


@pytest.mark.parametrize("sizes", [{"N": 0}, {"N": 1}, {"B": 0}], ids=str)
def test_lengths_of_zero_and_one(sizes: dict[str, int]) -> None:
    agrees(NAME, titans_memory, inputs("S0", **sizes), {}, gradients=False)


def test_gates_of_zero_and_one() -> None:
    given = inputs("S0", N=6)
    given["alpha"][..., ::2] = 1.0
    given["eta"][..., ::3] = 0.0
    agrees(NAME, titans_memory, given, {"chunk": 2}, gradients=False)


def test_sixteen_bits_leave_the_memory_exact() -> None:
    found = gaps(NAME, titans_memory, inputs(N=20), {}, dtype=torch.bfloat16, gradients=False)
    assert found["Y"] < 0.01, found
    assert max(found["W_last"], found["S_last"]) < 1e-4, found


def test_a_law_about_what_is_not_returned_is_no_law_for_the_kernel() -> None:
    mechanism = load(NAME)
    kernel = implementations.kernel(mechanism)
    lacking = {law.name: unreturned(mechanism, law, kernel) for law in laws(mechanism)}
    two_layers = ["W1_last", "W2_last"]
    assert {name: found for name, found in lacking.items() if found} == {
        "head_independence_with_two_layers": two_layers,
        "hidden_permutation": two_layers,
    }


def test_what_is_wrong_is_refused() -> None:
    given = tensors(inputs())
    with pytest.raises(Unsupported, match="two layers"):
        titans_memory(**given, W1=torch.zeros(1, 1, 2, 4))
    with pytest.raises(Unsupported, match="gradients"):
        titans_memory(**(given | {"Q": given["Q"].requires_grad_()}))
    with pytest.raises(ValueError, match="give the memory W0"):
        titans_memory(**(tensors(inputs()) | {"W0": None}))
    with pytest.raises(ValueError, match="'post' or 'pre'"):
        titans_memory(**tensors(inputs()), read="after")
    with pytest.raises(ValueError, match="'gelu' or 'silu'"):
        titans_memory(**tensors(inputs()), activation="relu")
    with pytest.raises(ValueError, match="tile must be one of"):
        titans_memory(**tensors(inputs()), tile=8)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        titans_memory(**tensors(inputs()), chunk=0)
    with pytest.raises(Unsupported, match="at most 256"):
        titans_memory(**tensors(inputs(D=300)))
