"""Optimized implementations in Triton: thin mechanisms here, the kernels they launch in `impls.engines`.

A mechanism's kernel is the function of its name in any module of this package (`attnspec.impls.softmax` has
`softmax_attention`); `find` looks it up, so that a new implementation is a new file. `attnspec.impls.aot` compiles
every kernel variant ahead of time, without a GPU. Importing this package imports nothing; the modules need PyTorch
and Triton.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any


def find(name: str) -> Callable[..., Any]:
    """The Triton implementation of the mechanism `name`.

    Raises:
        LookupError: there is none.
        ImportError: PyTorch or Triton is missing.
    """
    modules = [module for module, _ in written(name)]
    if not modules:
        raise LookupError(f"no Triton implementation of the mechanism {name!r}")
    return getattr(import_module(f"{__name__}.{modules[0]}"), name)  # type: ignore[no-any-return]


def written(name: str) -> Iterator[tuple[str, bool]]:
    """Modules with a function of the mechanism's name, and whether it is differentiable. Nothing is imported."""
    for module, functions in _sources():
        if name in functions:
            yield module, functions[name]


@cache
def _sources() -> tuple[tuple[str, dict[str, bool]], ...]:
    found = []
    for path in sorted(Path(next(iter(__path__))).glob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        functions = {node.name: not _refuses_gradients(node) for node in body if isinstance(node, ast.FunctionDef)}
        found.append((path.stem, functions))
    return tuple(found)


def _refuses_gradients(function: ast.FunctionDef) -> bool:
    """Whether its `@candidate(...)` says `differentiable=False`."""
    keywords = [word for call in function.decorator_list if isinstance(call, ast.Call) for word in call.keywords]
    return any(word.arg == "differentiable" and ast.unparse(word.value) == "False" for word in keywords)
