"""The Triton softmax attention against a plain float64 formula, in Triton's interpreter: every option, odd shapes, masks."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls.engines.softmax_configs import TileConfig  # noqa: E402
from attnspec.impls.softmax import configs, softmax_attention  # noqa: E402

INF = float("inf")
SMALL = TileConfig(16, 16, 1, 1)


def ranks(ids: Any) -> Any:
    """[b, n] -> how many earlier tokens of the same entry carry the same id."""
    same = ids[:, :, None] == ids[:, None, :]
    return torch.tril(same, -1).sum(-1)


def kept(x: dict[str, Any], N: int, M: int) -> Any:
    """The pairs [b, h, i, j] that the options keep, from the definition, one rule after the other."""
    B, H = x["Q"].shape[:2]
    i, j = torch.arange(N)[None, :, None], torch.arange(M)[None, None, :]
    zero = torch.zeros(B, dtype=torch.long)
    pad = x.get("left_pad", zero)[:, None, None]
    nq = x.get("q_length", zero + N)[:, None, None]
    nk = x["kv_length"][:, None, None] if "kv_length" in x else M - pad
    bottom = x.get("causal_alignment", "bottom_right") == "bottom_right"
    local, pos = j - pad, i + (nk - nq if bottom else 0)
    keep = (i < nq) & (local >= 0) & (local < nk)
    if "q_segment" in x:
        qs, ks = x["q_segment"], x["kv_segment"]
        keep = (qs[:, :, None] == ks[:, None, :]) & (qs >= 0)[:, :, None]
        lengths = (qs[:, :, None] == ks[:, None, :]).sum(-1) - (qs[:, :, None] == qs[:, None, :]).sum(-1)
        local = ranks(ks)[:, None, :]
        pos = (ranks(qs) + (lengths if bottom else 0))[:, :, None]
    if x.get("causal"):
        keep = keep & (local <= pos)
    if x.get("window_left") is not None:
        keep = keep & ((local >= pos - x["window_left"]) | (local < x.get("sink_tokens", 0)))
    if x.get("window_right") is not None:
        keep = keep & (local <= pos + x["window_right"])
    if x.get("chunk") is not None:
        keep = keep & (torch.div(local, x["chunk"], rounding_mode="floor") == torch.div(pos, x["chunk"], rounding_mode="floor"))
    keep = keep[:, None].expand(B, H, N, M)
    if "mask" in x:
        keep = keep & x["mask"]
    if "bias" in x:
        keep = keep & (x["bias"] > -INF)
    return keep


def formula(x: dict[str, Any]) -> tuple[Any, Any]:
    """O and LSE in float64. What is not kept is cut out before any product, so that NaN there does not spread."""
    Q = x["Q"].double()
    if "k_pages" in x:
        table = x["block_table"].long().clamp(min=0)
        K = x["k_pages"].double()[table].flatten(1, 2).transpose(1, 2)
        V = x["v_pages"].double()[table].flatten(1, 2).transpose(1, 2)
    else:
        K, V = x["K"].double(), x["V"].double()
    N, M, G = Q.shape[2], K.shape[2], Q.shape[1] // K.shape[1]
    K, V = K.repeat_interleave(G, 1), V.repeat_interleave(G, 1)
    keep = kept(x, N, M)
    scale = x.get("scale")
    S = (Q.shape[3] ** -0.5 if scale is None else scale) * (Q @ K.transpose(-1, -2))
    if x.get("softcap") is not None:
        S = x["softcap"] * torch.tanh(S / x["softcap"])
    if "bias" in x:
        S = S + x["bias"].double()
    S = torch.where(keep, S, -INF)
    LSE = torch.logsumexp(S, -1) if M else torch.full(Q.shape[:3], -INF, dtype=torch.float64)
    if "sink" in x:
        LSE = torch.logaddexp(LSE, x["sink"].double()[None, :, None])
    P = torch.where(keep, torch.exp(S - torch.where(LSE == -INF, 0.0, LSE)[..., None]), 0.0)
    if "dropout_mask" in x:
        P = P * x["dropout_mask"] / (1 - x.get("dropout_p", 0.0))
    terms = torch.where(keep[..., None], P[..., None] * V[:, :, None], 0.0)
    return terms.sum(-2), LSE


def tensors(
    B: int = 2, H: int = 4, Hk: int = 2, N: int = 21, M: int = 35, D: int = 20, E: int = 12, dtype: Any = None, seed: int = 0
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"Q": (B, H, N, D), "K": (B, Hk, M, D), "V": (B, Hk, M, E)}
    return {n: torch.randn(s, generator=g).to(dtype or torch.float32) for n, s in shapes.items()}


def extra(B: int = 2, H: int = 4, N: int = 21, M: int = 35) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(1, H, N, M, generator=g)
    bias[:, 1, 3] = -INF
    mask = torch.rand(B, 1, N, M, generator=g) < 0.6
    mask[0, 0, 5] = False  # an empty row
    mask[1, 0, 2, :32] = False  # a row whose first tiles are empty
    return {
        "bias": bias,
        "mask": mask,
        "sink": torch.randn(H, generator=g),
        "dropout_mask": torch.rand(B, H, N, M, generator=g) < 0.75,
        "q_length": torch.tensor([N - 4, N]),
        "kv_length": torch.tensor([M, 9]),
        "left_pad": torch.tensor([0, 18]),
        # Not sorted, not contiguous, with padding, and an id that only one side knows.
        "q_segment": torch.tensor([[0] * 6 + [3] * 9 + [-1] * 6, [5, 1, 1] * 7]),
        "kv_segment": torch.tensor([[0] * 2 + [3] * 20 + [4] * 9 + [-1] * 4, [1, 5, 7, 1, 1] * 7]),
    }


def close(got: Any, want: Any, tolerance: float = 3e-6) -> None:
    got, want = got.double(), want.double()
    assert got.shape == want.shape
    finite = torch.isfinite(want)
    assert torch.equal(torch.where(finite, 0.0, got), torch.where(finite, 0.0, want)), "infinities or NaN differ"
    error = torch.where(finite, got - want, 0.0).abs().max() if got.numel() else torch.zeros(())
    assert error <= tolerance * max(1.0, float(want[finite].abs().max()) if finite.any() else 1.0), float(error)


CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": ((), {}),
    "causal": ((), {"causal": True}),
    "top-left": ((), {"causal": True, "causal_alignment": "top_left"}),
    "window": ((), {"window_left": 5, "window_right": 2}),
    "window-zero": ((), {"window_left": 0, "window_right": 0}),
    "wide-window": ((), {"window_left": 2**40, "window_right": 2**40}),
    "left-window-top-left": ((), {"window_left": 3, "causal_alignment": "top_left"}),
    "sink-tokens": ((), {"causal": True, "window_left": 3, "sink_tokens": 2}),
    "many-sink-tokens": ((), {"causal": True, "window_left": 1, "sink_tokens": 18}),
    "chunk": ((), {"chunk": 7, "causal": True}),
    "chunk-top-left": ((), {"chunk": 16, "causal_alignment": "top_left"}),
    "softcap": ((), {"softcap": 0.8}),
    "wide-softcap": ((), {"softcap": 50.0}),
    "negative-scale": ((), {"scale": -0.4}),
    "zero-scale": ((), {"scale": 0.0}),
    "bias": (("bias",), {}),
    "mask": (("mask",), {"causal": True}),
    "sink": (("sink", "mask"), {}),
    "dropout": (("dropout_mask",), {"dropout_p": 0.25}),
    "lengths": (("q_length", "kv_length"), {"causal": True}),
    "lengths-chunk": (("q_length", "kv_length", "sink"), {"chunk": 5}),
    "left-pad": (("left_pad",), {"causal": True, "window_left": 4, "sink_tokens": 1}),
    "left-pad-length": (("left_pad", "kv_length", "q_length"), {"window_right": 1}),
    "segments": (("q_segment", "kv_segment"), {}),
    "segments-causal": (("q_segment", "kv_segment"), {"causal": True, "window_left": 2, "sink_tokens": 1}),
    "segments-chunk": (("q_segment", "kv_segment"), {"chunk": 3, "causal_alignment": "top_left"}),
    "everything": (("bias", "mask", "sink", "dropout_mask", "kv_length"), {"causal": True, "softcap": 1.5, "dropout_p": 0.5}),
}


def case(name: str, **sizes: int) -> dict[str, Any]:
    names, options = CASES[name]
    return tensors(**sizes) | {n: extra()[n] for n in names} | options


@pytest.mark.parametrize("name", CASES)
def test_forward_equals_the_formula(name: str) -> None:
    x = case(name)
    O, LSE = softmax_attention(**x, config=SMALL)
    want, lse = formula(x)
    close(O, want)
    close(LSE, lse)
