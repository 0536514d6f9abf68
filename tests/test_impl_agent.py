"""Agent attention on Triton against its equations, in Triton's interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.agent import agent_attention  # noqa: E402
from attnspec.impls.engines import depthwise  # noqa: E402
from attnspec.impls.softmax import configs  # noqa: E402
from attnspec.property_tests.random_calls import random_call  # noqa: E402
from attnspec.spec import load  # noqa: E402
from attnspec.tests.kernel_calls import agrees, gaps, strided  # noqa: E402

NAME = "agent_attention"


def inputs(B: int = 1, H: int = 2, N: int = 7, M: int = 7, R: int = 3, D: int = 5, E: int = 4) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "Q": (B, H, N, D), "K": (B, H, M, D), "V": (B, H, M, E), "A": (B, H, R, D), "pool": (R, N), "B1": (H, R, M),
        "B2": (H, N, R), "dwc_w": (H * E, 3, 3), "dwc_b": (H * E,),
    }  # fmt: skip
    out: dict[str, Any] = {name: torch.randn(shape, generator=g).double().numpy() for name, shape in shapes.items()}
    out["mask"] = (torch.rand(B, M, generator=g) < 0.7).numpy()
    return out


def some(*names: str, **sizes: int) -> dict[str, Any]:
    found = inputs(**sizes)
    return {name: found[name] for name in ("Q", "K", "V", *names)}


@pytest.mark.parametrize("seed", [1, 4, 13, 17])
def test_random_calls_equal_the_equations(seed: int) -> None:
    given, options = random_call(load(NAME), seed, largest=9)
    agrees(NAME, agent_attention, given, options)


@pytest.mark.parametrize("width", [None, 1, 3, 50])
def test_every_width_of_the_map_with_a_class_token(width: int | None) -> None:
    options = {"class_token": True, "shortcut": 0.5} | ({} if width is None else {"width": width})
    agrees(NAME, agent_attention, some("A", "dwc_w", "dwc_b"), options)


def test_more_tokens_than_a_tile_any_strides_and_features_beyond_a_tile() -> None:
    given = some("pool", "B1", "B2", "mask", "dwc_w", H=1, N=40, M=40, R=17, D=18, E=70)
    agrees(NAME, agent_attention, given, {"width": 6}, layout=strided, tolerance=1e-4)


def test_parts_of_the_kernel_gradient_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise, "TILES_PER_PART", 1)
    agrees(NAME, agent_attention, some("A", "dwc_w", "dwc_b", B=2, H=1, N=70, M=70), {})


@pytest.mark.parametrize("sizes", [{"N": 0}, {"M": 0}, {"B": 0}, {"N": 1, "M": 1}, {"N": 0, "M": 0}], ids=str)
def test_lengths_of_zero_and_one(sizes: dict[str, int]) -> None:
    same = sizes.get("N", 7) == sizes.get("M", 7)
    agrees(NAME, agent_attention, some("A", "B1", "B2", *(["dwc_w", "dwc_b"] if same else []), **sizes), {})


@pytest.mark.parametrize("kind", ["forward", "dq", "dkv"])
def test_every_configuration(kind: str) -> None:
    for config in configs(kind, 20, 12, torch.float32):
        agrees(NAME, agent_attention, some("A", "B1", N=20, M=40, R=33), {}, config=config)


def test_agents_that_read_nothing_hold_zeros_and_masked_keys_do_not_leak() -> None:
    given = {name: torch.tensor(value).float() for name, value in some("A").items()}
    given["mask"] = torch.zeros(1, 7, dtype=torch.bool)
    given["V"][:] = torch.nan
    assert not agent_attention(**given).any()
    given["mask"][:, :4] = True
    given["V"][:, :, :4] = 1.0
    given["K"][:, :, 4:] = torch.nan
    torch.testing.assert_close(agent_attention(**given), torch.ones(1, 2, 7, 4))


def test_half_precision_is_near_and_the_comparison_has_teeth() -> None:
    given = some("pool", "dwc_w", "B2", N=9, M=9)
    agrees(NAME, agent_attention, given, {}, dtype=torch.bfloat16, tolerance=0.06)
    wrong = gaps(NAME, lambda **x: agent_attention(**x | {"shortcut": 0.51}), given, {"shortcut": 0.5})
    assert wrong["O"] > 1e-3 and wrong["dV"] > 1e-3


def test_what_is_wrong_or_not_offered_is_said() -> None:
    given = {name: torch.tensor(value).float() for name, value in inputs().items()}
    plain = {name: given[name] for name in ("Q", "K", "V", "A")}
    for change, error, message in (
        ({"pool": given["pool"]}, ValueError, "the agents A, or pool"),
        ({"dwc_b": given["dwc_b"]}, ValueError, "dwc_b goes with dwc_w"),
        ({"dwc_w": given["dwc_w"][:-1]}, ValueError, r"dwc_w must be of shape \[8, 3, 3\]"),
        ({"K": given["K"][:, :, :4], "V": given["V"][:, :, :4], "shortcut": 1.0}, ValueError, "need N = M"),
        ({"mask": torch.ones(1, 7)}, ValueError, "mask must be of dtype torch.bool"),
        ({"B1": given["B2"]}, ValueError, "B1 must be"),
        ({"width": 0}, ValueError, "width must be at least 1"),
        ({"class_token": 1}, ValueError, "class_token must be True or False"),
        ({"A": given["A"].double()}, ValueError, "A must be of Q's dtype"),
        ({name: torch.zeros(1, 1, 2, 257) for name in plain}, Unsupported, "at most 256"),
    ):
        with pytest.raises(error, match=message):
            agent_attention(**plain | change)
