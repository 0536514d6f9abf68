"""Candidates that do what kernels do on their worst days; the tests of the worker and the runner pose them.

Each function is wrong in the one way that its name says and computes attention with PyTorch otherwise.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from typing import Any

import torch

from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported

described = candidate(mechanism="softmax_attention")


def attention(q: Any, k: Any, v: Any, scale: float | None = None) -> Any:
    """Honest attention, grouped heads included."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1).float(), v.repeat_interleave(groups, 1).float()
    logits = (q.float() @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (logits.softmax(-1) @ v).to(q.dtype)


@described
def honest(q: Any, k: Any, v: Any) -> Any:
    return attention(q, k, v)


@described
def segfaults(q: Any, k: Any, v: Any) -> Any:
    ctypes.string_at(0)
    return attention(q, k, v)


@described
def segfaults_when_decoding(q: Any, k: Any, v: Any) -> Any:
    if q.shape[2] == 1:
        ctypes.string_at(0)
    return attention(q, k, v)


@described
def loops_forever(q: Any, k: Any, v: Any) -> Any:
    while True:
        pass


@described
def sleeps_when_decoding(q: Any, k: Any, v: Any) -> Any:
    if q.shape[2] == 1:
        time.sleep(3600)
    return attention(q, k, v)


@described
def waits_a_second(q: Any, k: Any, v: Any) -> Any:
    time.sleep(1.0)
    return attention(q, k, v)


@described
def returns_its_input(q: Any, k: Any, v: Any) -> Any:
    return v


@candidate(mechanism="softmax_attention", outputs=("O",))
def returns_its_query(q: Any, k: Any, v: Any) -> Any:
    return torch.cat([q, q], -1)[..., : v.shape[-1]] if q.shape[-1] != v.shape[-1] else q


@described
def returns_a_view_of_its_input(q: Any, k: Any, v: Any) -> Any:
    return v[:, :1, :1].expand(q.shape[0], q.shape[1], q.shape[2], v.shape[-1])


@described
def calls_the_oracle(q: Any, k: Any, v: Any) -> Any:
    from attnspec.spec import load

    arrays = {name: x.double().numpy() for name, x in (("Q", q), ("K", k), ("V", v))}
    return torch.from_numpy(load("softmax_attention").evaluate(arrays)["O"]).to(q.dtype)


@described
def calls_the_reference(q: Any, k: Any, v: Any) -> Any:
    from attnspec.reference.softmax_attention import softmax_attention

    found = softmax_attention(q.double().numpy(), k.double().numpy(), v.double().numpy())
    return torch.from_numpy(found["O"]).to(q.dtype)


@described
def writes_out_of_bounds(q: Any, k: Any, v: Any) -> Any:
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    out.copy_(attention(q, k, v))
    beyond = out.as_strided((3,), (1,), out.storage_offset() + out.numel())
    beyond.fill_(1.0)
    return out


@described
def writes_before_its_input(q: Any, k: Any, v: Any) -> Any:
    k.as_strided((2,), (1,), k.storage_offset() - 5).fill_(0.0)
    return attention(q, k, v)


@described
def reads_out_of_bounds(q: Any, k: Any, v: Any) -> Any:
    out = attention(q, k, v)
    # The last row also sees the key after the last one.
    beyond = v.as_strided((v.shape[-1],), (1,), v.storage_offset() + v.numel())
    out[0, 0, -1] += 0.5 * beyond
    return out


@described
def mutates_its_input(q: Any, k: Any, v: Any) -> Any:
    out = attention(q, k, v)
    k.mul_(2.0)
    return out


@described
def right_only_for_contiguous(q: Any, k: Any, v: Any) -> Any:
    def flat(x: Any) -> Any:
        return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride(), x.storage_offset())

    return attention(flat(q), flat(k), flat(v))


@described
def exits(q: Any, k: Any, v: Any) -> Any:
    sys.exit(3)


@described
def exits_hard(q: Any, k: Any, v: Any) -> Any:
    os._exit(0)


@described
def raises(q: Any, k: Any, v: Any) -> Any:
    raise ValueError("head size 4 is odd\nand this is a second line")


@described
def prints(q: Any, k: Any, v: Any) -> Any:
    print("hello from the kernel")
    print("and from its error stream", file=sys.stderr)
    os.write(1, b"and from below Python\n")
    return attention(q, k, v)


@described
def wrong_shape(q: Any, k: Any, v: Any) -> Any:
    return attention(q, k, v).transpose(1, 2)


@described
def wrong_dtype(q: Any, k: Any, v: Any) -> Any:
    return attention(q, k, v).double()


_by_shape: dict[Any, Any] = {}


@described
def caches_by_shape(q: Any, k: Any, v: Any) -> Any:
    if (q.shape, q.dtype) not in _by_shape:
        _by_shape[q.shape, q.dtype] = attention(q, k, v)
    return _by_shape[q.shape, q.dtype].clone()


@described
def reuses_its_output(q: Any, k: Any, v: Any) -> Any:
    shape = (*q.shape[:3], v.shape[-1], q.dtype)
    if shape not in _by_shape:
        _by_shape[shape] = torch.empty(shape[:-1], dtype=q.dtype)
    return _by_shape[shape].copy_(attention(q, k, v))


@described
def returns_nan(q: Any, k: Any, v: Any) -> Any:
    return attention(q, k, v) * float("nan")


@described
def never_writes_a_row(q: Any, k: Any, v: Any) -> Any:
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    out[:, :, :-1] = attention(q, k, v)[:, :, :-1]
    return out


@described
def allocates_too_much(q: Any, k: Any, v: Any) -> Any:
    torch.ones(100 << 30, dtype=torch.uint8)
    return attention(q, k, v)


@described
def raises_in_a_thread(q: Any, k: Any, v: Any) -> Any:
    def work() -> None:
        raise RuntimeError("the helper failed")

    threading.Thread(target=work).start()
    return attention(q, k, v)


@described
def returns_none(q: Any, k: Any, v: Any) -> Any:
    attention(q, k, v)


@described
def differs_between_calls(q: Any, k: Any, v: Any) -> Any:
    return attention(q, k, v) + 1e-6 * torch.randn(())


@described
def refuses_decoding(q: Any, k: Any, v: Any) -> Any:
    if q.shape[2] == 1:
        raise Unsupported("one query is not supported")
    return attention(q, k, v)


@described
def refuses_everything(q: Any, k: Any, v: Any) -> Any:
    raise Unsupported("not on this machine")


@described
def breaks_its_gradient(q: Any, k: Any, v: Any) -> Any:
    return attention(q, k.detach(), v)
