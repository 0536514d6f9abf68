"""Throughput of the softmax kernels beside what a user would pick instead, in one run, as ratios.

    python -m attnspec.perf.softmax [--device cuda|cpu] [--json FILE] [--quick]

On a GPU: the Triton engine, forward and backward, against PyTorch's SDPA with each backend, FlexAttention and, where it
is installed, FlashAttention. On a CPU Triton only interprets, so there the equations' evaluator and the reference are
timed against SDPA: the path stays tested, and the figures say what a conformance run costs. A kernel whose output does
not agree with the float64 equations is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attnspec.spec import load

Function = Callable[[Any, Any, Any, bool], Any]
BASELINE = "sdpa"


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement; `causal` halves the work."""

    B: int
    H: int
    Hk: int
    N: int
    M: int
    D: int
    causal: bool

    @property
    def flops(self) -> float:
        """Multiply-adds count twice; causal work is the kept pairs."""
        pairs = (
            sum(min(self.M, max(0, i + self.M - self.N + 1)) for i in range(self.N)) if self.causal else self.N * self.M
        )
        return 4.0 * self.B * self.H * pairs * self.D


@dataclass
class Row:
    """One timing: median seconds over interleaved repeats, its spread, and the ratio to the baseline."""

    name: str
    direction: str
    dtype: str
    shape: dict[str, Any]
    seconds: float
    spread: float
    ratio_to_sdpa: float
    tflops: float
    largest_error: float


SHAPES = {
    "cpu": [Shape(1, 8, 8, 512, 512, 64, False), Shape(1, 8, 2, 512, 512, 64, True)],
    "cuda": [
        Shape(4, 32, 32, 4096, 4096, 128, False),
        Shape(4, 32, 32, 4096, 4096, 128, True),
        Shape(4, 32, 8, 4096, 4096, 128, True),
        Shape(1, 32, 32, 16384, 16384, 64, True),
        Shape(64, 32, 8, 1, 8192, 128, True),
        Shape(2, 16, 16, 2048, 2048, 256, True),
    ],
}


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m attnspec.perf.softmax", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=None, help="fp32, fp16 or bf16; bf16 on a GPU, fp32 on a CPU by default")
    parser.add_argument("--json", type=Path, help="write the measurements and the machine's fingerprint here")
    parser.add_argument("--quick", action="store_true", help="first shape only, three repeats")
    arguments = parser.parse_args(argv)
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is available here; use --device cpu", file=sys.stderr)
        return 2
    dtype = arguments.dtype or ("bf16" if device == "cuda" else "fp32")
    shapes = SHAPES[device][:1] if arguments.quick else SHAPES[device]
    rows = [row for shape in shapes for row in measure(shape, dtype, device, 3 if arguments.quick else 15)]
    for row in rows:
        print(
            f"{row.name:22} {row.direction:8} {row.dtype} {_label(row.shape):44} {row.seconds * 1e3:9.3f} ms "
            f"±{row.spread * 100:4.1f}%  {row.ratio_to_sdpa:6.2f}x sdpa  {row.tflops:7.2f} TFLOP/s"
        )
    if arguments.json:
        from attnspec.conformance.environment import fingerprint
        from attnspec.conformance.report.files import write

        document = {"environment": fingerprint("torch", device), "rows": [asdict(row) for row in rows]}
        write(arguments.json, json.dumps(document, indent=1) + "\n")
    return 0


def measure(shape: Shape, dtype: str, device: str, repeats: int) -> list[Row]:
    """Judge every contender on a few rows, then time the honest ones interleaved, forward and backward."""
    import torch

    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    generator = torch.Generator().manual_seed(0)

    def tensor(heads: int, length: int) -> Any:
        return torch.randn(shape.B, heads, length, shape.D, generator=generator).to(device, kind)

    q, k, v = tensor(shape.H, shape.N), tensor(shape.Hk, shape.M), tensor(shape.Hk, shape.M)
    errors = {}
    honest: dict[str, Function] = {}
    for name, function in contenders(device).items():
        error = _error(function, q, k, v, shape)
        if error is None:
            print(f"{name}: not timed, it does not take this shape", file=sys.stderr)
        elif error > 0.05:
            print(f"{name}: not timed, wrong by {error:.3g}", file=sys.stderr)
        else:
            honest[name], errors[name] = function, error
    rows = []
    for direction in ("forward", "backward"):
        jobs = {name: _job(function, q, k, v, shape.causal, direction) for name, function in honest.items()}
        times = interleaved({name: job for name, job in jobs.items() if job is not None}, repeats, device)
        for name, samples in times.items():
            seconds = statistics.median(samples)
            base = statistics.median(times[BASELINE])
            factor = 1.0 if direction == "forward" else 2.5
            rows.append(
                Row(
                    name,
                    direction,
                    dtype,
                    asdict(shape),
                    seconds,
                    (max(samples) - min(samples)) / seconds,
                    seconds / base,
                    factor * shape.flops / seconds / 1e12,
                    errors[name],
                )
            )
    return rows


