"""The tiles that kernels take on a device, judged without one: the interpreter runs them as if for a target."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance import api  # noqa: E402
from attnspec.impls import find  # noqa: E402
from attnspec.impls.engines import runtime  # noqa: E402
from attnspec.perf.judged import wanted  # noqa: E402

KERNELS = wanted([])
TARGETS = {"cuda:90": "bf16", "hip:gfx942": "fp32"}
OTHERS = [("cuda:90", "fp32"), ("cuda:100", "bf16"), ("cuda:80", "fp16"), ("hip:gfx942", "bf16")]


def judged(name: str, target: str, dtype: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    monkeypatch.setenv(runtime.TILES, target)
    return api.check(find(name), mechanism=name, level="smoke", dtypes=[dtype], explain=False, **more)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_conforms_with_the_tiles_of_a_device(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = judged(name, target, TARGETS[target], monkeypatch, select=["*/shapes/*", "*/gradients/plain/*"])
    assert report.exit_code == 0, report.summary
    assert sum(result.status == "pass" for result in report.results) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype"), OTHERS)
@pytest.mark.parametrize("name", KERNELS)
def test_the_whole_level_with_the_tiles_of_the_other_devices(
    name: str, target: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = judged(name, target, dtype, monkeypatch)
    assert report.exit_code == 0, report.summary


def test_the_tiles_are_those_of_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnspec.impls.engines.softmax_configs import INTERPRETED
    from attnspec.impls.softmax import configs

    tensor = torch.zeros(1)
    monkeypatch.delenv(runtime.TILES, raising=False)
    assert runtime.target_of(tensor) is None and configs("forward", 64, 64, torch.bfloat16) == INTERPRETED
    monkeypatch.setenv(runtime.TILES, "cuda:90")
    assert runtime.target_of(tensor) == ("cuda", 90) and configs("forward", 64, 64, torch.bfloat16) != INTERPRETED
    with runtime.recorded(("hip", "gfx942")):
        assert runtime.target_of(tensor) == ("hip", "gfx942")


@pytest.mark.parametrize("text", ["cuda", "cuda:", "cuda:new", "rocm:gfx942", "90"])
def test_another_target_is_refused_by_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.TILES, text)
    with pytest.raises(ValueError, match=f"ATTNSPEC_TILES: expected a target such as cuda:90.* got '{text}'"):
        runtime.assumed()
