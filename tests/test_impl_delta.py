"""The gated delta rule on Triton against its equations, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.delta import CHUNKS, gated_delta_rule  # noqa: E402
from attnspec.property_tests.random_calls import random_call  # noqa: E402
from attnspec.spec import load  # noqa: E402
from attnspec.tests.kernel_calls import agrees, gaps, strided  # noqa: E402

NAME = "gated_delta_rule"


def inputs(*names: str, B: int = 1, H: int = 2, Hk: int = 1, N: int = 5, D: int = 4, E: int = 3) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "Q": (B, Hk, N, D), "K": (B, Hk, N, D), "V": (B, H, N, E), "beta": (B, H, N), "g": (B, H, N),
        "S0": (B, H, D, E),
    }  # fmt: skip
    out: dict[str, Any] = {name: torch.randn(shape, generator=g).double() for name, shape in shapes.items()}
    out["K"] = torch.nn.functional.normalize(out["K"], dim=-1)
    out |= {"beta": 2 * out["beta"].sigmoid(), "g": -out["g"].abs()}
    return {name: x.numpy() for name, x in out.items() if name in ("Q", "K", "V", "beta", "g", *names)}


def tensors(given: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.tensor(value).float() for name, value in given.items()}


@pytest.mark.parametrize("seed", [1, 3, 5])
def test_random_calls_equal_the_equations(seed: int) -> None:
    given, options = random_call(load(NAME), seed, largest=5)
    agrees(NAME, gated_delta_rule, given, options)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_chunk_any_strides_and_more_features_than_a_block(chunk: int) -> None:
    given = inputs("S0", H=1, N=35, D=17, E=34)
    agrees(NAME, gated_delta_rule, given, {"chunk": chunk}, layout=strided, tolerance=1e-4)


@pytest.mark.parametrize("sizes", [{"N": 0}, {"N": 1}, {"B": 0}], ids=str)
def test_lengths_of_zero_and_one(sizes: dict[str, int]) -> None:
    agrees(NAME, gated_delta_rule, inputs("S0", **sizes), {"normalize_qk": True})


def test_like_keys_lose_no_digits() -> None:
    given = inputs(H=1, N=32)
    given["K"][:] = given["K"][:, :, :1]
    given["beta"][:] = 1.9
    given["g"][:] = 0.0
    agrees(NAME, gated_delta_rule, given, {"chunk": 32}, gradients=False)


def test_packed_sequences_leave_no_trace() -> None:
    given = tensors(inputs(N=6))
    given["V"][:, :, :3] = 1e30
    out, last = gated_delta_rule(**given, segment=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    want, state = gated_delta_rule(**{name: value[:, :, 3:] for name, value in given.items()})
    torch.testing.assert_close(out[:, :, 3:], want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last, state, rtol=1e-6, atol=1e-6)


def test_sixteen_bits_are_rounded_no_more_than_stated() -> None:
    found = gaps(NAME, gated_delta_rule, inputs(), {"normalize_qk": True}, dtype=torch.bfloat16)
    assert max(found.values()) < 0.05, found


def test_what_is_wrong_is_refused() -> None:
    given = tensors(inputs("S0"))
    with pytest.raises(ValueError, match="no S0 with segment"):
        gated_delta_rule(**given, segment=torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="multiple of 2 heads"):
        gated_delta_rule(**tensors(inputs(H=3, Hk=2)))
    with pytest.raises(ValueError, match="g must be of length"):
        gated_delta_rule(**(given | {"g": torch.zeros(1, 2, 4)}))
    with pytest.raises(Unsupported, match="at most 256"):
        gated_delta_rule(**tensors(inputs(D=300)))
