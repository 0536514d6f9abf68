"""The safetensors format, written and read with NumPy alone.

A file is the length of a JSON header (8 bytes, little endian), the header, and the tensors' bytes without gaps. The
published package is not used because its numpy interface has no bfloat16 and its raw interface changes between
versions; tests read our files with it. Reals are float64 arrays here, narrowed to the stored dtype exactly or refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnspec.conformance.report.files import FileError

STORED: dict[str, tuple[str, np.dtype[Any]]] = {
    "fp64": ("F64", np.dtype("<f8")), "fp32": ("F32", np.dtype("<f4")), "fp16": ("F16", np.dtype("<f2")),
    "bf16": ("BF16", np.dtype("<u2")), "bool": ("BOOL", np.dtype("?")), "int64": ("I64", np.dtype("<i8")),
}  # fmt: skip
BY_CODE = {code: name for name, (code, _) in STORED.items()}
ALIGNMENT = 8


def dump(tensors: Mapping[str, tuple[NDArray[Any], str]], metadata: Mapping[str, str]) -> bytes:
    """A file's content.

    Args:
        tensors: array and stored dtype (`fp64 fp32 fp16 bf16 bool int64`) by name.

    Raises:
        FileError: an array with a value that its dtype cannot hold.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts: list[bytes] = []
    offset = 0
    # Widest first keeps every tensor aligned to its own element size.
    for name in sorted(tensors, key=lambda name: (-STORED[tensors[name][1]][1].itemsize, name)):
        array, dtype = tensors[name]
        content = _to_bytes(array, dtype, name)
        header[name] = {
            "dtype": STORED[dtype][0],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(content)],
        }
        parts.append(content)
        offset += len(content)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def load(content: bytes) -> dict[str, NDArray[Any]]:
    """The tensors of a file, reals as float64.

    Raises:
        FileError: not a safetensors file, or one with a dtype that is not written here.
    """
    try:
        length = int.from_bytes(content[:8], "little")
        if len(content) < 8 + length:
            raise ValueError(f"it ends inside its header of {length} bytes")
        header = json.loads(content[8 : 8 + length])
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        found = {}
        for name, entry in entries.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = _from_bytes(content[begin:end], BY_CODE[entry["dtype"]], entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"not a safetensors file that can be read here: {type(error).__name__}: {error}") from None
    return found


def _to_bytes(array: NDArray[Any], dtype: str, name: str) -> bytes:
    stored = STORED[dtype][1]
    if dtype == "bf16":
        with np.errstate(over="ignore"):
            bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
        content = (bits >> 16).astype(stored).tobytes()
    else:
        with np.errstate(over="ignore"):
            content = np.ascontiguousarray(array).astype(stored).tobytes()
    back = _from_bytes(content, dtype, array.shape)
    if not np.array_equal(back, array, equal_nan=array.dtype.kind == "f"):
        raise FileError(f"tensor {name} holds values that are no {dtype} numbers")
    return content


def _from_bytes(content: bytes, dtype: str, shape: Sequence[int]) -> NDArray[Any]:
    raw = np.frombuffer(content, dtype=STORED[dtype][1]).reshape(tuple(shape))
    if dtype == "bf16":
        widened: NDArray[Any] = (raw.astype("<u4") << 16).view("<f4").astype(np.float64)
        return widened
    return raw.astype(np.float64) if raw.dtype.kind == "f" else raw.copy()
