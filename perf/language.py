"""How fast and how lean the equation language's array evaluator is, beside hand-written NumPy.

    python -m attnspec.perf.language [--repeat 7]

prints one JSON object: the time of softmax attention at B=1, H=8, N=M=512, D=64 in float64, evaluated from its
equations and written by hand, their ratio, the peak memory that each allocates beyond its inputs, the size of an
`[h,i,j,d]` array (which must not be part of it), and the time of one small evaluation, of which a suite makes many.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnspec.spec.language import (
    Declarations,
    InputDecl,
    OutputDecl,
    Program,
    SizeDecl,
    evaluate,
    read,
    read_expression,
)

Float = NDArray[np.float64]

EQUATIONS = """
scale = D ** -0.5
P[h,i,j] = softmax[j](scale * sum[d](Q[h,i,d] * K[h,j,d]))
O[h,i,e] = sum[j](P[h,i,j] * V[h,j,e])
"""


def program() -> Program:
    """Plain softmax attention as equations."""
    axes = {"Q": ("h", "i", "d"), "K": ("h", "j", "d"), "V": ("h", "j", "e")}
    sizes = {"b": "B", "h": "H", "i": "N", "j": "M", "d": "D", "e": "E"}
    declarations = Declarations(
        sizes={size: SizeDecl(size) for size in sizes.values()},
        indices={index: read_expression(size) for index, size in sizes.items()},
        inputs={name: InputDecl(name, own, batch=("b",)) for name, own in axes.items()},
        options={},
        outputs={"O": OutputDecl("O", ("h", "i", "e"))},
        batch=("b",),
    )
    return read(EQUATIONS, declarations)


def by_hand(Q: Float, K: Float, V: Float) -> Float:
    """The same in NumPy, as one would write it. Arrays are [b, h, tokens, features]."""
    scores = (Q @ K.swapaxes(-1, -2)) * Q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    return np.asarray(weights @ V)


def fastest(function: Callable[[], Any], repeat: int) -> float:
    """The shortest time of `repeat` calls, in seconds, after one call to warm up."""
    function()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_bytes(function: Callable[[], Any]) -> int:
    """The peak of memory that a call allocates."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def drawn(B: int, H: int, N: int, M: int, D: int) -> dict[str, Float]:
    """Normal inputs."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((B, H, n, D)) for name, n in (("Q", N), ("K", M), ("V", M))}


def measure(repeat: int = 7) -> dict[str, Any]:
    """All figures, with the sizes that they hold for."""
    equations = program()
    B, H, N, M, D = 1, 8, 512, 512, 64
    inputs = drawn(B, H, N, M, D)
    small = drawn(2, 4, 20, 20, 16)

    def from_equations() -> Float:
        return np.asarray(evaluate(equations, inputs)["O"])

    difference = float(np.abs(from_equations() - by_hand(**inputs)).max())
    seconds, hand = fastest(from_equations, repeat), fastest(lambda: by_hand(**inputs), repeat)
    return {
        "sizes": {"B": B, "H": H, "N": N, "M": M, "D": D},
        "largest_difference": difference,
        "seconds": seconds,
        "seconds_by_hand": hand,
        "ratio": seconds / hand,
        "peak_bytes": peak_bytes(from_equations),
        "peak_bytes_by_hand": peak_bytes(lambda: by_hand(**inputs)),
        "bytes_of_hij": B * H * N * M * 8,
        "bytes_of_hijd": B * H * N * M * D * 8,
        "small": {
            "sizes": {"B": 2, "H": 4, "N": 20, "M": 20, "D": 16},
            "seconds": fastest(lambda: evaluate(equations, small), 20 * repeat),
            "seconds_by_hand": fastest(lambda: by_hand(**small), 20 * repeat),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeat", type=int, default=7, help="calls to take the fastest of")
    print(json.dumps(measure(parser.parse_args().repeat), indent=2))


if __name__ == "__main__":
    main()
