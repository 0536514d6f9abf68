"""What a candidate returned, taken apart: one array, a tuple or a dict becomes the mechanism's outputs by
name.

Wrong count, kind, shape, dtype or device is a `WrongResultError` whose text is the verdict's message. Used by
`calling`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attnspec.conformance.aliases import OUTPUT_ALIASES
from attnspec.conformance.bridges import device_of, dtype_name, is_array
from attnspec.conformance.candidate import Candidate

PRECISION = {"bf16": 8, "fp16": 11, "fp32": 24, "fp64": 53}


class WrongResultError(Exception):
    """The candidate returned something that is not what the mechanism's outputs look like."""


def unpack(result: Any, names: Sequence[str], candidate: Candidate) -> dict[str, Any]:
    """Name what was returned.

    Args:
        result: an array, a tuple or list of arrays in the order of `names`, or a dict by name, ignoring case.
        names: the mechanism's outputs in order.

    Raises:
        WrongResultError: anything else, more values than outputs, fewer than declared, or an unknown key.
    """
    wanted = candidate.outputs or tuple(names)
    if isinstance(result, Mapping):
        found = _by_name(result, names)
    elif isinstance(result, (tuple, list)):
        if len(result) > len(wanted) or (candidate.outputs and len(result) < len(wanted)):
            raise WrongResultError(f"returned {len(result)} values, expected {len(wanted)}: {', '.join(wanted)}")
        found = dict(zip(wanted, result, strict=False))
    else:
        if candidate.outputs and len(wanted) > 1:
            raise WrongResultError(f"returned {_kind(result)}, expected {len(wanted)} values: {', '.join(wanted)}")
        found = {wanted[0]: result}
    found.pop("_", None)
    for name in wanted if candidate.outputs else wanted[:1]:
        if name != "_" and name not in found:
            raise WrongResultError(f"returned no {name}")
    for name, value in found.items():
        if not is_array(value, candidate.framework):
            raise WrongResultError(f"returned {_kind(value)} for {name}, expected {_article(candidate.framework)}")
    return found


def check(
    name: str,
    value: Any,
    *,
    shape: Sequence[int],
    dtype: str,
    device: str,
    candidate: Candidate,
    first: bool,
    order: Sequence[int],
) -> None:
    """Raise `WrongResultError` unless the array is what output (or gradient) `name` must be.

    Args:
        shape: in the mechanism's axes; `order` permutes it into the candidate's layout.
        first: the main output and gradients must have the dtype of the inputs; statistics (LSE) may be more
            precise.
    """
    expected = tuple(shape[axis] for axis in order)
    got = tuple(int(size) for size in value.shape)
    if got != expected:
        raise WrongResultError(f"{name} has shape {got}, expected {expected}")
    actual = dtype_name(value.dtype)
    stated = candidate.output_dtypes.get(name)
    if stated is not None and actual != stated:
        raise WrongResultError(f"{name} is {actual}, declared {stated}")
    if stated is None and actual != dtype and (first or PRECISION.get(actual, 0) < PRECISION[dtype]):
        raise WrongResultError(f"{name} is {actual}, expected {dtype}{'' if first else ' or a more precise type'}")
    where = device_of(value, candidate.framework)
    if where != device:
        raise WrongResultError(f"{name} is on {where}, expected {device}")


def _by_name(result: Mapping[Any, Any], names: Sequence[str]) -> dict[str, Any]:
    known = {name.lower(): name for name in names} | {a: n for a, n in OUTPUT_ALIASES.items() if n in names}
    found: dict[str, Any] = {}
    for key, value in result.items():
        name = known.get(str(key).lower())
        if name is None:
            raise WrongResultError(f"returned an unknown output {key!r}; expected {', '.join(names)}")
        found[name] = value
    return found


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__module__}.{type(value).__name__}".replace("builtins.", "")


def _article(framework: str) -> str:
    return {"torch": "a torch tensor", "numpy": "a NumPy array", "jax": "a JAX array"}[framework]
