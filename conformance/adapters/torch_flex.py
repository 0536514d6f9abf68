"""FlexAttention: every option of the mechanism becomes a `score_mod` or a `mask_mod`.

`torch-flex` calls `flex_attention` without `torch.compile`, which computes the same programs with plain tensor
operations; `torch-flex-compiled` compiles each case, into C++ on the CPU and Triton on a GPU. A paged cache goes
through `torch.nn.attention.experimental._paged_attention`. Dropout is refused: a program over logits cannot drop a
weight without renormalising. On the CPU FlexAttention itself refuses gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnspec.conformance.adapters._library import MECHANISM, library, refusals, versions
from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported

Mod = Callable[..., Any]
REFUSALS: dict[type[Exception], tuple[str, ...]] = {
    NotImplementedError: ("does not support backward on CPU",),
    IndexError: ("Expected reduction dim",),
}


FAR = 1 << 40  # beyond every position


@dataclass(frozen=True)
class _Rules:
    """Who may attend to whom, as tables that one `mask_mod` reads: a program for each option would be compiled anew.

    Query i attends to key j when both have the same segment and j's place lies in first[i]..last[i], and at near[i] or
    later unless it is one of the first `sinks` of its sequence. What is no part of a sequence has a segment of its own.
    """

    q_segment: Any  # [b, i]
    kv_segment: Any  # [b, j]
    place: Any  # [b, j]
    first: Any  # [b, i]
    last: Any  # [b, i]
    near: Any  # [b, i]
    sinks: Any  # [b]

    def mask_mod(self, mask: Any) -> Mod:
        q_segment, kv_segment, place = self.q_segment, self.kv_segment, self.place
        first, last, near, sinks = self.first, self.last, self.near, self.sinks

        def by_place(b: Any, h: Any, i: Any, j: Any) -> Any:
            p = place[b, j]
            inside = (p >= first[b, i]) & (p <= last[b, i]) & ((p >= near[b, i]) | (p < sinks[b]))
            return (q_segment[b, i] == kv_segment[b, j]) & inside

        def by_place_and_mask(b: Any, h: Any, i: Any, j: Any) -> Any:
            return by_place(b, h, i, j) & mask[b, h, i, j]

        return by_place if mask is None else by_place_and_mask


def _places(
    B: int,
    N: int,
    M: int,
    device: Any,
    *,
    top_left: bool,
    q_segment: Any,
    kv_segment: Any,
    q_length: Any,
    kv_length: Any,
    left_pad: Any,
) -> tuple[Any, Any, Any, Any]:
    """Place [b, i] of each query and [b, j] of each key in its sequence, aligned with each other; their segments."""
    torch = library("torch", "torch")
    i, j = torch.arange(N, device=device), torch.arange(M, device=device)
    if q_segment is not None:
        same_q = q_segment[:, :, None] == q_segment[:, None, :]
        same_k = kv_segment[:, :, None] == kv_segment[:, None, :]
        across = q_segment[:, :, None] == kv_segment[:, None, :]
        place_q = (same_q & (i < i[:, None])).sum(-1)
        place_k = (same_k & (j < j[:, None])).sum(-1)
        if not top_left:
            place_q = place_q + across.sum(-1) - same_q.sum(-1)
        return place_q, place_k, torch.where(q_segment < 0, -FAR, q_segment), kv_segment
    zero = torch.zeros(B, 1, dtype=torch.int64, device=device)
    pad = zero if left_pad is None else left_pad[:, None]
    queries = zero + N if q_length is None else q_length[:, None]
    keys = zero + M - pad if kv_length is None else kv_length[:, None]
    place_q = i + (zero if top_left else keys - queries)
    place_k = j - pad
    real_q = i < queries
    real_k = (place_k >= 0) & (place_k < keys)
    return place_q, place_k, torch.where(real_q, 0, -FAR), torch.where(real_k, 0, -1)


def _rules(
    places: tuple[Any, Any, Any, Any],
    *,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    chunk: int | None,
    sink_tokens: int,
) -> _Rules:
    torch = library("torch", "torch")
    place_q, place_k, segment_q, segment_k = places
    first, last, near = (torch.full_like(place_q, end) for end in (-FAR, FAR, -FAR))
    if causal:
        last = place_q
    if window_right is not None:
        last = torch.minimum(last, place_q + window_right)
    if window_left is not None:
        near = place_q - window_left
    if chunk is not None:
        first = place_q // chunk * chunk
        last = torch.minimum(last, first + (chunk - 1))
    sinks = place_q.new_full(place_q.shape[:1], sink_tokens)
    return _Rules(segment_q, segment_k, place_k, first, last, near, sinks)


def _score_mod(bias: Any, softcap: float | None) -> Mod | None:
    torch = library("torch", "torch")

    def capped(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return softcap * torch.tanh(score / softcap)

    def biased(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score + bias[b, h, i, j]

    def capped_and_biased(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return softcap * torch.tanh(score / softcap) + bias[b, h, i, j]

    if bias is None:
        return None if softcap is None else capped
    return biased if softcap is None else capped_and_biased


def _paged(k_pages: Any, v_pages: Any, block_table: Any, kv_length: Any, N: int, mask_mod: Mod, score_mod: Any) -> Any:
    """K, V, block mask and score_mod over the physical cache, with PyTorch's own page translation."""
    torch = library("torch", "torch")
    flex = library("torch.nn.attention.flex_attention", "torch")
    paging = library("torch.nn.attention.experimental._paged_attention", "torch")
    batch, entries = block_table.shape
    pages, slots = k_pages.shape[:2]
    if not pages or not entries:
        raise Unsupported("PagedAttention needs at least one page")
    table = paging.PagedAttention(pages, slots, batch, device=k_pages.device)
    table.page_table = torch.zeros(batch, max(pages, entries), dtype=torch.int64, device=k_pages.device)
    used = -(-kv_length // slots) if kv_length is not None else torch.full((batch,), entries)
    for b in range(batch):
        for k in range(int(used[b])):
            page = int(block_table[b, k])
            if int(table.physical_to_logical[b, page]) >= 0:
                raise Unsupported("PagedAttention maps a physical page to one place of a sequence, this case to two")
            table.page_table[b, k] = page
            table.physical_to_logical[b, page] = k
    logical = flex.create_block_mask(
        mask_mod, batch, None, N, entries * slots, device=k_pages.device, BLOCK_SIZE=(max(N, 1), slots)
    )
    if entries > pages:
        raise Unsupported("PagedAttention's tables are as wide as the cache has pages")
    block_mask = table.convert_logical_block_mask(logical, kv_len=kv_length)
    K, V = (cache.reshape(1, pages * slots, *cache.shape[2:]).transpose(1, 2) for cache in (k_pages, v_pages))
    return K, V, block_mask, table.get_score_mod(score_mod, kv_length) if score_mod is not None else None


def _flex(compiled: bool, short_name: str) -> Any:
    @candidate(
        mechanism=MECHANISM,
        framework="torch",
        dtypes=("fp32", "fp16", "bf16", "fp64") if not compiled else ("fp32", "fp16", "bf16"),
        declares={"unseen_values": "multiplied"},
        outputs=None if compiled else ("O", "LSE"),
        guard_outputs=False,
        short_name=short_name,
        for_function=None if compiled else "torch.nn.attention.flex_attention:flex_attention",
        version=versions("torch", "triton"),
    )
    def attention(
        Q: Any,
        K: Any = None,
        V: Any = None,
        *,
        bias: Any = None,
        mask: Any = None,
        sink: Any = None,
        q_segment: Any = None,
        kv_segment: Any = None,
        q_length: Any = None,
        kv_length: Any = None,
        left_pad: Any = None,
        k_pages: Any = None,
        v_pages: Any = None,
        block_table: Any = None,
        causal: bool = False,
        causal_alignment: str = "bottom_right",
        window_left: int | None = None,
        window_right: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        chunk: int | None = None,
        sink_tokens: int = 0,
    ) -> Any:
        torch = library("torch", "torch")
        flex = library("torch.nn.attention.flex_attention", "torch")
        N = Q.shape[2]
        M = K.shape[2] if block_table is None else block_table.shape[1] * k_pages.shape[1]
        # The whole shape, so that the programs read every mask and every bias alike.
        mask, bias = (None if given is None else given.expand(*Q.shape[:3], M) for given in (mask, bias))
        lengths = {"q_segment": q_segment, "q_length": q_length, "kv_length": kv_length, "left_pad": left_pad}
        limits = {"window_left": window_left, "window_right": window_right, "chunk": chunk}
        mask_mod = None
        if causal or mask is not None or any(given is not None for given in (*lengths.values(), *limits.values())):
            places = _places(
                Q.shape[0],
                N,
                M,
                Q.device,
                top_left=causal_alignment == "top_left",
                kv_segment=kv_segment,
                **lengths,
            )
            mask_mod = _rules(places, causal=causal, sink_tokens=sink_tokens, **limits).mask_mod(mask)
        score_mod = _score_mod(bias, softcap)
        block_mask = None
        if block_table is not None:
            K, V, block_mask, score_mod = _paged(
                k_pages, v_pages, block_table, kv_length, N, mask_mod or flex.noop_mask, score_mod
            )
        elif mask_mod is not None:
            block_mask = flex.create_block_mask(mask_mod, Q.shape[0], Q.shape[1], N, M, device=Q.device)
        call = flex.flex_attention
        if compiled and Q.device.type == "cpu" and (Q.requires_grad or K.requires_grad or V.requires_grad):
            # The library says so itself, but the compiler wraps its exception.
            raise Unsupported("FlexAttention does not support backward on CPU")
        if compiled:
            torch._dynamo.reset()
            call = torch.compile(flex.flex_attention, fullgraph=True, dynamic=False)
        # Compiled for the CPU the library returns no LSE.
        with_lse = not compiled or Q.device.type != "cpu"
        if sink is not None and not with_lse:
            raise Unsupported("a sink needs the LSE, which flex_attention does not return when compiled for the CPU")
        with refusals(REFUSALS):
            result = call(
                Q,
                K,
                V,
                score_mod=score_mod,
                block_mask=block_mask,
                scale=scale,
                enable_gqa=Q.shape[1] != K.shape[1],
                return_aux=flex.AuxRequest(lse=True) if with_lse else None,
            )
        if not with_lse:
            return result
        out, extra = result
        # Without a query the library hands out None in place of an empty tensor.
        lse = torch.empty(Q.shape[:3], dtype=torch.float32, device=Q.device) if extra.lse is None else extra.lse
        return (out, lse) if sink is None else _with_sink(torch, out, lse, sink)

    return attention


def _with_sink(torch: Any, out: Any, LSE: Any, sink: Any) -> tuple[Any, Any]:
    """The sink enters after the fact, as PyTorch's examples do it: weights shrink by sigmoid(LSE - sink)."""
    logit = sink.to(LSE.dtype)[None, :, None]
    # A row without keys (LSE -inf) stays 0 whatever the sink, -inf included.
    shrink = torch.sigmoid(torch.where(torch.isneginf(LSE), LSE, LSE - logit))[..., None]
    return (out.to(LSE.dtype) * shrink).to(out.dtype), torch.logaddexp(LSE, logit)


torch_flex = _flex(False, "torch-flex")
torch_flex_compiled = _flex(True, "torch-flex-compiled")
