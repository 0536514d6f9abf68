"""Triton's interpreter without work that it repeats.

While a kernel is interpreted, every call of another `@triton.jit` function replaces the functions of `triton.language`
once more, though they are replaced already: half of the time of kernels built from small functions. `quickened` makes
each replacement happen once per launch. What is computed does not change.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any


@functools.cache
def quickened() -> bool:
    """Whether the interpreter is of the kind that is known, and from now on saves that work; changes it once."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace, launch = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "GridExecutor", None)
    if replace is None or launch is None or list(inspect.signature(replace).parameters) != ["fn"]:
        return False
    if "_patch_lang(self.fn)" not in inspect.getsource(interpreter.InterpretedFunction.__call__):
        return False
    replaced: set[tuple[bool, bool]] = set()
    run = launch.__call__

    def once(fn: Any) -> Any:
        """Replace what the function can see, unless that was done in this launch."""
        seen = fn.__globals__.values()
        key = any(value is tl for value in seen), any(value is tl.core for value in seen)
        if key in replaced:
            return None  # nobody restores what a called function replaced
        replaced.add(key)
        return replace(fn)

    @functools.wraps(run)
    def launched(self: Any, *arguments: Any, **named: Any) -> Any:
        replaced.clear()
        try:
            return run(self, *arguments, **named)
        finally:
            replaced.clear()

    interpreter._patch_lang = once
    launch.__call__ = launched
    return True
