"""The hook through which an evaluation's arithmetic is disturbed: exact here, noisy in `noise`.

The array evaluator calls an `Arithmetic` after every operation that a floating-point implementation would
round. All values are `Named`: arrays with axis names. A noisy arithmetic adds the axis `SAMPLES` to whatever
it disturbs; inputs and everything derived from them without rounding do not have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attnspec.spec.language.backend import Backend
from attnspec.spec.language.named import Named

SAMPLES = "~"


class Arithmetic:
    """Exact arithmetic: every hook returns what it is given. Subclasses disturb.

    `samples` is None when exact, else the length of the axis `SAMPLES` that the hooks add. `logits`: whether `reduced`
    wants the logits of a softmax as its source (its weights otherwise).
    """

    samples: int | None = None
    logits: bool = False

    def tensor(self, name: str, value: Named, computed: bool, backend: Backend) -> Named:
        """Called once for each finished real definition (in a recurrence: once for each step). `computed` is
        False for a definition that only renames or picks elements of another."""
        return value

    def contract(
        self, operands: Sequence[Named], run: Callable[[Sequence[Named]], Named], terms: int, backend: Backend
    ) -> Named:
        """Called for each sum of products. `run` sums the product of operands like these; `terms` is the
        number of terms of each sum."""
        return run(operands)

    def reduced(self, op: str, value: Named, source: Named, axes: tuple[str, ...], backend: Backend) -> Named:
        """Called after sum, mean, prod, logsumexp and softmax of `source` over `axes` (excluded places are neutral)."""
        return value

    def elementwise(self, function: str, value: Named, arguments: Sequence[Named], backend: Backend) -> Named:
        """Called after an elementary function that is not exact (exp, log, tanh, rsqrt, …)."""
        return value


EXACT = Arithmetic()
