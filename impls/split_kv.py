"""Flash-decoding on Triton: the softmax engine over stated splits of the keys, and its merge."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported
from attnspec.impls.engines import runtime
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.softmax_launch import empty_outputs, plan_splits
from attnspec.impls.softmax_arguments import check_as

OUTPUTS = ("O", "LSE", "Op", "Lp")


@candidate(
    mechanism="flash_decoding_split_kv",
    outputs=OUTPUTS,
    output_dtypes={"LSE": "fp32", "Op": "fp32", "Lp": "fp32"},
    differentiable=False,
)
def flash_decoding_split_kv(
    Q: Tensor, K: Tensor | None = None, V: Tensor | None = None, kv_length: Tensor | None = None,
    cuts: Tensor | None = None, sink: Tensor | None = None, k_pages: Tensor | None = None,
    v_pages: Tensor | None = None, block_table: Tensor | None = None, *, splits: int = 1, causal: bool = False,
    window_left: int | None = None, softcap: float | None = None, scale: float | None = None, config: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Flash-decoding (Dao, Haziza, Massa, Sizov 2023): splits of the keys are attended separately, then merged.

    Args:
        Q: `[b,h,i,d]`, the last tokens of their sequences. K: `[b,g,j,d]`, V: `[b,g,j,e]`; head h reads key/value head
            h // (H / Hk). All of one dtype: fp16, bf16 or fp32. Any strides.
        kv_length: `[b]`, keys in use; what lies beyond is not read. sink: `[h]`, a logit that joins in the merge.
        k_pages, v_pages: `[page,slot,g,d|e]` with block_table `[b,k]`, instead of K and V.
        splits: even splits of the slots. cuts: `[b,x]`, further first slots of splits, in any order.
        causal, window_left, softcap, scale: as in softmax attention; the window is inclusive.
        config: a `TileConfig`, in place of the default; its `splits` do not count.

    Returns:
        O `[b,h,i,e]` in the inputs' dtype, LSE `[b,h,i]`, and of each split its output Op `[b,u,h,i,e]` and LSE
        Lp `[b,u,h,i]`, all three in float32. What sees no key has zeros and -inf.

    Raises: ValueError or TypeError for wrong arguments; Unsupported for head sizes beyond 256, and where a gradient is
        asked for.
    """
    call = Arguments("flash_decoding_split_kv")
    count = call.count("splits", splits)
    p = check_as(
        call.function, Q, K, V, kv_length=kv_length, sink=sink, k_pages=k_pages, v_pages=v_pages,
        block_table=block_table, causal=causal, window_left=window_left, softcap=softcap, scale=scale,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (Q, K, V, sink, k_pages, v_pages)):
        raise Unsupported("flash_decoding_split_kv: no kernel has gradients; call it under torch.no_grad()")
    call.tensor("Q", Q, "b h i d")
    if cuts is not None:
        call.lengths["x"] = cuts.shape[1] if isinstance(cuts, Tensor) and cuts.ndim == 2 else 0
        call.integers("cuts", cuts, "b x", 0, p.M)
    at = _bounds(p.M, count, cuts, p.B, Q.device)
    parts = at.shape[1] - 1
    if p.M == 0 or p.B * p.N == 0:
        O, LSE = empty_outputs(p)
        Op = torch.zeros((p.B, parts, p.H, p.N, p.E), dtype=torch.float32, device=Q.device)
        return O, LSE, Op, torch.full(Op.shape[:-1], -math.inf, dtype=torch.float32, device=Q.device)
    launches, found = plan_splits(p, at, config, runtime.target_of(p.Q))
    for launch in launches:
        launch.run(p.Q.device)
    O, LSE, Op, Lp = (found[name] for name in OUTPUTS)
    return O, LSE, Op, Lp


def _bounds(slots: int, splits: int, cuts: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """int32 `[b,splits+cuts+1]`: the first slot of every split, and behind the last one the number of slots.

    A slot's split is its even part's number plus the cuts up to it, so that all bounds in order are the first slots.
    """
    length = max(-(-slots // splits), 1)
    even = (torch.arange(1, splits, device=device) * length).clamp(max=slots).expand(batch, splits - 1)
    inner = even if cuts is None else torch.cat([even, cuts.to(even.dtype)], 1)
    return torch.nn.functional.pad(
        torch.nn.functional.pad(inner.sort(1).values, (1, 0)), (0, 1), value=slots
    ).to(torch.int32)  # fmt: skip


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Calls for the ahead-of-time compiler: (mechanism, label, call)."""

    def run(D: int, paged: bool) -> object:
        Q = torch.zeros(2, 8, 1, D, dtype=dtype)
        cache: dict[str, Any] = {name: torch.zeros(2, 2, 2048, D, dtype=dtype) for name in "KV"}
        if paged:
            cache = {name: torch.zeros(256, 16, 2, D, dtype=dtype) for name in ("k_pages", "v_pages")}
            cache |= {
                "block_table": torch.zeros(2, 128, dtype=torch.int32), "kv_length": torch.tensor([2000, 7]),
                "window_left": 512,
                "softcap": 30.0, "sink": torch.zeros(8),
            }  # fmt: skip
        return flash_decoding_split_kv(Q, **cache, splits=8, causal=True)

    for D in (64, 128):
        yield "flash_decoding_split_kv", f"plain-{D}", lambda D=D: run(D, False)  # type: ignore[misc]
        yield "flash_decoding_split_kv", f"paged-{D}", lambda D=D: run(D, True)  # type: ignore[misc]
