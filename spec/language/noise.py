"""How far an honest implementation may be from the exact result: sigma for every output element.

Monte Carlo arithmetic (Parker 1997): the equations are evaluated several times with a random error after
every operation that floating point would round, and the spread is the tolerance. The samples are one more
batch axis, so that all are computed at once. What is disturbed, with u the unit roundoff of the accumulator's
format and every rounding error relative, independent and uniform in [-u, u] (variance u**2 / 3):

- a sum of n terms x: each partial sum s_k is rounded once, so the variance is u**2/3 * sum_k s_k**2. For
  terms of random sign E[s_k**2] is k/n * sum(x**2), which adds up to n/2 * sum(x**2); for terms of one sign
  s_k is k/n * sum(x), which adds up to n/3 * sum(x)**2. Both parts are taken: the error grows with sqrt(n),
  as measured for real summations (Higham and Mary 2019), where a worst-case bound would grow with n. Each
  product carries one rounding: sum(x**2) more.
- every named definition that computes something is rounded once to the accumulator's format;
- elementary functions are good to two units in the last place, and exp also sees its argument rounded once;
- softmax and logsumexp: exp, the sum of the weights (one error for the whole row) and the division; where softmaxes
  are computed again (`recomputed`), the rounding of the logsumexp that was kept is one more error of the whole row, and
  logits are rounded once more before it is taken from them (as logarithms to base 2);
- definitions in `stored` are rounded once to the format of inputs and outputs: x * (1 + u_io * U), plus half
  the smallest number. The error is drawn rather than computed by rounding x, because an honest kernel rounds
  a neighbour of x (an unnormalised weight, a differently scaled one), whose rounding error is of that size
  but not that value;
- operands of products are rounded to tf32 or to the inputs' format where the model says so and they do not
  fit already;
- outputs are rounded once to their format; this last part is added in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnspec.spec.language.arithmetic import SAMPLES, Arithmetic
from attnspec.spec.language.backend import Backend, backend_for
from attnspec.spec.language.errors import SpecError
from attnspec.spec.language.evaluate import evaluate
from attnspec.spec.language.formats import format_of, round_to, unit_roundoff
from attnspec.spec.language.named import Named, combine, spread
from attnspec.spec.language.syntax import Program

_ELEMENTS = 1 << 23
_LARGE = 1 << 22
_FUNCTION_ULPS = 2.0
_POOL = 16
_NUMPY = backend_for(None, ())


@dataclass(frozen=True)
class RoundingModel:
    """What an implementation may round.

    `io`: format of inputs and outputs. `stored`: definitions rounded once to `io`. `accumulate`: format of
    sums, of elementary functions and of all other definitions. `product`: "ieee" multiplies operands as they
    are, "tf32" and "io" round them first. `outputs`: formats of outputs that are not `io` (an LSE in fp32).
    `recomputed`: softmaxes are computed again from logits and their logsumexp, which was kept in the accumulator's
    format, as tiled backward passes do (Dao et al., arXiv 2205.14135, section 3.1).
    """

    io: str = "fp32"
    stored: frozenset[str] = frozenset()
    accumulate: Literal["fp32", "fp64", "io"] = "fp32"
    product: Literal["ieee", "tf32", "io"] = "ieee"
    name: str = ""
    outputs: Mapping[str, str] = field(default_factory=dict)
    recomputed: bool = False

    def __post_init__(self) -> None:
        format_of(self.io)
        if self.accumulate not in ("fp32", "fp64", "io"):
            raise SpecError(f"accumulate is {self.accumulate!r}, expected fp32, fp64 or io")
        if self.product not in ("ieee", "tf32", "io"):
            raise SpecError(f"product is {self.product!r}, expected ieee, tf32 or io")
        for dtype in self.outputs.values():
            format_of(dtype)

    @property
    def accumulator(self) -> str:
        """The accumulator's format."""
        return self.io if self.accumulate == "io" else self.accumulate


