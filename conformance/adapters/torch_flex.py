"""FlexAttention: every option of the mechanism becomes a `score_mod` or a `mask_mod`.

`torch-flex` calls `flex_attention` without `torch.compile`, which computes the same programs with plain tensor
operations; `torch-flex-compiled` compiles each case, into C++ on the CPU and Triton on a GPU. A paged cache goes
through `torch.nn.attention.experimental._paged_attention`. Dropout is refused: a program over logits cannot drop a
weight without renormalising. On the CPU FlexAttention itself refuses gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnspec.conformance.adapters._library import MECHANISM, library, refusals, versions
from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported

Mod = Callable[..., Any]
REFUSALS: dict[type[Exception], tuple[str, ...]] = {
    NotImplementedError: ("does not support backward on CPU",),
    IndexError: ("Expected reduction dim",),
}


def _positions(
    N: int,
    M: Any,
    device: Any,
    *,
    top_left: bool,
    q_segment: Any,
    kv_segment: Any,
    q_length: Any,
    kv_length: Any,
    left_pad: Any,
) -> tuple[Mod, Mod, list[Mod]]:
    """Position of query i and of key j in their sequence, as functions of indices, and who is real."""
    rules: list[Mod] = []
    if q_segment is not None:
        torch = library("torch", "torch")
        same_q = q_segment[:, :, None] == q_segment[:, None, :]
        same_k = kv_segment[:, :, None] == kv_segment[:, None, :]
        across = q_segment[:, :, None] == kv_segment[:, None, :]
        before_q = torch.tril(torch.ones(N, N, dtype=torch.bool, device=device), -1)
        before_k = torch.tril(torch.ones(M, M, dtype=torch.bool, device=device), -1)
        place_q = (same_q & before_q).sum(-1)
        place_k = (same_k & before_k).sum(-1)
        if not top_left:
            place_q = place_q + across.sum(-1) - same_q.sum(-1)
        rules.append(lambda b, h, i, j: (q_segment[b, i] == kv_segment[b, j]) & (q_segment[b, i] >= 0))
        return (lambda b, i: place_q[b, i]), (lambda b, j: place_k[b, j]), rules
    if q_length is not None:
        rules.append(lambda b, h, i, j: i < q_length[b])
    if kv_length is not None:
        rules.append(lambda b, h, i, j: j - (0 if left_pad is None else left_pad[b]) < kv_length[b])
    if left_pad is not None:
        rules.append(lambda b, h, i, j: j >= left_pad[b])

    def offset(b: Any) -> Any:
        if top_left:
            return 0
        pad = 0 if left_pad is None else left_pad[b]
        keys = M - pad if kv_length is None else kv_length[b]
        return keys - (N if q_length is None else q_length[b])

    return (
        (lambda b, i: i + offset(b)),
        (lambda b, j: j if left_pad is None else j - left_pad[b]),
        rules,
    )


def _mask_mod(
    position_q: Mod,
    position_k: Mod,
    rules: list[Mod],
    *,
    mask: Any,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    chunk: int | None,
    sink_tokens: int,
) -> Mod | None:
    rules = list(rules)
    if mask is not None:
        rules.append(lambda b, h, i, j: _at(mask, b, h, i, j))
    if causal:
        rules.append(lambda b, h, i, j: position_k(b, j) <= position_q(b, i))
    if window_left is not None:
        rules.append(
            lambda b, h, i, j: (position_k(b, j) >= position_q(b, i) - window_left) | (position_k(b, j) < sink_tokens)
        )
    if window_right is not None:
        rules.append(lambda b, h, i, j: position_k(b, j) <= position_q(b, i) + window_right)
    if chunk is not None:
        rules.append(lambda b, h, i, j: position_k(b, j) // chunk == position_q(b, i) // chunk)
    if not rules:
        return None

    def combined(b: Any, h: Any, i: Any, j: Any) -> Any:
        keep = rules[0](b, h, i, j)
        for rule in rules[1:]:
            keep = keep & rule(b, h, i, j)
        return keep

    return combined


def _at(tensor: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    """An element of a [b|1, h|1, i|1, j] tensor; an axis of size 1 is read at 0, not indexed past its end."""
    zero = b * 0
    return tensor[
        b if tensor.shape[0] != 1 else zero, h if tensor.shape[1] != 1 else zero, i if tensor.shape[2] != 1 else zero, j
    ]


def _score_mod(bias: Any, softcap: float | None) -> Mod | None:
    if bias is None and softcap is None:
        return None
    torch = library("torch", "torch")

    def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if bias is None else score + _at(bias, b, h, i, j)

    return score_mod


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
        position_q, position_k, rules = _positions(
            N,
            M,
            Q.device,
            top_left=causal_alignment == "top_left",
            q_segment=q_segment,
            kv_segment=kv_segment,
            q_length=q_length,
            kv_length=kv_length,
            left_pad=left_pad,
        )
        mask_mod = _mask_mod(
            position_q,
            position_k,
            rules,
            mask=mask,
            causal=causal,
            window_left=window_left,
            window_right=window_right,
            chunk=chunk,
            sink_tokens=sink_tokens,
        )
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
