"""Flash-decoding on Triton against its equations, in Triton's interpreter."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.engines.softmax_configs import TileConfig  # noqa: E402
from attnspec.impls.softmax import configs  # noqa: E402
from attnspec.impls.split_kv import flash_decoding_split_kv  # noqa: E402
from attnspec.property_tests.random_calls import random_call  # noqa: E402
from attnspec.spec import load  # noqa: E402
from attnspec.tests.kernel_calls import agrees, gaps, strided  # noqa: E402

NAME = "flash_decoding_split_kv"


def inputs(
    B: int = 2, H: int = 4, Hk: int = 2, N: int = 3, M: int = 11, D: int = 5, E: int = 4
) -> dict[str, Any]:  # fmt: skip
    g = torch.Generator().manual_seed(0)
    shapes = {"Q": (B, H, N, D), "K": (B, Hk, M, D), "V": (B, Hk, M, E)}
    out: dict[str, Any] = {name: torch.randn(shape, generator=g).double().numpy() for name, shape in shapes.items()}
    return out


def compare(given: dict[str, Any], options: dict[str, Any], **more: Any) -> None:
    agrees(NAME, flash_decoding_split_kv, given, options, gradients=False, **more)


@pytest.mark.parametrize("seed", (0, 2, 9))
def test_random_calls_equal_the_equations(seed: int) -> None:
    given, options = random_call(load(NAME), seed, largest=9)
    compare(given, options)


@pytest.mark.parametrize("splits", [1, 3, 12])
def test_every_number_of_splits(splits: int) -> None:
    compare(inputs(B=1), {"splits": splits, "causal": True})


def test_splits_across_tiles_any_strides_window_and_length() -> None:
    given = inputs(B=2, N=2, M=75, D=18, E=17)
    given |= {"kv_length": torch.tensor([70, 20]).numpy(), "cuts": torch.tensor([[33, 5, 5], [0, 75, 20]]).numpy()}
    given |= {"sink": torch.tensor([0.5, -1.0, 2.0, 0.0]).double().numpy()}
    compare(given, {"splits": 3, "causal": True, "window_left": 30, "softcap": 2.0}, layout=strided)


@pytest.mark.parametrize("config", [TileConfig(16, 16, 1, 1), *configs("decode", 5, 4, torch.float32)], ids=str)
def test_every_configuration(config: Any) -> None:
    compare(inputs(B=1, N=9, M=70), {"causal": True, "splits": 4}, config=config)


@pytest.mark.parametrize("sizes", [{"N": 0}, {"M": 0}, {"B": 0}, {"N": 1, "M": 1}], ids=str)
def test_lengths_of_zero_and_one(sizes: dict[str, int]) -> None:
    given = inputs(**sizes) | {"sink": torch.zeros(4).double().numpy()}
    compare(given, {"splits": 3})


def test_what_another_split_holds_does_not_leak() -> None:
    """Splits share a tile here: poison in one key reaches the split that holds it, and O, and nothing else."""
    given = {name: torch.tensor(value).float() for name, value in inputs(B=1, N=1, M=12).items()}
    _, _, want, want_lse = flash_decoding_split_kv(**given, splits=3)
    given["V"][:, :, 5] = torch.nan
    O, LSE, Op, Lp = flash_decoding_split_kv(**given, splits=3)
    assert O.isnan().all() and LSE.isfinite().all() and Op[:, 1].isnan().all()
    torch.testing.assert_close(Op[:, ::2], want[:, ::2])
    torch.testing.assert_close(Lp, want_lse)
    given["K"][:, :, 5] = torch.nan
    Op, Lp = flash_decoding_split_kv(**given, splits=3)[2:]
    torch.testing.assert_close((Op[:, ::2], Lp[:, ::2]), (want[:, ::2], want_lse[:, ::2]))
    hidden = flash_decoding_split_kv(**given, splits=3, kv_length=torch.tensor([5]))
    assert all(x[x > -torch.inf].isfinite().all() for x in hidden)


def test_half_precision_is_near_and_the_comparison_has_teeth() -> None:
    compare(inputs(B=1), {"splits": 3}, dtype=torch.float16, tolerance=2e-3)
    moved = gaps(NAME, lambda **x: flash_decoding_split_kv(**x | {"scale": 0.4}), inputs(B=1), {}, gradients=False)
    assert min(moved.values()) > 1e-3


def test_what_is_wrong_or_not_offered_is_said() -> None:
    given = {name: torch.tensor(value).float() for name, value in inputs().items()}
    for change, error, message in (
        ({"splits": 0}, ValueError, "flash_decoding_split_kv: splits must be at least 1"),
        ({"cuts": torch.tensor([[12], [0]])}, ValueError, r"cuts must be within 0\.\.11"),
        ({"cuts": torch.tensor([3])}, ValueError, "cuts must be of shape"),
        ({"V": None}, ValueError, "flash_decoding_split_kv: give either K and V, or k_pages"),
        ({"kv_length": torch.tensor([1.0, 2.0])}, ValueError, "kv_length must be an integer tensor"),
        ({"Q": given["Q"].clone().requires_grad_()}, Unsupported, "no kernel has gradients"),
        ({name: torch.zeros(1, 1, 1, 300) for name in "QKV"}, Unsupported, "flash_decoding_split_kv: head size 300"),
    ):
        with pytest.raises(error, match=message):
            flash_decoding_split_kv(**given | change)
