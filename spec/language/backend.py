"""The few array operations the evaluator needs, over an array API namespace.

`Backend` is written to the Python array API standard (NumPy 2 is one); `TorchBackend` overrides what torch
names differently and keeps autograd intact: nothing here writes into an array. Real arrays are float64,
integers int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attnspec.spec.language.errors import EvaluationError

Array = Any


class Backend:
    """Operations over `xp`. `differentiable`: gradients may be taken, so excluded places need safe arguments."""

    differentiable = False

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.real, self.int, self.bool = xp.float64, xp.int64, xp.bool

    # Making arrays
    def asarray(self, value: Any, kind: str) -> Array:
        """`value` as an array of the kind real, int or bool."""
        return self.xp.asarray(value, dtype=getattr(self, kind))

    def full(self, shape: Sequence[int], value: float | bool, kind: str) -> Array:
        return self.xp.full(tuple(shape), value, dtype=getattr(self, kind))

    def arange(self, count: int) -> Array:
        return self.xp.arange(count, dtype=self.int)

    def kind(self, array: Array) -> str:
        """real, int or bool."""
        if array.dtype == self.bool:
            return "bool"
        return "int" if array.dtype == self.int else "real"

    def to_real(self, array: Array) -> Array:
        return self.xp.asarray(array, dtype=self.real)

    def to_int(self, array: Array) -> Array:
        return self.xp.asarray(array, dtype=self.int)

    # Moving axes
    def permute(self, array: Array, order: Sequence[int]) -> Array:
        return self.xp.permute_dims(array, tuple(order))

    def reshape(self, array: Array, shape: Sequence[int]) -> Array:
        return self.xp.reshape(array, tuple(shape))

    def expand(self, array: Array, shape: Sequence[int]) -> Array:
        return self.xp.broadcast_to(array, tuple(shape))

    def stack(self, arrays: Sequence[Array], axis: int) -> Array:
        return self.xp.stack(list(arrays), axis=axis)

    def take(self, array: Array, positions: Sequence[int] | Array, axis: int) -> Array:
        return self.xp.take(array, self.asarray(positions, "int"), axis=axis)

    def take_along(self, array: Array, positions: Array, axis: int) -> Array:
        return self.xp.take_along_axis(array, positions, axis=axis)

    # Computing
    def where(self, test: Array, then: Any, otherwise: Any) -> Array:
        return self.xp.where(test, then, otherwise)

    def matmul(self, left: Array, right: Array) -> Array:
        return self.xp.matmul(left, right)

    def sum(self, array: Array, axes: Sequence[int]) -> Array:
        return self.xp.sum(array, axis=tuple(axes))

    def prod(self, array: Array, axes: Sequence[int]) -> Array:
        return self.xp.prod(array, axis=tuple(axes))

    def max(self, array: Array, axes: Sequence[int]) -> Array:
        return self.xp.max(array, axis=tuple(axes))

    def min(self, array: Array, axes: Sequence[int]) -> Array:
        return self.xp.min(array, axis=tuple(axes))

    def any(self, array: Array, axes: Sequence[int]) -> Array:
        return self.xp.any(array, axis=tuple(axes))

    def all(self, array: Array, axes: Sequence[int]) -> Array:
        return self.xp.all(array, axis=tuple(axes))

    def argmax(self, array: Array, axis: int) -> Array:
        """The first position of the largest element."""
        return self.to_int(self.xp.argmax(array, axis=axis))

    def argsort(self, array: Array, axis: int) -> Array:
        """The stable ascending order."""
        return self.to_int(self.xp.argsort(array, axis=axis, stable=True))

    def isfinite(self, array: Array) -> Array:
        return self.xp.isfinite(array)

    def isnan(self, array: Array) -> Array:
        return self.xp.isnan(array)

    def truth(self, array: Array) -> bool:
        """Whether any element is true."""
        return bool(self.xp.any(array))

    def detach(self, array: Array) -> Array:
        return array

    def own(self, array: Array, others: Sequence[Array]) -> Array:
        """The array as contiguous memory that it shares with none of the others, where memory can be written at all."""
        return array

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        return np.asarray(array)

    def function(self, name: str) -> Callable[..., Array]:
        """An elementary function of real arrays by its name in the array API, or erf."""
        if name == "erf":
            return self.erf
        return getattr(self.xp, name)  # type: ignore[no-any-return]

    def exp_of_difference(self, array: Array, shift: Array) -> Array:
        """exp(array - shift)."""
        return self.xp.exp(array - shift)

    def divide_fresh(self, array: Array, by: Array) -> Array:
        """`array / by`, where nobody else holds `array`."""
        return array / by

    def erf(self, array: Array) -> Array:
        values = np.asarray(array)
        return self.asarray(
            np.fromiter(map(math.erf, values.ravel().tolist()), np.float64, values.size).reshape(values.shape),
            "real",
        )


class NumpyBackend(Backend):
    """NumPy, reusing large temporaries."""

    def own(self, array: Array, others: Sequence[Array]) -> Array:
        array = np.asarray(array)
        alone = array.flags.c_contiguous and array.flags.writeable
        alone = alone and not any(np.may_share_memory(array, other) for other in others)
        return array if alone else array.copy("C")

    def exp_of_difference(self, array: Array, shift: Array) -> Array:
        result = np.subtract(array, shift)
        return np.exp(result, out=result) if isinstance(result, np.ndarray) else np.exp(result)

    def divide_fresh(self, array: Array, by: Array) -> Array:
        if isinstance(array, np.ndarray) and array.dtype == np.float64 and array.ndim:
            return np.divide(array, by, out=array)
        return array / by


class TorchBackend(Backend):
    """torch, with gradients."""

    differentiable = True

    def __init__(self, xp: Any, device: Any = None) -> None:
        super().__init__(xp)
        self.device = device

    def asarray(self, value: Any, kind: str) -> Array:
        dtype = getattr(self, kind)
        if isinstance(value, self.xp.Tensor):
            return value.to(dtype)
        return self.xp.as_tensor(np.asarray(value), dtype=dtype, device=self.device)

    def full(self, shape: Sequence[int], value: float | bool, kind: str) -> Array:
        return self.xp.full(tuple(shape), value, dtype=getattr(self, kind), device=self.device)

    def arange(self, count: int) -> Array:
        return self.xp.arange(count, dtype=self.int, device=self.device)

    def to_real(self, array: Array) -> Array:
        return array.to(self.real)

    def to_int(self, array: Array) -> Array:
        return array.to(self.int)

    def permute(self, array: Array, order: Sequence[int]) -> Array:
        return self.xp.permute(array, tuple(order))

    def stack(self, arrays: Sequence[Array], axis: int) -> Array:
        return self.xp.stack(list(arrays), dim=axis)

    def take(self, array: Array, positions: Sequence[int] | Array, axis: int) -> Array:
        return self.xp.index_select(array, axis, self.asarray(positions, "int"))

    def take_along(self, array: Array, positions: Array, axis: int) -> Array:
        return self.xp.take_along_dim(array, positions, dim=axis)

    def sum(self, array: Array, axes: Sequence[int]) -> Array:
        return self.xp.sum(array, dim=tuple(axes)) if axes else array

    def prod(self, array: Array, axes: Sequence[int]) -> Array:
        for axis in sorted(axes, reverse=True):
            array = self.xp.prod(array, dim=axis)
        return array

    def max(self, array: Array, axes: Sequence[int]) -> Array:
        return self.xp.amax(array, dim=tuple(axes)) if axes else array

    def min(self, array: Array, axes: Sequence[int]) -> Array:
        return self.xp.amin(array, dim=tuple(axes)) if axes else array

    def any(self, array: Array, axes: Sequence[int]) -> Array:
        return self.xp.any(array, dim=tuple(axes)) if axes else array

    def all(self, array: Array, axes: Sequence[int]) -> Array:
        return self.xp.all(array, dim=tuple(axes)) if axes else array

    def argmax(self, array: Array, axis: int) -> Array:
        # torch does not promise the first of equal elements, a stable descending sort does
        return self.xp.sort(array.to(self.real), dim=axis, descending=True, stable=True)[1].select(axis, 0)

    def argsort(self, array: Array, axis: int) -> Array:
        return self.xp.argsort(array, dim=axis, stable=True)

    def detach(self, array: Array) -> Array:
        return array.detach()

    def own(self, array: Array, others: Sequence[Array]) -> Array:
        return array.clone() if any(array.data_ptr() == other.data_ptr() for other in others) else array.contiguous()

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        return np.asarray(array.detach().cpu())

    def function(self, name: str) -> Callable[..., Array]:
        return getattr(self.xp, _TORCH_NAMES.get(name, name))  # type: ignore[no-any-return]


_TORCH_NAMES = {"pow": "pow", "erf": "erf"}


def backend_for(xp: Any, inputs: Sequence[Any]) -> Backend:
    """The backend of a namespace (None: NumPy).

    Raises:
        EvaluationError: when `xp` lacks what an array API namespace has.
    """
    if xp is None or xp is np:
        return _NUMPY
    if getattr(xp, "__name__", "") == "torch":
        devices = [value.device for value in inputs if isinstance(value, xp.Tensor)]
        return TorchBackend(xp, devices[0] if devices else None)
    try:
        return Backend(xp)
    except AttributeError:
        name = getattr(xp, "__name__", type(xp).__name__)
        raise EvaluationError(f"xp must be an array API namespace such as numpy or torch, got {name}") from None


_NUMPY = NumpyBackend(np)
