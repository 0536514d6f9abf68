"""Exact passage between float64 NumPy and the arrays of torch, NumPy and JAX.

The oracle's arrays are float64 and already rounded to the case's dtype, so every passage here must be exact:
`narrow` refuses a value that the dtype does not hold instead of rounding it behind the oracle's back. Used by
`memory` (which places the arrays) and `calling` (which reads results). A framework or dtype that is not
installed is a `CandidateError`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.candidate import CandidateError

# The NumPy dtype in which arrays of a dtype travel between processes: the narrowest that NumPy itself can
# compute with.
TRAVEL = {"fp32": "float32", "fp16": "float16", "bf16": "float32", "fp64": "float64"}
_TORCH = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}
_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


def dtype_name(dtype: Any) -> str:
    """The suite's name of a torch, NumPy or JAX dtype: "fp32", "bf16", ..., or its own name ("int64",
    "bool")."""
    text = str(dtype).removeprefix("torch.")
    return _NAMES.get(text, text)


def narrow(array: Any, dtype: str, name: str = "array") -> Any:
    """float64 to the dtype's travel form, exactly.

    Raises:
        CandidateError: a value that the travel dtype does not hold (a case that was not rounded to its
            dtype).
    """
    wide = np.asarray(array)
    if wide.dtype.kind != "f":
        return wide
    with np.errstate(over="ignore", invalid="ignore"):
        result = wide.astype(TRAVEL[dtype])
        same = np.array_equal(result.astype(np.float64), wide.astype(np.float64), equal_nan=True)
    if not same:
        raise CandidateError(f"{name}: holds values that are not {dtype}; cases must be rounded to their dtype first")
    return result


def torch_dtype(dtype: str) -> Any:
    """The torch dtype of "fp32", "fp16", "bf16", "fp64", "bool", "int32" or "int64"."""
    import torch

    return getattr(torch, _TORCH.get(dtype, dtype))


def numpy_dtype(dtype: str) -> Any:
    """The NumPy dtype; bf16 comes from the package ml_dtypes.

    Raises:
        CandidateError: bf16 without ml_dtypes.
    """
    if dtype == "bf16":
        try:
            import ml_dtypes
        except ImportError:
            raise CandidateError("bf16 NumPy arrays need the package ml_dtypes, which is not installed") from None
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(TRAVEL.get(dtype, dtype))


def to_jax(array: Any, dtype: str, device: str) -> Any:
    """A JAX array on the device. 64-bit types need x64 mode, which is switched on for the process."""
    import jax

    if dtype == "fp64" and not jax.config.jax_enable_x64:
        jax.config.update("jax_enable_x64", True)
    if dtype == "int64" and not jax.config.jax_enable_x64:
        dtype = "int32"
    where = jax.devices("gpu" if device == "cuda" else "cpu")[0]
    return jax.device_put(np.asarray(array).astype(numpy_dtype(dtype)), where)


def read(value: Any, framework: str) -> Any:
    """A result as NumPy in its travel form: bf16 widened to float32, everything else as it is."""
    if framework == "torch":
        import torch

        plain = value.detach()
        if plain.dtype == torch.bfloat16:
            plain = plain.to(torch.float32)
        return np.ascontiguousarray(plain.cpu().resolve_neg().resolve_conj().numpy()).copy()
    array = np.asarray(value)
    if dtype_name(array.dtype) == "bf16":
        return array.astype(np.float32)
    return np.array(array, copy=True)


def is_array(value: Any, framework: str) -> bool:
    """Whether a returned object is an array of the framework (a plain Python number is not)."""
    if framework == "torch":
        import torch

        return isinstance(value, torch.Tensor)
    if framework == "jax":
        import jax

        return isinstance(value, jax.Array)
    return isinstance(value, np.ndarray)


def device_of(value: Any, framework: str) -> str:
    """ "cpu" or "cuda" (an AMD GPU is "cuda" in torch, and in JAX's "gpu")."""
    if framework == "torch":
        return str(value.device.type)
    if framework == "jax":
        platform = next(iter(value.devices())).platform
        return "cuda" if platform in ("gpu", "cuda", "rocm") else str(platform)
    return "cpu"


def require(framework: str, device: str) -> None:
    """Import the framework and find the device.

    Raises:
        CandidateError: the framework is not installed, or it sees no such device.
    """
    if framework == "torch":
        try:
            import torch
        except ImportError:
            raise CandidateError("the candidate takes torch tensors and torch is not installed") from None
        if device == "cuda" and not torch.cuda.is_available():
            raise CandidateError("device cuda: torch sees no GPU here")
    elif framework == "jax":
        try:
            import jax
        except ImportError:
            raise CandidateError("the candidate takes JAX arrays and jax is not installed") from None
        if device == "cuda":
            try:
                jax.devices("gpu")
            except RuntimeError:
                raise CandidateError("device cuda: JAX sees no GPU here") from None
    elif device != "cpu":
        raise CandidateError(f"device {device}: NumPy arrays live on the cpu")


def synchronize(framework: str, device: str, values: Any = None) -> None:
    """Wait until the device has finished, so that faults and times belong to this call."""
    if framework == "torch" and device == "cuda":
        import torch

        torch.cuda.synchronize()
    elif framework == "jax" and values is not None:
        import jax

        jax.block_until_ready(values)