class Noisy(Arithmetic):
    """Arithmetic of a rounding model; adds the axis `SAMPLES` of length `samples` to whatever it disturbs."""

    def __init__(self, rounding: RoundingModel, samples: int, rng: np.random.Generator) -> None:
        self.samples: int = samples
        self.rounding = rounding
        self.rng = rng
        self.unit = unit_roundoff(rounding.accumulator)
        self.io = format_of(rounding.io)
        self.logits = rounding.recomputed

    def tensor(self, name: str, value: Named, computed: bool, backend: Backend) -> Named:
        stored = name in self.rounding.stored
        if not (computed or stored):
            return value
        size = np.abs(_finite(first(value)))
        scale = (math.hypot(self.unit, self.io.unit_roundoff) if stored else self.unit) / math.sqrt(3) * size
        if stored:
            scale = np.where(size > 0, np.hypot(scale, self.io.smallest / math.sqrt(12)), 0.0)
        return self._disturbed(value, Named(scale, first_axes(value)))

    def contract(
        self, operands: Sequence[Named], run: Callable[[Sequence[Named]], Named], terms: int, backend: Backend
    ) -> Named:
        # A plain sum, whose condition stands for the other matrix, is no product that rounds its operands.
        rounded = [self._operand(operand) for operand in operands] if len(operands) > 1 else list(operands)
        value = run(rounded)
        squares = run([Named(_finite(first(operand)) ** 2, first_axes(operand)) for operand in rounded])
        return self._accumulated(value, squares, terms)

    def reduced(self, op: str, value: Named, source: Named, axes: tuple[str, ...], backend: Backend) -> Named:
        terms = math.prod(length for axis, length in source.lengths().items() if axis in axes)
        if op == "sum":
            squares = _summed(Named(_finite(first(source)) ** 2, first_axes(source)), axes)
            return self._accumulated(value, squares, terms)
        if op == "prod":
            return self._relative(value, math.sqrt(terms))
        if op == "softmax":
            return self._softmax(value, source, axes, terms)
        if op == "logsumexp":
            return self._logsumexp(value, source, axes, terms)
        return value

    def elementwise(self, function: str, value: Named, arguments: Sequence[Named], backend: Backend) -> Named:
        if function not in ("exp", "exp2"):
            return self._relative(value, _FUNCTION_ULPS)
        argument = Named(first(arguments[0]), first_axes(arguments[0]))
        scale = combine(
            _NUMPY,
            lambda x, a: self.unit / math.sqrt(3) * np.abs(x) * np.hypot(_FUNCTION_ULPS, _finite(a)),
            Named(first(value), first_axes(value)),
            argument,
        )
        return self._disturbed(value, scale)

    # Parts

    def _softmax(self, value: Named, source: Named, axes: tuple[str, ...], terms: int) -> Named:
        weights = _finite(first(value))
        names = first_axes(value)
        squares = _summed(Named(weights**2, names), axes)
        one = np.ones(squares.shape)
        spread = Named(self._sum_scale(squares.array, one, terms), squares.axes)
        if self.rounding.recomputed:
            largest = _highest(Named(first(source), first_axes(source)), axes)
            kept = Named(self.unit / math.sqrt(3) * (np.abs(largest.array) + math.log(max(terms, 1))), largest.axes)
            spread = combine(_NUMPY, np.hypot, spread, kept)
        row = self._disturbed(Named(np.ones(spread.shape), spread.axes), spread)
        logs = np.log(np.where(weights > 0, weights, 1.0))
        scale = Named(self.unit / math.sqrt(3) * weights * np.sqrt(_FUNCTION_ULPS**2 + 1 + logs**2), names)
        if self.rounding.recomputed:
            logits = Named(_finite(first(source)), first_axes(source))
            share = Named(self.unit / math.sqrt(3) * weights, names)
            turned = combine(_NUMPY, lambda w, s: w * np.abs(s), share, logits)
            scale = combine(_NUMPY, np.hypot, scale, turned)
        return self._disturbed(combine(_NUMPY, np.multiply, value, row), scale)

    def _logsumexp(self, value: Named, source: Named, axes: tuple[str, ...], terms: int) -> Named:
        base, names = first(value), first_axes(value)
        inner = Named(first(source), first_axes(source))
        gap = combine(
            _NUMPY,
            lambda x, m: np.where(np.isfinite(m), x - np.where(np.isfinite(m), m, 0.0), -np.inf),
            inner,
            Named(base, names),
        )
        weights = np.exp(np.minimum(np.nan_to_num(gap.array, nan=-np.inf), 0.0))
        squares = _summed(Named(weights**2, gap.axes), axes)
        arguments = _summed(Named(weights**2 * (_FUNCTION_ULPS**2 + _finite(gap.array) ** 2), gap.axes), axes)
        total = combine(
            _NUMPY,
            lambda s, a: self._sum_scale(s, np.ones(s.shape), terms) ** 2 + self.unit**2 / 3 * a,
            squares,
            arguments,
        )
        scale = combine(
            _NUMPY,
            lambda t, v: np.where(np.isfinite(v), np.sqrt(t + self.unit**2 / 3 * _finite(v) ** 2), 0.0),
            total,
            Named(base, names),
        )
        return self._disturbed(value, scale)

    def _sum_scale(self, squares: Any, total: Any, terms: int) -> Any:
        """The standard deviation of a sum's error, from the sum of squares and the sum of its terms."""
        steps = max(terms - 1, 0)
        return self.unit * np.sqrt(((steps / 2 + 1) * np.abs(squares) + steps / 3 * total**2) / 3)

    def _accumulated(self, value: Named, squares: Named, terms: int) -> Named:
        total = Named(_finite(first(value)), first_axes(value))
        squares = Named(first(squares), first_axes(squares))  # a condition that selects by noisy scores has samples
        scale = combine(_NUMPY, lambda s, t: self._sum_scale(s, t, terms), squares, total)
        return self._disturbed(value, scale)

    def _operand(self, operand: Named) -> Named:
        """An operand of a product, rounded where the model says so and it does not fit the format already."""
        if self.rounding.product == "ieee":
            return operand
        dtype = self.rounding.io if self.rounding.product == "io" else "tf32"
        if unit_roundoff(dtype) <= self.unit:
            return operand
        base = first(operand)
        fits = round_to(base, dtype) == base
        if fits.all() and SAMPLES not in operand.axes:
            return operand
        scale = np.where(
            fits & (SAMPLES not in operand.axes),
            0.0,
            unit_roundoff(dtype) / math.sqrt(3) * np.abs(_finite(base)),
        )
        return self._disturbed(operand, Named(scale, first_axes(operand)))

    def _relative(self, value: Named, units: float) -> Named:
        scale = self.unit * units / math.sqrt(3) * np.abs(first(value))
        return self._disturbed(value, Named(scale, first_axes(value)))

    def _disturbed(self, value: Named, scale: Named) -> Named:
        """The value with errors of the given standard deviations: uniform, independent between samples and elements."""
        axes = (SAMPLES, *first_axes(value))
        lengths = {SAMPLES: self.samples, **value.lengths()}
        draws = self.rng.random([lengths[axis] for axis in axes])
        draws -= 0.5
        draws *= spread(_NUMPY, Named(_finite(scale.array) * (2 * math.sqrt(3)), scale.axes), axes[1:])
        draws += spread(_NUMPY, value, axes)
        return Named(draws, axes)


