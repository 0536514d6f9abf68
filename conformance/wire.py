"""Messages between the runner and a worker: pickles with their arrays out of band, length-prefixed, over a
pipe.

A message is a count of parts, their lengths, and the parts: the pickle first, then the raw bytes of its
arrays, so that large arrays are not copied into the pickle. The pipe is private to the two processes; what
the candidate prints goes elsewhere.
"""

from __future__ import annotations

import os
import pickle
import struct
from typing import Any

_CHUNK = 1 << 24


def send(descriptor: int, message: Any) -> None:
    """Write one message; raises BrokenPipeError where nobody reads any more."""
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(body), *(buffer.raw() for buffer in buffers)]
    header = struct.pack(f"<Q{len(parts)}Q", len(parts), *(part.nbytes for part in parts))
    for part in (memoryview(header), *parts):
        done = 0
        while done < part.nbytes:
            done += os.write(descriptor, part[done : done + _CHUNK])


def receive(descriptor: int) -> Any:
    """Read one message; raises EOFError where the other side is gone."""
    (count,) = struct.unpack("<Q", _exactly(descriptor, 8))
    lengths = struct.unpack(f"<{count}Q", _exactly(descriptor, 8 * count))
    body, *buffers = [_exactly(descriptor, length) for length in lengths]
    return pickle.loads(body, buffers=buffers)


def _exactly(descriptor: int, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    done = 0
    while done < size:
        read = os.readv(descriptor, [view[done : done + _CHUNK]])
        if not read:
            raise EOFError("the other process closed the pipe")
        done += read
    return data
