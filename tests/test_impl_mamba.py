"""Mamba-2's state space duality on Triton against its equations, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.mamba import CHUNKS, mamba2_ssd  # noqa: E402
from attnspec.property_tests.random_calls import random_call  # noqa: E402
from attnspec.spec import load  # noqa: E402
from attnspec.tests.kernel_calls import agrees, gaps, strided  # noqa: E402

NAME = "mamba2_ssd"


def inputs(*names: str, Bt: int = 1, H: int = 2, Hk: int = 1, N: int = 5, P: int = 3, Ns: int = 4) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "C": (Bt, Hk, N, Ns), "B": (Bt, Hk, N, Ns), "x": (Bt, H, N, P), "dt": (Bt, H, N), "A": (H,), "dt_bias": (H,),
        "Dskip": (H, P), "z": (Bt, H, N, P), "H0": (Bt, H, P, Ns),
    }  # fmt: skip
    out: dict[str, Any] = {name: torch.randn(shape, generator=g).double().numpy() for name, shape in shapes.items()}
    out["A"] = -abs(out["A"])
    return {name: value for name, value in out.items() if name in ("C", "B", "x", "dt", "A", *names)}


@pytest.mark.parametrize("seed", [1, 5, 7])
def test_random_calls_equal_the_equations(seed: int) -> None:
    given, options = random_call(load(NAME), seed, largest=5)
    agrees(NAME, mamba2_ssd, given, options)


@pytest.mark.parametrize("chunk", [*CHUNKS, 256])
def test_every_chunk_any_strides_and_more_features_than_a_block(chunk: int) -> None:
    given = inputs("H0", "Dskip", H=2, N=35, P=34, Ns=17)
    agrees(NAME, mamba2_ssd, given, {"chunk": chunk}, layout=strided, tolerance=1e-4)


@pytest.mark.parametrize("sizes", [{"N": 0}, {"N": 1}, {"Bt": 0}], ids=str)
def test_lengths_of_zero_and_one(sizes: dict[str, int]) -> None:
    agrees(NAME, mamba2_ssd, inputs("H0", "z", **sizes), {})


def test_gradients_of_decays_keep_their_digits_beside_strong_decays() -> None:
    given = inputs(H=1, N=20)
    given["dt"][:] = 2.0
    given["A"][:] = -6.0
    found = {}
    for N in (20, 2):
        x = {name: torch.tensor(value).float() for name, value in given.items()}
        x = {name: value[:, :, :N] if value.ndim > 1 else value for name, value in x.items()}
        x["A"].requires_grad_()
        y, _ = mamba2_ssd(**x)
        (found[N],) = torch.autograd.grad(y[:, :, 1].sum(), x["A"])
    # What other tokens would leave behind in a difference of sums is 1e5 times as large.
    assert abs(found[20] - found[2]).item() <= 1e-5 * abs(found[2]).item()
    assert found[2].item() != 0.0


def test_packed_sequences_leave_no_trace() -> None:
    given = {name: torch.tensor(value).float() for name, value in inputs(N=6).items()}
    segment = torch.tensor([[0, 0, 0, 1, 1, 1]])
    given["B"][:, :, :3] = 1e30
    y, last = mamba2_ssd(**given, segment=segment)
    alone = {name: value[:, :, 3:] if value.ndim > 1 else value for name, value in given.items()}
    want, state = mamba2_ssd(**alone)
    torch.testing.assert_close(y[:, :, 3:], want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last, state, rtol=1e-6, atol=1e-6)


def test_sixteen_bits_are_rounded_no_more_than_stated() -> None:
    found = gaps(NAME, mamba2_ssd, inputs("z"), {}, dtype=torch.bfloat16)
    assert max(found.values()) < 0.05, found


def test_what_is_wrong_is_refused() -> None:
    given = {name: torch.tensor(value).float() for name, value in inputs("H0").items()}
    with pytest.raises(ValueError, match="no H0 with segment"):
        mamba2_ssd(**given, segment=torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="multiple of 2 heads"):
        mamba2_ssd(**{name: torch.tensor(value).float() for name, value in inputs(H=3, Hk=2).items()})
    with pytest.raises(ValueError, match="Dskip must be of length 3 or 1"):
        mamba2_ssd(**given, Dskip=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="at least 0"):
        mamba2_ssd(**given, dt_min=-1.0)
    with pytest.raises(Unsupported, match="at most 256"):
        mamba2_ssd(**{name: torch.tensor(value).float() for name, value in inputs(Ns=300).items()})