def first(value: Named) -> Any:
    """The array of the first sample: what sizes of errors are computed from."""
    if SAMPLES not in value.axes:
        return np.asarray(value.array, dtype=np.float64)
    return np.take(value.array, 0, axis=value.axes.index(SAMPLES))


def first_axes(value: Named) -> tuple[str, ...]:
    """The axes of `first`."""
    return tuple(axis for axis in value.axes if axis != SAMPLES)


def _finite(array: Any) -> Any:
    array = np.asarray(array, dtype=np.float64)
    if math.isfinite(array.sum()):
        return array
    return np.where(np.isfinite(array), array, 0.0)


def _highest(value: Named, axes: tuple[str, ...]) -> Named:
    """The largest finite element over the axes; 0 where there is none."""
    over = tuple(value.axes.index(axis) for axis in axes if axis in value.axes)
    found = np.where(np.isfinite(value.array), value.array, -np.inf).max(axis=over, initial=-np.inf)
    return Named(_finite(found), tuple(axis for axis in value.axes if axis not in axes))


def _summed(value: Named, axes: tuple[str, ...]) -> Named:
    positions = tuple(k for k, axis in enumerate(value.axes) if axis in axes)
    return Named(np.sum(value.array, axis=positions), tuple(axis for axis in value.axes if axis not in axes))


