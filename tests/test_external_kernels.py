"""Kernels that others wrote for mechanisms beside softmax attention: honest ones pass, the same ones spoiled do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch")

from attnspec.conformance import api
from attnspec.conformance.finding import built_in

FEW = ["*/shapes/*", "*/values/*", "*/options/*"]
LINEAR = (
    "fla-gla",
    "fla-gated-delta-rule",
    "fla-gated-delta-rule-chunk",
    "fla-lightning-attention",
    "fla-lightning-attention-chunk",
)
FLEX = ("flex-neighborhood", "flex-music-relative")


def other_adapters() -> set[str]:
    found = built_in().candidates.items()
    return {name for name, candidate in found if candidate.mechanism != "softmax_attention"}


def judged(candidate: Any, **more: Any) -> Any:
    return api.check(candidate, level="smoke", dtypes=["fp32"], directions=["forward"], select=FEW, **more)


def test_every_adapter_of_another_mechanism_is_judged_here() -> None:
    assert other_adapters() == {*LINEAR, *FLEX}


@pytest.mark.parametrize("name", [*LINEAR, *FLEX])
def test_an_honest_kernel_conforms(name: str) -> None:
    pytest.importorskip("fla" if name in LINEAR else "torch")
    report = judged(name)
    assert report.exit_code == 0, report.summary
    assert sum(result.status == "pass" for result in report.results) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LINEAR, *FLEX])
def test_an_honest_kernel_conforms_at_the_whole_level_with_its_gradients(name: str) -> None:
    pytest.importorskip("fla" if name in LINEAR else "torch")
    report = api.check(name, level="smoke", dtypes=["fp32", "bf16"])
    assert report.exit_code == 0, report.summary


SPOILED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "fla-gla": lambda given: given | {"a": given["a"].roll(1, 2)},  # the decay of the token before
    "fla-gated-delta-rule": lambda given: given | {"g": given["g"] * 0.99},
    "fla-gated-delta-rule-chunk": lambda given: given | {"g": given["g"].roll(1, 2)},
    "fla-lightning-attention": lambda given: given | {"s": given["s"].flip(0)},  # heads in another order
    "fla-lightning-attention-chunk": lambda given: given | {"s": given["s"] * 1.001},
    "flex-neighborhood": lambda given: given | {"window_x": (given.get("window_x") or given["Q"].shape[2]) - 1},
    "flex-music-relative": lambda given: given | {"rel": given["rel"].roll(1, -2)},
}  # the table read one row off


@pytest.mark.parametrize("name", SPOILED)
def test_the_same_kernel_spoiled_is_rejected(name: str) -> None:
    pytest.importorskip("fla" if name in LINEAR else "torch")
    import functools

    honest = built_in().candidates[name]

    @functools.wraps(honest.function)
    def spoiled(*args: Any, **kwargs: Any) -> Any:
        return honest.function(*args, **SPOILED[name](kwargs))

    report = judged(replace(honest, function=spoiled, short_name=None, name="spoiled"), isolated=False, explain=False)
    assert report.exit_code == 1, report.summary