def contenders(device: str) -> dict[str, Function]:
    """Functions `(q, k, v, causal) -> O` by name; SDPA with PyTorch's own choice is the baseline."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(q: Any, k: Any, v: Any, causal: bool) -> Any:
        if causal and q.shape[2] == 1:
            causal = False  # one query at the end sees every key
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )

    def with_backend(backend: Any) -> Function:
        def run(q: Any, k: Any, v: Any, causal: bool) -> Any:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, causal)

        return run

    found: dict[str, Function] = {BASELINE: sdpa}
    if device == "cpu":
        found["sdpa-math"] = with_backend(SDPBackend.MATH)
        found["equations-numpy"] = _equations
        found["reference-numpy"] = _reference
        return found
    for name, backend in (
        ("sdpa-flash", SDPBackend.FLASH_ATTENTION),
        ("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        found[name] = with_backend(backend)
    found["triton"] = _triton
    found["flex"] = _flex()
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return found
    found["flash-attn"] = lambda q, k, v, causal: flash_attn_func(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal
    ).transpose(1, 2)
    return found


def _triton(q: Any, k: Any, v: Any, causal: bool) -> Any:
    from attnspec.impls.softmax import softmax_attention

    return softmax_attention(q, k, v, causal=causal)[0]


def _flex() -> Function:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[tuple[int, int], Any] = {}

    def run(q: Any, k: Any, v: Any, causal: bool) -> Any:
        n, m = q.shape[2], k.shape[2]
        if causal and (n, m) not in masks:
            masks[n, m] = create_block_mask(lambda b, h, i, j: j <= i + (m - n), None, None, n, m, device=str(q.device))
        return compiled(q, k, v, block_mask=masks[n, m] if causal else None, enable_gqa=q.shape[1] != k.shape[1])

    return run


def _equations(q: Any, k: Any, v: Any, causal: bool) -> Any:
    import torch

    inputs = {name: tensor.double().numpy() for name, tensor in (("Q", q), ("K", k), ("V", v))}
    return torch.from_numpy(load("softmax_attention").evaluate(inputs, {"causal": causal}, outputs=["O"])["O"])


def _reference(q: Any, k: Any, v: Any, causal: bool) -> Any:
    import torch

    from attnspec.reference.softmax_attention import softmax_attention

    found = softmax_attention(q.double().numpy(), k.double().numpy(), v.double().numpy(), causal=causal)
    return torch.from_numpy(found["O"])


def _error(function: Function, q: Any, k: Any, v: Any, shape: Shape) -> float | None:
    """Largest error of 16 sampled rows of the first batch entry against the float64 equations; None when refused."""
    rows = sorted({int(x) for x in np.linspace(0, shape.N - 1, 16)})
    inputs = {name: tensor[:1].double().cpu().numpy() for name, tensor in (("Q", q), ("K", k), ("V", v))}
    want = load("softmax_attention").evaluate(inputs, {"causal": shape.causal}, outputs=["O"], rows={"i": rows})["O"]
    try:
        got = function(q, k, v, shape.causal)
    except (RuntimeError, ValueError, NotImplementedError):
        return None
    return float(np.max(np.abs(got[:1, :, rows].double().cpu().numpy() - want)))


def _job(function: Function, q: Any, k: Any, v: Any, causal: bool, direction: str) -> Callable[[], Any] | None:
    if direction == "forward":
        return lambda: function(q, k, v, causal)
    leaves = q, k, v = tuple(tensor.detach().clone().requires_grad_() for tensor in (q, k, v))
    try:
        out = function(q, k, v, causal)
    except RuntimeError:
        return None
    if not out.requires_grad:
        return None
    import torch

    cotangent = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True)


def interleaved(jobs: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of every job, the jobs taking turns so that a disturbance of the machine meets all of them."""
    import torch

    def once(job: Callable[[], Any]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        job()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for job in jobs.values():
        once(job)
        once(job)
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            samples[name].append(once(job))
    return samples


def _label(shape: dict[str, Any]) -> str:
    return ".".join(f"{name}{int(value)}" for name, value in shape.items())


if __name__ == "__main__":
    raise SystemExit(main())