class _Largest(Arithmetic):
    """Exact; remembers the largest array, which decides how many samples fit into memory at once."""

    def __init__(self) -> None:
        self.elements = 1

    def tensor(self, name: str, value: Named, computed: bool, backend: Backend) -> Named:
        self.elements = max(self.elements, math.prod(value.shape))
        return value


def sigma(
    program: Program,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    rounding: RoundingModel,
    outputs: Sequence[str] | None = None,
    rows: Mapping[str, Sequence[int]] | None = None,
    samples: int | None = None,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[np.float64]]]:
    """The exact outputs and the standard deviation of an honest implementation's error, element by element.

    Args:
        rounding: what may be rounded.
        samples: number of noisy evaluations; by default 64 for small arrays and fewer for larger ones, down to 8, and
            4 above four million elements, where long rows stabilise the estimate.
        seed: the result is the same for the same seed.
        (the others as for `evaluate`)

    Returns:
        exact: name -> float64 array. sigma: name -> array of the same shape, in the output's units: the root
        mean square of (noisy - exact), stabilised by the median of its row (last axis), and with the rounding
        of the output added. It is 0 where the exact value is not finite, and where it is 0 without any noise
        (a fully masked row).

    Raises:
        SpecError: unknown names in `rounding`, or whatever `evaluate` refuses.
    """
    unknown = sorted(name for name in rounding.stored if name not in program.definitions)
    if unknown:
        raise SpecError(f"stored names '{unknown[0]}', which no equation defines", file=program.file)
    if samples is not None and samples < 1:
        raise SpecError(f"samples is {samples}, expected at least 1", file=program.file)
    probe = _Largest()
    exact = evaluate(program, inputs, options, sizes=sizes, outputs=outputs, rows=rows, arithmetic=probe)
    if samples is None:
        samples = min(64, max(8 if probe.elements <= _LARGE else 4, _LARGE // probe.elements))
    squares = {name: np.zeros(value.shape) for name, value in exact.items()}
    counts = {name: np.zeros(value.shape) for name, value in exact.items()}
    at_once = max(1, min(samples, _ELEMENTS // probe.elements))
    rng = np.random.Generator(np.random.PCG64(seed))
    left = samples
    with np.errstate(all="ignore"):
        while left > 0:
            size = min(at_once, left)
            left -= size
            noisy = evaluate(
                program,
                inputs,
                options,
                sizes=sizes,
                outputs=outputs,
                rows=rows,
                arithmetic=Noisy(rounding, size, rng),
            )
            for name, value in exact.items():
                if noisy[name].ndim == value.ndim:
                    counts[name] += 1
                    continue
                error = noisy[name].astype(np.float64) - value
                good = np.isfinite(error)
                squares[name] += np.sum(np.where(good, error, 0.0) ** 2, axis=0)
                counts[name] += good.sum(axis=0)
        spread = {
            name: _final(exact[name], squares[name] / np.maximum(counts[name], 1), samples, rounding, name)
            for name in exact
        }
    return exact, spread


def _final(
    exact: NDArray[Any], variance: NDArray[np.float64], samples: int, rounding: RoundingModel, name: str
) -> NDArray[np.float64]:
    """The pooled standard deviation with the rounding of the output."""
    if exact.dtype != np.float64:
        return np.sqrt(variance)
    variance = np.where(np.isfinite(exact), variance, 0.0)
    if variance.ndim and variance.shape[-1] > 1:
        noisy = np.where(variance > 0, variance, np.nan)
        some = ~np.all(np.isnan(noisy), axis=-1, keepdims=True)
        middle = np.nanmedian(np.where(some, noisy, 0.0), axis=-1, keepdims=True)
        variance = (samples * variance + _POOL * np.minimum(middle, 9 * variance)) / (samples + _POOL)
    target = format_of(rounding.outputs.get(name, rounding.io))
    size = np.where(np.isfinite(exact), np.abs(exact), 0.0)
    last = (target.unit_roundoff * size) ** 2 / 3 + (unit_roundoff(rounding.accumulator) * size) ** 2 / 3
    step = target.smallest**2 / 12
    return np.sqrt(variance + np.where((size > 0) | (variance > 0), last + step, 0.0))


__all__ = ["Noisy", "RoundingModel", "sigma"]
