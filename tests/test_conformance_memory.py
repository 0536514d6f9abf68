"""Guarded memory: every layout holds the same values, and nothing that a kernel does outside them stays unseen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attnspec.conformance.bridges import narrow, read, to_jax
from attnspec.conformance.candidate import CandidateError
from attnspec.conformance.layouts import LAYOUTS, geometry
from attnspec.conformance.memory import Memory, NumpyMemory, Unguarded

torch = pytest.importorskip("torch")

from attnspec.conformance.memory_torch import TorchMemory  # noqa: E402  (needs torch)

X = np.random.default_rng(5).standard_normal((2, 3, 5, 4)).astype(np.float32)
CONSTANT = np.broadcast_to(X[:1, :, :, :1], X.shape)
KINDS: list[Any] = [pytest.param(lambda: TorchMemory("cpu"), id="torch"), pytest.param(NumpyMemory, id="numpy")]


def strides(array: Any) -> tuple[int, ...]:
    """In elements."""
    if isinstance(array, np.ndarray):
        return tuple(step // array.itemsize for step in array.strides)
    return tuple(array.stride())


def address(array: Any) -> int:
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr())


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp64"])
def test_a_layout_changes_no_value(make: Any, layout: str, dtype: str) -> None:
    if dtype == "bf16":
        pytest.importorskip("ml_dtypes")
    values = CONSTANT if layout == "expanded" else X
    values = read(torch.from_numpy(np.array(values)).to(getattr(torch, {
        "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}[dtype])), "torch")  # fmt: skip
    memory: Memory = make()
    placed = memory.place("K", values, "real", dtype, layout)
    assert np.array_equal(read(placed, "numpy" if isinstance(placed, np.ndarray) else "torch"), values)
    assert memory.layout_of() == {"K": layout}
    assert not memory.faults()


@pytest.mark.parametrize("make", KINDS)
def test_layouts_are_what_they_say(make: Any) -> None:
    placed = {layout: make().place("K", CONSTANT, "real", "fp32", layout) for layout in LAYOUTS}
    assert strides(placed["contiguous"]) == (60, 20, 4, 1)
    assert strides(placed["transposed"]) == (60, 20, 1, 5)
    assert strides(placed["swapped"]) == (60, 4, 12, 1)
    assert strides(placed["strided"])[-1] == 2
    assert strides(placed["padded"]) == (105, 35, 7, 1)
    assert strides(placed["offset"])[-1] == 1 and strides(placed["offset"])[0] == 5 * 7 * 6
    assert strides(placed["expanded"])[0] == strides(placed["expanded"])[3] == 0
    assert address(placed["contiguous"]) % 64 == 0
    assert address(placed["misaligned"]) % 16 == 4


def test_a_layout_without_meaning_for_a_shape_falls_back_and_says_so() -> None:
    assert geometry((7,), "transposed").layout == "contiguous"
    assert geometry((2, 3), "expanded", np.arange(6).reshape(2, 3)).layout == "contiguous"
    assert geometry((0, 3), "offset").span == geometry((0, 3), "offset").offset
    with pytest.raises(ValueError, match="unknown layout 'diagonal'"):
        geometry((2,), "diagonal")


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_input_is_seen_and_located(make: Any, layout: str) -> None:
    memory = make()
    placed = memory.place("K", X, "real", "fp32", layout)
    placed[1, 2, 3, 1] = 7.0
    assert memory.faults() == ["changes its input K: 1 of 120 elements, the first at [1, 2, 3, 1]"]


def test_a_change_that_keeps_the_value_is_no_change_and_one_of_the_sign_of_zero_is() -> None:
    memory = NumpyMemory()
    placed = memory.place("K", np.zeros(3, dtype=np.float32), "real", "fp32", "contiguous")
    placed[1] = 0.0
    assert not memory.faults()
    placed[1] = -0.0
    assert memory.faults() == ["changes its input K: 1 of 3 elements, the first at [1]"]


@pytest.mark.parametrize(
    ("offset", "told"),
    [(-3, "1 elements before the input K, 3 elements away"), (120, "1 elements after the input K, 1 elements away")],
)
def test_a_write_beside_an_input_is_seen(offset: int, told: str) -> None:
    memory = TorchMemory("cpu")
    placed = memory.place("K", X, "real", "fp32", "contiguous")
    placed.as_strided((1,), (1,), placed.storage_offset() + offset).fill_(1.0)
    assert memory.faults() == [f"writes out of bounds: {told}"]


def test_a_write_between_the_rows_of_an_input_is_seen() -> None:
    memory = TorchMemory("cpu")
    placed = memory.place("K", X, "real", "fp32", "padded")
    placed.as_strided((1,), (1,), placed.storage_offset() + 5).fill_(1.0)
    assert memory.faults() == ["writes out of bounds: 1 elements between the rows of the input K"]


@pytest.mark.parametrize("make", KINDS)
def test_what_lies_around_an_input_is_nan_or_huge(make: Any) -> None:
    memory = make()
    real = memory.place("K", X, "real", "fp32", "strided")
    lengths = memory.place("kv_length", np.array([3]), "int", "int64", "contiguous")
    if isinstance(real, np.ndarray):
        beside = np.lib.stride_tricks.as_strided(real[0, 0, 0, :1], (2,), (4,))[1]
        after = np.lib.stride_tricks.as_strided(lengths, (2,), (8,))[1]
    else:
        beside = real.as_strided((1,), (1,), real.storage_offset() + 1)[0]
        after = lengths.as_strided((1,), (1,), lengths.storage_offset() + 1)[0]
    assert beside != beside
    assert int(after) > 2**62


ALLOCATIONS = {
    "empty": lambda like: torch.empty(4, 5),
    "empty_like": torch.empty_like,
    "empty_strided": lambda like: torch.empty_strided((4, 5), (5, 1)),
    "new_empty": lambda like: like.new_empty(4, 5),
    "zeros": lambda like: torch.zeros(4, 5),
    "new_zeros": lambda like: like.new_zeros((4, 5)),
    "ones_like": torch.ones_like,
    "full": lambda like: torch.full((4, 5), 2.5),
}


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_a_write_past_an_allocation_of_torch_is_seen(name: str) -> None:
    like = torch.ones(4, 5)
    memory = TorchMemory("cpu")
    with memory.watching():
        out = ALLOCATIONS[name](like)
    assert tuple(out.shape) == (4, 5) and not memory.faults()
    out.as_strided((2,), (1,), out.storage_offset() + 22).fill_(1.0)
    (line,) = memory.faults()
    assert line.startswith("writes out of bounds: 2 elements past its end (the first 2 past it)")
    assert "in a tensor of shape (4, 5)" in line


def test_allocations_of_torch_keep_their_content_strides_and_dtype() -> None:
    like = torch.arange(20.0).reshape(5, 4).t()
    memory = TorchMemory("cpu")
    with memory.watching():
        assert torch.equal(torch.full((3,), 2.5), torch.tensor([2.5, 2.5, 2.5]))
        assert torch.equal(torch.zeros(3, dtype=torch.int32), torch.tensor([0, 0, 0]))
        assert torch.empty_like(like).stride() == like.stride()
        assert torch.zeros(2, requires_grad=True).requires_grad
        out = torch.ones(3)
        assert torch.zeros(3, out=out) is out
        assert torch.empty(0).numel() == 0
    assert not memory.faults()


def test_numpy_allocations_are_watched_during_the_call_only() -> None:
    memory = NumpyMemory()
    before = np.empty
    with memory.watching():
        out = np.empty((4, 5), dtype=np.float32)
        assert np.isnan(out).all() and not np.zeros(3).any() and (np.full(2, 7) == 7).all()
    assert np.empty is before
    assert memory.unwritten(out) == 20
    np.lib.stride_tricks.as_strided(out, (21,), (4,))[20] = 1.0
    (line,) = memory.faults()
    assert "1 elements past its end (the first 0 past it), in a tensor of shape (4, 5) from numpy.empty" in line


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_elements_that_were_never_written_are_counted(dtype: str) -> None:
    memory = TorchMemory("cpu")
    with memory.watching():
        out = torch.empty(6, dtype=getattr(torch, dtype))
    out[:4] = float("nan")
    assert memory.unwritten(out) == 2, "a NaN that the candidate computed is not the fill"


@pytest.mark.parametrize("make", KINDS)
def test_a_result_that_is_an_inputs_memory_is_recognised(make: Any) -> None:
    memory = make()
    placed = memory.place("V", X, "real", "fp32", "transposed")
    assert memory.alias(placed[:1]) == "V"
    assert memory.alias(placed + 0) is None


def test_the_guard_can_be_left_out_for_candidates_that_cannot_be_watched() -> None:
    memory = TorchMemory("cpu", guard_outputs=False)
    with memory.watching():
        assert not memory.unwritten(torch.zeros(3))
    assert not memory.allocated


def test_jax_inputs_are_placed_and_recognised_when_returned() -> None:
    pytest.importorskip("jax")
    memory = Unguarded("cpu")
    placed = memory.place("K", X, "real", "bf16", "strided")
    assert str(placed.dtype) == "bfloat16" and not memory.faults()
    assert memory.alias(placed) == "K" and memory.alias(placed + 0) is None


def test_values_that_are_not_of_the_dtype_are_refused_and_not_rounded() -> None:
    assert narrow(np.array([0.5, np.inf, np.nan]), "fp16").dtype == np.float16
    with pytest.raises(CandidateError, match=r"bias: holds values that are not fp16"):
        narrow(np.array([0.1]), "fp16", "bias")


def test_double_precision_survives_the_passage_to_jax_and_back() -> None:
    pytest.importorskip("jax")
    values = np.array([1.0 + 2.0**-50, -0.0, np.inf])
    assert np.array_equal(read(to_jax(values, "fp64", "cpu"), "jax"), values)
