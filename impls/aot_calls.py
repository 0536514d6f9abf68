"""The kernels of every mechanism but softmax attention, for the ahead-of-time compiler: typical calls, recorded.

A module of `attnspec.impls` lists its calls in `typical_calls(dtype)`, which yields (mechanism, label, call). A call is
made with its launches recorded instead of run, so that what is compiled is what would be launched. Softmax attention
has a list of its own, `attnspec.impls.aot_variants`, for its many options.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from attnspec.impls.engines.launch import Launch
from attnspec.impls.engines.runtime import Target, recorded

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LISTS = "typical_calls"


@dataclass(frozen=True)
class Call:
    """One listed call of a mechanism in one dtype; it launches one or more kernels."""

    module: str
    mechanism: str
    label: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.mechanism}-{self.label}-{self.dtype}"


def modules() -> list[str]:
    """Modules of `attnspec.impls` that list calls, found without importing them."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        if any(isinstance(node, ast.FunctionDef) and node.name == LISTS for node in body):
            found.append(path.stem)
    return found


def calls() -> Iterator[Call]:
    """Every listed call, by module, dtype and label.

    Raises:
        ValueError: a module lists two calls of one name.
    """
    seen = set()
    for module in modules():
        for dtype in DTYPES:
            for mechanism, label, _ in _listed(module, dtype):
                call = Call(module, mechanism, label, dtype)
                if call in seen:
                    raise ValueError(f"attnspec.impls.{module}: two typical calls named {call.name}")
                seen.add(call)
                yield call


def launches(call: Call, target: Target) -> list[tuple[str, Launch]]:
    """The kernels that the call launches on `target`, each with a name; launches that compile alike are one.

    Raises:
        LookupError: no such call, or it launches nothing.
    """
    from attnspec.impls.aot import signature

    for mechanism, label, function in _listed(call.module, call.dtype):
        if (mechanism, label) == (call.mechanism, call.label):
            with recorded(target) as found:
                function()
            break
    else:
        raise LookupError(f"attnspec.impls.{call.module} lists no call {call.name}")
    if not found:
        raise LookupError(f"{call.name} launches no kernel")
    named: dict[str, tuple[str, Launch]] = {}
    counts: dict[str, int] = {}
    for launch in found:
        same = repr((launch.name, signature(launch), launch.options()))
        if same not in named:
            counts[launch.name] = number = counts.get(launch.name, 0) + 1
            suffix = f"#{number}" if number > 1 else ""
            named[same] = f"{call.mechanism}/{launch.name}{suffix}-{call.label}-{call.dtype}", launch
    return list(named.values())


def _listed(module: str, dtype: str) -> Iterator[tuple[str, str, Any]]:
    yield from getattr(import_module(f"attnspec.impls.{module}"), LISTS)(DTYPES[dtype])
