"""An arithmetic that rounds for real: the equations, or a form of them, as an honest kernel would compute them.

The suite's tolerance comes from simulated errors; here they are made. Sums are accumulated in float32 in a stated
order, elementary functions and definitions are rounded to float32, and what the mechanism lets a kernel store is
rounded to the dtype of the inputs. Each way is another honest implementation, which the suite must accept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnspec.spec.language.arithmetic import Arithmetic
from attnspec.spec.language.backend import Backend
from attnspec.spec.language.formats import round_to
from attnspec.spec.language.named import Named
from attnspec.spec.language.noise import RoundingModel

Order = str | int
"""Of a sum: "forward" as NumPy adds, in blocks of so many terms whose sums are added in turn, or "reversed": blocks of
`LAST_FIRST` terms, the last block first."""
LAST_FIRST = 8


@dataclass
class Rounded(Arithmetic):
    """Evaluation in float32 with sums in the given order, and what `model` names stored in its narrow format."""

    model: RoundingModel
    order: Order = "forward"
    samples = 1  # asks for the hooks of sums; no axis is added

    def tensor(self, name: str, value: Named, computed: bool, backend: Backend) -> Named:
        if name in self.model.stored:
            return Named(round_to(value.array, self.model.io), value.axes)
        return _single(value) if computed else value

    def contract(
        self, operands: Sequence[Named], run: Callable[[Sequence[Named]], Named], terms: int, backend: Backend
    ) -> Named:
        narrow = [Named(np.asarray(operand.array, np.float32), operand.axes) for operand in operands]
        whole = run(narrow)
        lengths = {axis: n for operand in operands for axis, n in operand.lengths().items() if axis not in whole.axes}
        if not lengths or self.order == "forward":
            return _single(whole)
        longest = max(lengths, key=lambda axis: lengths[axis])
        total = np.zeros(whole.shape, np.float32)
        for part in self._blocks(lengths[longest]):
            # Blocks are cut out by zeros, not by slicing: a condition of the sum knows its axis in full.
            found = run([_only(operand, longest, part) for operand in narrow])
            total = total + np.asarray(found.array, np.float32)
        return Named(total.astype(np.float64), whole.axes)

    def reduced(self, op: str, value: Named, source: Named, axes: tuple[str, ...], backend: Backend) -> Named:
        where = tuple(source.axes.index(axis) for axis in axes if axis in source.axes)
        x = np.asarray(source.array, np.float32)
        if op == "sum" and where:
            return Named(self._sum(x, where).astype(np.float64), value.axes)
        if op == "softmax" and where and x.size:
            # The exact weights are given in place of the logits, which are their logarithms up to a shift of the row.
            logits = np.log(np.asarray(source.array), where=source.array > 0, out=np.full(source.shape, -np.inf))
            top = logits.max(where, keepdims=True)
            weights = np.exp((logits - np.where(np.isfinite(top), top, 0.0)).astype(np.float32))
            total = np.expand_dims(self._sum(weights, where), where)
            found = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
            return Named(found.astype(np.float64), source.axes)
        if op == "logsumexp" and where and x.size:
            top = x.max(where, keepdims=True)
            shift = np.where(np.isfinite(top), top, np.float32(0))
            total = self._sum(np.exp(x - shift), where)
            return Named((np.log(total) + shift.reshape(total.shape)).astype(np.float64), value.axes)
        return _single(value)

    def elementwise(self, function: str, value: Named, arguments: Sequence[Named], backend: Backend) -> Named:
        return _single(value)

    def _sum(self, x: Any, where: tuple[int, ...]) -> Any:
        """A float32 sum over these axes in the order asked for."""
        longest = max(where, key=lambda axis: x.shape[axis])
        total = np.zeros([length for axis, length in enumerate(x.shape) if axis not in where], np.float32)
        for part in self._blocks(x.shape[longest]):
            index = [part if axis == longest else slice(None) for axis in range(x.ndim)]
            total = total + x[tuple(index)].sum(where, dtype=np.float32)
        return total

    def _blocks(self, length: int) -> list[slice]:
        """The parts of an axis in the order in which they are added."""
        size = length if self.order == "forward" else LAST_FIRST if self.order == "reversed" else int(self.order)
        parts = [slice(start, min(start + size, length)) for start in range(0, length, max(size, 1))]
        return parts[::-1] if self.order == "reversed" else parts


def _single(value: Named) -> Named:
    return Named(np.asarray(value.array, np.float32).astype(np.float64), value.axes)


def _only(operand: Named, axis: str, part: slice) -> Named:
    """The operand with zeros outside `part` of `axis`."""
    if axis not in operand.axes:
        return operand
    index = tuple(part if name == axis else slice(None) for name in operand.axes)
    kept = np.zeros_like(operand.array)
    kept[index] = operand.array[index]
    return Named(kept, operand.axes)
