"""Flow attention on Triton: the kernels of `engines.flow_network` and the sums between them."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnspec.conformance.candidate import candidate
from attnspec.impls.engines import runtime
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.flow_network import (
    flow_causal_kernel,
    flow_gather_kernel,
    flow_output_kernel,
    flow_stream_kernel,
    flow_sums_kernel,
)
from attnspec.impls.engines.launch import Launch, without_spills
from attnspec.impls.engines.softmax_configs import padded

MOST_FEATURES = 256
BLOCKS = (32, 16, 64)
"""Tokens of a tile; the first is taken by default."""
SPAN = 1024
"""Tokens whose sums one program takes, on a device."""


@dataclass(frozen=True)
class _Network:
    """One call: Q `[b,h,i,d]`, K `[b,h,j,d]`, V `[b,h,j,e]`, lengths `[b]` or None."""

    Q: Tensor
    K: Tensor
    V: Tensor
    nq: Tensor | None
    nk: Tensor | None
    relu: bool
    clip_at: float
    eps: float
    outer_eps: float
    block: int

    def launch(self, name: str, kernel: Any, programs: int, arguments: dict[str, Any], warps: int = 0) -> None:
        given = {"BLOCK": self.block} | arguments | {"H": self.Q.shape[1], "RELU": self.relu}
        taken = {entry: given[entry] for entry in kernel.arg_names}
        tile = without_spills(warps or (8 if self.heavy() else 4), runtime.target_of(self.Q))
        Launch(name, kernel, programs, taken, tile).run(self.Q.device)

    def heavy(self) -> bool:
        """Whether a device would have too few registers for four warps and 64 value features."""
        many = padded(self.Q.shape[-1]) > 64 or self.Q.dtype == torch.float32
        return many and runtime.target_of(self.Q) is not None

    def heads(self) -> int:
        return int(self.Q.shape[0] * self.Q.shape[1])

    def sizes(self) -> dict[str, int]:
        D, E = self.Q.shape[-1], self.V.shape[-1]
        features = min(padded(D), 64 if self.heavy() else 128)
        values = min(padded(E), 32 if self.heavy() else 64)
        return {
            "D": D, "E": E, "D_PAD": padded(D), "D_BLOCK": features, "D_BLOCKS": max(1, -(-D // features)),
            "E_BLOCK": values, "E_BLOCKS": -(-E // values),
        }  # fmt: skip

    def spans(self, tokens: int) -> tuple[int, int]:
        """Number of spans and tiles per span; a program takes one span."""
        steps = max(1, min(-(-tokens // self.block), (SPAN if runtime.target_of(self.Q) else 64) // self.block))
        return -(-tokens // (steps * self.block)), steps

    def sums(self, X: Tensor, length: Tensor | None, other: Tensor | None, partial: bool) -> tuple[Tensor, Tensor]:
        """Flows `[b,h,i]` to `other` `[b,h,d]` (if given), and the sum `[b,h,d]` of features over their flows."""
        B, H, N, D = X.shape
        spans, steps = self.spans(N)
        where: dict[str, Any] = {"dtype": torch.float32, "device": X.device}
        flow = torch.empty((B, H, N), **where)
        parts = torch.empty((B, H, spans, D), **where)
        arguments = {
            "X": X, "LENGTH": length, "OTHER": other, "FLOW": flow, "PARTIAL": parts if partial else None,
            **_strides("x", X, "bhid"), "N": N, "spans": spans, "steps": steps, "eps": self.eps,
            "outer_eps": self.outer_eps, **self.sizes(),
        }  # fmt: skip
        self.launch("flow_sums", flow_sums_kernel, self.heads() * spans, arguments)
        return flow, parts.sum(2)

    def bidirectional(self) -> Tensor:
        B, H, N, _ = self.Q.shape
        M, E = self.V.shape[2:]
        _, keys = self.sums(self.K, self.nk, None, True)
        _, queries = self.sums(self.Q, self.nq, None, True)
        incoming, received = self.sums(self.Q, self.nq, keys, True)
        _, released = self.sums(self.K, self.nk, queries, True)
        conserved, _ = self.sums(self.Q, self.nq, released, False)
        rival, _ = self.sums(self.K, self.nk, received, False)
        real = torch.full((B, 1, 1), float(M), device=self.Q.device)
        sinks = torch.full((B, 1, 1), float(N), device=self.Q.device)
        rival = rival.clamp(-self.clip_at, self.clip_at)
        if self.nk is not None:
            real = self.nk.float()[:, None, None]
            beyond = torch.arange(M, device=self.Q.device) >= real
            rival = rival.masked_fill(beyond, -math.inf)
        if self.nq is not None:
            sinks = self.nq.float()[:, None, None]
        # A row of padding alone has no softmax; its weights are never read.
        weight = real * torch.softmax(rival, -1)
        gain = torch.sigmoid(conserved * sinks / real.clamp(min=1.0)) / incoming
        gain = torch.where(real > 0.0, gain, 0.0).contiguous()
        spans, steps = self.spans(M)
        sizes = self.sizes()
        parts = torch.empty((B, H, spans, sizes["D"], E), dtype=torch.float32, device=self.Q.device)
        arguments = {
            "K": self.K, "V": self.V, "LENGTH": self.nk, "WEIGHT": weight.contiguous(), "PARTIAL": parts,
            **_strides("k", self.K, "bhid"), **_strides("v", self.V, "bhie"), "N": M, "spans": spans, "steps": steps,
            **sizes,
        }  # fmt: skip
        programs = self.heads() * spans * sizes["D_BLOCKS"] * sizes["E_BLOCKS"]
        self.launch("flow_gather", flow_gather_kernel, programs, arguments)
        O = torch.empty((B, H, N, E), dtype=self.V.dtype, device=self.Q.device)
        tiles = -(-N // self.block)
        arguments = {
            "Q": self.Q, "LENGTH": self.nq, "GAIN": gain, "STATE": parts.sum(2), "O": O,
            **_strides("q", self.Q, "bhid"), **_strides("o", O, "bhie"), "N": N, "spans": tiles, **sizes,
        }  # fmt: skip
        self.launch("flow_output", flow_output_kernel, self.heads() * tiles * sizes["E_BLOCKS"], arguments)
        return O

    def causal(self) -> Tensor:
        B, H, N, _ = self.Q.shape
        where: dict[str, Any] = {"dtype": torch.float32, "device": self.Q.device}
        sizes = self.sizes()
        parts = sizes["D_BLOCKS"]
        # Blocks of features add up; of one block the kernel writes the output itself.
        kind = self.V.dtype if parts == 1 else torch.float32
        O = torch.empty((parts, B, H, N, self.V.shape[-1]), dtype=kind, device=self.Q.device)
        # Ten tiles of all features are alive at once in the flows: eight numbers of each for a thread.
        block = min(self.block, 8 if sizes["D_PAD"] > 128 else 16) if runtime.target_of(self.Q) else self.block
        arguments = {
            "Q": self.Q, "K": self.K, "V": self.V, "GAIN": torch.empty((B, H, N), **where),
            "WEIGHT": torch.empty((B, H, N), **where), "O": O, **_strides("q", self.Q, "bhid"),
            **_strides("k", self.K, "bhid"), **_strides("v", self.V, "bhie"), **_strides("o", O, "dbhie"), "N": N,
            "eps": self.eps, "outer_eps": self.outer_eps, "clip_at": self.clip_at, **sizes,
        }  # fmt: skip
        flows = arguments | {"BLOCK": block, "steps": -(-N // block)}
        self.launch("flow_causal", flow_causal_kernel, self.heads(), flows, 4 if sizes["D_PAD"] <= 64 else 8)
        arguments["steps"] = -(-N // self.block)
        self.launch("flow_stream", flow_stream_kernel, self.heads() * parts * sizes["E_BLOCKS"], arguments)
        return O[0] if parts == 1 else O.sum(0).to(self.V.dtype)


def _strides(prefix: str, tensor: Tensor, axes: str) -> dict[str, int]:
    return {f"{prefix}_{axis}": step for axis, step in zip(axes, tensor.stride())}


@candidate(mechanism="flow_attention", outputs=("O",), differentiable=False)
def flow_attention(
    Q: Tensor, K: Tensor, V: Tensor, q_length: Tensor | None = None, kv_length: Tensor | None = None, *,
    causal: bool = False, phi: str = "sigmoid", clip_at: float = 1.0, eps: float = 1e-6, outer_eps: float = 0.0,
    block: int = BLOCKS[0],
) -> Tensor:  # fmt: skip
    """Linear attention as a flow network: sources compete, sinks are gated (Wu et al., arXiv 2202.06258, section 3.2).

    Args:
        Q: `[b,h,i,d]`. K: `[b,h,j,d]`. V: `[b,h,j,e]`. All of one dtype: fp16, bf16 or fp32, d and e at most 256.
        q_length, kv_length: `[b]`, the real queries and keys; not in the causal form. Others are not read.
        causal: every sum runs up to the position; as many queries as keys. phi: "sigmoid" or "relu" (plus 1e-6).
        clip_at: bound of the conserved outgoing flow, may be infinite. eps: added to both factors of a flow.
        outer_eps: added to each flow. block: tokens of a tile, one of BLOCKS; the result does not depend on it.

    Returns:
        O `[b,h,i,e]` in the inputs' dtype; padding, and rows without a real key, are zero. Not differentiable.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for features beyond 256.
    """
    call = Arguments("flow_attention")
    call.tensor("Q", Q, "b h i d")
    call.tensor("K", K, "b h j d")
    call.tensor("V", V, "b h j e")
    call.at_most("d e", MOST_FEATURES)
    N, M = call.sizes("i j")
    nq = call.integers("q_length", q_length, "b", 0, N)
    nk = call.integers("kv_length", kv_length, "b", 0, M)
    if phi not in ("sigmoid", "relu"):
        raise call.wrong("phi", "'sigmoid' or 'relu'", repr(phi))
    bound = math.inf if clip_at == math.inf else call.number("clip_at", clip_at)
    for name, value in (("clip_at", bound), ("eps", call.number("eps", eps)),
                        ("outer_eps", call.number("outer_eps", outer_eps))):  # fmt: skip
        if value < 0.0:
            raise call.wrong(name, "at least 0", value)
    if block not in BLOCKS:
        raise call.wrong("block", f"one of {BLOCKS}", block)
    if call.flag("causal", causal):
        if N != M:
            raise call.wrong("K", f"of as many positions as Q in the causal form, {N}", M)
        if q_length is not None or kv_length is not None:
            raise ValueError("flow_attention: the causal form takes no lengths")
    call.no_gradients(Q, K, V)
    runtime.target_of(Q)
    lengths = [None if x is None else x.to(torch.int32).contiguous() for x in (nq, nk)]
    network = _Network(Q, K, V, lengths[0], lengths[1], phi == "relu", bound, float(eps), float(outer_eps), block)
    return network.causal() if causal else network.bidirectional()


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(mechanism, label, call) for the ahead-of-time compiler."""
    for D in (64, 256):
        for causal in (False, True):

            def call(D: int = D, causal: bool = causal) -> object:
                Q, K, V = (torch.zeros(1, 2, 512, D, dtype=dtype) for _ in range(3))
                return flow_attention(Q, K, V, causal=causal)

            yield "flow_attention", f"{'causal' if causal else 'both'}-d{D}", call
