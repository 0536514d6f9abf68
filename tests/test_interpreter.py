"""Triton's interpreter without repeated work: the functions of the language are replaced once per launch."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from triton.runtime import interpreter as tritons  # noqa: E402

from attnspec.impls.clipped import clipped_softmax_gated_attention  # noqa: E402
from attnspec.impls.engines import interpreter  # noqa: E402


def test_the_language_is_replaced_once_per_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interpreter.quickened()
    calls: list[object] = []
    replace = tritons._patch_builtin

    def counted(*given: Any) -> Any:
        calls.append(given[0])
        return replace(*given)

    monkeypatch.setattr(tritons, "_patch_builtin", counted)
    g = torch.Generator().manual_seed(0)
    Q, K, V = (torch.randn(1, 1, 100, 8, generator=g) for _ in range(3))
    first = clipped_softmax_gated_attention(Q, K, V, causal=True)
    once = len(calls)
    assert 0 < once <= 3 * 6, "one launch: what the kernel sees, and what the library's own functions see"
    second = clipped_softmax_gated_attention(Q, K, V, causal=True)
    assert 0 < len(calls) - once <= once, "restored after the launch, replaced again in the next"
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_an_interpreter_that_is_not_known_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tritons._patch_lang
    monkeypatch.setattr(tritons, "_patch_lang", lambda fn, other: None)
    unknown = tritons._patch_lang
    assert not interpreter.quickened.__wrapped__()
    assert tritons._patch_lang is unknown is not before
