"""The Triton softmax attention against a plain float64 formula, in Triton's interpreter: every option, odd shapes,
masks.
"""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

import inspect
import math
import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.conformance.types import Unsupported  # noqa: E402
from attnspec.impls import softmax_arguments  # noqa: E402
from attnspec.impls.engines.softmax_configs import INTERPRETED, LARGE, TileConfig, interpreted_tile  # noqa: E402
from attnspec.impls.engines.softmax_launch import plan_forward  # noqa: E402
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
        keep = keep & (
            torch.div(local, x["chunk"], rounding_mode="floor") == torch.div(pos, x["chunk"], rounding_mode="floor")
        )
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
    B: int = 2,
    H: int = 4,
    Hk: int = 2,
    N: int = 21,
    M: int = 35,
    D: int = 20,
    E: int = 12,
    dtype: Any = None,
    seed: int = 0,
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
    "everything": (
        ("bias", "mask", "sink", "dropout_mask", "kv_length"),
        {"causal": True, "softcap": 1.5, "dropout_p": 0.5},
    ),
}


def run(x: dict[str, Any], config: Any = SMALL) -> tuple[Any, Any]:
    with torch.no_grad():
        return softmax_attention(**x, config=config)


def check(x: dict[str, Any], tolerance: float = 3e-6, config: Any = SMALL) -> None:
    O, LSE = run(x, config)
    want, lse = formula(x)
    assert O.dtype == x["Q"].dtype and LSE.dtype == torch.float32
    close(O, want, tolerance)
    close(LSE, lse, min(tolerance, 1e-4))


DEFAULTS: dict[str, Any] = {
    n: p.default for n, p in inspect.signature(softmax_attention).parameters.items() if n not in ("Q", "config")
}
E1 = math.exp(1.0)


@pytest.mark.parametrize(
    ("given", "output", "lse"),
    [
        pytest.param({}, (E1 + 2) / (E1 + 1), math.log(E1 + 1), id="plain"),
        pytest.param({"sink": torch.zeros(1)}, (E1 + 2) / (E1 + 2), math.log(E1 + 2), id="sink"),
        pytest.param({"sink": torch.full((1,), -INF)}, (E1 + 2) / (E1 + 1), math.log(E1 + 1), id="absent-sink"),
        pytest.param({"sink": torch.full((1,), 200.0)}, 0.0, 200.0, id="large-sink"),
        pytest.param({"mask": torch.zeros(1, 1, 1, 2, dtype=torch.bool)}, 0.0, -INF, id="empty-row"),
        pytest.param(
            {"mask": torch.zeros(1, 1, 1, 2, dtype=torch.bool), "sink": torch.zeros(1)}, 0.0, 0.0, id="empty-row-sink"
        ),
        pytest.param({"causal": True, "causal_alignment": "top_left"}, 1.0, 1.0, id="top-left"),
        pytest.param({"causal": True}, (E1 + 2) / (E1 + 1), math.log(E1 + 1), id="bottom-right"),
    ],
)
def test_worked_examples_come_out(given: dict[str, Any], output: float, lse: float) -> None:
    x = {
        "Q": torch.tensor([[[[1.0, 0.0]]]]),
        "K": torch.eye(2)[None, None],
        "V": torch.tensor([[[[1.0], [2.0]]]]),
        "scale": 1.0,
    }
    O, LSE = run(x | given, None)
    assert O.item() == pytest.approx(output, abs=1e-6)
    assert LSE.item() == pytest.approx(lse, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_rounded_only_at_weights_and_output(dtype: Any) -> None:
    x = tensors(B=1, M=70, dtype=dtype) | {"causal": True}
    check(x, tolerance=2.0 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("N", "M", "D", "E"),
    [(1, 1, 1, 1), (1, 33, 3, 5), (17, 1, 16, 1), (33, 16, 40, 7), (16, 32, 256, 200), (5, 7, 129, 256)],
)
def test_any_size_works(N: int, M: int, D: int, E: int) -> None:
    check(tensors(B=1, H=2, Hk=1, N=N, M=M, D=D, E=E) | {"causal": True})


@pytest.mark.parametrize("sizes", [{"N": 0}, {"M": 0}, {"B": 0}, {"N": 0, "M": 0}], ids=str)
@pytest.mark.parametrize("sink", [False, True])
def test_empty_sizes_give_empty_rows(sizes: dict[str, int], sink: bool) -> None:
    x = tensors(**sizes) | ({"sink": torch.arange(4.0)} if sink else {})
    O, LSE = run(x, None)
    want, lse = formula(x)
    assert torch.equal(O.double(), want) and torch.equal(LSE.double(), lse)


@pytest.mark.parametrize(("H", "Hk"), [(6, 3), (3, 3), (5, 1)])
def test_consecutive_query_heads_share_a_key_head(H: int, Hk: int) -> None:
    check(tensors(H=H, Hk=Hk, N=5, M=6, D=4, E=4))


def spread(x: Any, kind: str) -> Any:
    """The same values in another memory layout."""
    if kind == "bihd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "feature-major":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == "strided":
        return torch.full((*x.shape[:3], 2 * x.shape[3] + 1), torch.nan).to(x.dtype)[..., 1::2].copy_(x)
    wide = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2] + 3, x.shape[3] + 1), torch.nan).to(x.dtype)
    return wide[:, 1:-1, 2:-1, 1:].copy_(x)  # misaligned, with NaN around it


@pytest.mark.parametrize("kind", ["bihd", "feature-major", "strided", "offset"])
def test_memory_layout_does_not_matter(kind: str) -> None:
    x = tensors(B=1, H=2, Hk=2, N=10, M=20) | {
        n: extra(H=2, N=10, M=40)[n][:1, ..., :20] for n in ("bias", "mask", "dropout_mask")
    }
    want = run(x)
    for names in (("Q", "mask"), ("K", "bias"), ("V", "dropout_mask")):
        other = x | {n: spread(x[n], kind) for n in names}
        before = {n: other[n].clone() for n in names}
        for got, expected in zip(run(other), want):
            assert torch.equal(got, expected)
        assert all(torch.equal(other[n], before[n]) for n in names), "an input was changed"


def test_expanded_inputs_need_no_copy() -> None:
    x = tensors(N=5, M=6)
    one = x | {"K": x["K"][:1].expand(2, -1, -1, -1), "V": x["V"][:, :1].expand(-1, 2, -1, -1)}
    for got, want in zip(run(one), run({n: v.clone() for n, v in one.items()})):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("key", "value"), [(torch.nan, INF), (-INF, torch.nan)], ids=["nan-inf", "inf-nan"])
@pytest.mark.parametrize("name", ["lengths", "left-pad", "segments", "mask", "bias", "chunk", "everything", "window"])
def test_what_is_masked_for_all_does_not_leak(name: str, key: float, value: float) -> None:
    names, options = CASES[name]
    x = tensors(H=2, Hk=1) | {n: extra(H=2)[n] for n in names} | options
    if "mask" in x:
        x["mask"] = x["mask"] & (torch.arange(35) % 3 != 0)
    if "bias" in x:
        x["bias"] = torch.where(torch.arange(35) % 4 == 0, -INF, x["bias"])
    if name in ("chunk", "window"):
        x |= {"causal_alignment": "top_left"}
    unseen = ~kept(x, 21, 35).any(1).any(1)
    assert unseen.any()
    bad = x | {n: torch.where(unseen[:, None, :, None], v, x[n]) for n, v in (("K", key), ("V", value))}
    for got, want in zip(run(bad), run(x)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("value", [torch.nan, INF])
def test_what_one_row_sees_does_not_leak_into_rows_that_do_not(value: float) -> None:
    x = tensors(B=1, H=2, Hk=1, N=20, M=20) | {"causal": True}
    bad = x | {"K": x["K"].clone(), "V": x["V"].clone()}
    bad["V"][:, :, 7, 3] = value
    bad["K"][:, :, 11, 0] = torch.nan
    O, LSE = run(bad)
    clean, lse = run(x)
    for got, want in (
        (O[:, :, :7], clean[:, :, :7]),
        (O[:, :, :11, :3], clean[:, :, :11, :3]),
        (LSE[:, :, :11], lse[:, :, :11]),
    ):
        assert torch.equal(got, want)
    assert not torch.isfinite(O[:, :, 7:11, 3]).any() and torch.isnan(O[:, :, 11:]).all()


def paged(x: dict[str, Any], page: int, seed: int = 5) -> dict[str, Any]:
    """K and V in pages in random order; slots and table entries beyond the lengths hold poison."""
    B, Hk, M, _ = x["K"].shape
    count = -(-M // page)
    order = torch.randperm(B * count + 2, generator=torch.Generator().manual_seed(seed))
    table = order[: B * count].reshape(B, count)
    out = {n: v for n, v in x.items() if n not in ("K", "V")}
    for name, source in (("k_pages", x["K"]), ("v_pages", x["V"])):
        pages = torch.full((B * count + 2, page, Hk, source.shape[3]), torch.nan)
        for b in range(B):
            for j in range(int(x["kv_length"][b])):
                pages[table[b, j // page], j % page] = source[b, :, j]
        out[name] = pages
    for b in range(B):
        table[b, -(-int(x["kv_length"][b]) // page) :] = -1
    return out | {"block_table": table}


@pytest.mark.parametrize("page", [1, 5, 16])
@pytest.mark.parametrize("options", [{"causal": True}, {"window_left": 6, "sink_tokens": 2}], ids=str)
def test_paged_cache_equals_dense_keys(page: int, options: dict[str, Any]) -> None:
    x = tensors(H=2, Hk=1, M=30) | {"kv_length": torch.tensor([27, 4]), "q_length": torch.tensor([21, 2])} | options
    want = run(x)
    for got, expected in zip(run(paged(x, page)), want):
        close(got, expected, 1e-6)


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["plain", "sink", "everything", "sink-tokens"])
def test_number_of_splits_does_not_matter(name: str, splits: int) -> None:
    names, options = CASES[name]
    x = tensors(N=2) | {n: extra()[n][..., :2, :] if extra()[n].ndim == 4 else extra()[n] for n in names} | options
    if "mask" in x:
        x["mask"] = x["mask"].clone()
        x["mask"][0, 0, 1] = False
    check(x, config=TileConfig(16, 16, 1, 1, splits=splits))


def test_decode_takes_the_split_path_by_itself() -> None:
    x = tensors(N=1, M=150) | {"kv_length": torch.tensor([150, 3]), "causal": True}
    problem = softmax_arguments.check(**(DEFAULTS | x))
    launches, _, _ = plan_forward(problem, None, None, 8)
    assert [launch.name for launch in launches] == ["decode", "decode_repair", "merge"]
    check(x, config=None)


def test_split_decode_from_pages_equals_dense_keys() -> None:
    x = tensors(N=1, M=60) | {"kv_length": torch.tensor([60, 33]), "sink": torch.randn(4)}
    config = TileConfig(16, 16, 1, 1, splits=3)
    for got, want in zip(run(paged(x, 7), config), run(x, config)):
        close(got, want, 1e-6)


@pytest.mark.parametrize("axis", [2, 3], ids=["positions", "features"])
@pytest.mark.parametrize("name", ["Q", "K", "V", "bias", "mask"])
def test_offsets_beyond_32_bits_are_right(name: str, axis: int) -> None:
    """Strides of 2^27 and more over a storage of 4 GiB, of which only the touched pages exist."""
    x = tensors(B=1, H=1, Hk=1, N=17, M=17, D=16, E=16, dtype=torch.float16)
    x |= {"bias": torch.randn(1, 1, 17, 17).half(), "mask": torch.rand(1, 1, 17, 17) < 0.7}
    small = x[name]
    step = 2**31 // (small.shape[axis] - 1)
    storage = torch.empty(2**31 + 4096, dtype=small.dtype)
    strides = [0, 0, step, 1] if axis == 2 else [0, 0, 1, step]
    far = storage.as_strided(small.shape, strides).copy_(small)
    for got, want in zip(run(x | {name: far}), run(x)):
        assert torch.equal(got, want)


def test_tensors_on_the_cpu_are_refused_by_kernels_for_an_accelerator() -> None:
    program = (
        "import torch; from attnspec.impls.softmax import softmax_attention; x = torch.zeros(1, 1, 2, 4)\n"
        "try: softmax_attention(x, x, x)\n"
        "except NotImplementedError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"}
    )
    assert "set TRITON_INTERPRET=1 before importing Triton" in done.stdout, done.stderr


@pytest.mark.parametrize("kind", ["forward", "decode"])
def test_every_configuration_gives_the_same_result(kind: str) -> None:
    x = tensors(B=1, N=40 if kind == "forward" else 1, M=70) | {"causal": True}
    found = configs(kind, 20, 12, torch.float32)
    assert len(found) >= 2
    for config in found:
        check(x, config=config)


def test_results_repeat_bit_for_bit_and_do_not_depend_on_the_batch() -> None:
    x = tensors(H=2, Hk=1) | {n: extra(H=2)[n] for n in ("bias", "mask", "sink")}
    O, LSE = run(x)
    again = run(x)
    assert torch.equal(O, again[0]) and torch.equal(LSE, again[1])
    second = x | {n: x[n][1:] for n in ("Q", "K", "V", "mask")}
    alone = run(second)
    assert torch.equal(O[1:], alone[0]) and torch.equal(LSE[1:], alone[1])


def test_large_logits_neither_overflow_nor_vanish() -> None:
    x = tensors(B=1, N=4, M=40, D=4, E=4)
    check(x | {"Q": x["Q"] * 300, "K": x["K"] * 300, "scale": 0.5}, tolerance=2e-3)
    check(x | {"Q": torch.full((1, 4, 4, 4), 300.0), "K": x["K"] - 300, "scale": 0.5}, tolerance=0.05)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no-keys": ({"K": None}, "give either K and V, or k_pages, v_pages and block_table"),
    "both": ({"k_pages": torch.zeros(1, 1, 2, 20)}, "give either K and V"),
    "heads": ({"K": torch.zeros(2, 3, 35, 20), "V": torch.zeros(2, 3, 35, 12)}, "multiple of .* heads, got 4 and 3"),
    "head-size": ({"K": torch.zeros(2, 2, 35, 21)}, "K must be of Q's head size 20, got 21"),
    "batch": ({"Q": torch.zeros(3, 4, 21, 20)}, "K must be of Q's batch size 3, got 2"),
    "values": ({"V": torch.zeros(2, 2, 34, 12)}, "V must be of K's leading shape"),
    "dtype": ({"K": torch.zeros(2, 2, 35, 20).half()}, "K must be of Q's dtype torch.float32, got torch.float16"),
    "axes": ({"Q": torch.zeros(4, 21, 20)}, "Q must be of four axes"),
    "mask-dtype": ({"mask": torch.zeros(2, 1, 21, 35)}, "mask must be of dtype torch.bool, got torch.float32"),
    "mask-shape": ({"mask": torch.zeros(2, 1, 21, 1, dtype=torch.bool)}, r"got shape \[2, 1, 21, 1\]"),
    "bias-rank": ({"bias": torch.zeros(21, 35)}, "bias must be of a shape"),
    "dropout-shape": ({"dropout_mask": torch.ones(1, 4, 21, 35, dtype=torch.bool)}, "dropout_mask must be of shape"),
    "dropout": ({"dropout_p": 0.5}, "dropout_p needs an explicit dropout_mask"),
    "dropout-one": (
        {"dropout_p": 1.0, "dropout_mask": torch.ones(2, 4, 21, 35, dtype=torch.bool)}, r"dropout_p must be in \[0, 1\)"
    ),
    "sink": ({"sink": torch.zeros(3)}, r"sink must be a float tensor of shape \[4\]"),
    "segment": ({"q_segment": torch.zeros(2, 21, dtype=torch.int32)}, "q_segment and kv_segment go together"),
    "segment-length": (
        {"q_segment": torch.zeros(2, 21, dtype=torch.int32), "kv_segment": torch.zeros(2, 35, dtype=torch.int32),
         "kv_length": torch.tensor([1, 2])}, "give no kv_length",
    ),
    "length": ({"kv_length": torch.tensor([36, 1])}, r"kv_length must be within 0..35, got 36"),
    "length-type": ({"kv_length": torch.tensor([3.0, 1.0])}, "kv_length must be an integer tensor"),
    "softcap": ({"softcap": 0.0}, "softcap must be positive"),
    "scale": ({"scale": INF}, "scale must be a finite number"),
    "causal": ({"causal": 1}, "causal must be True or False, got 1"),
    "alignment": ({"causal_alignment": "left"}, "causal_alignment must be bottom_right or top_left, got 'left'"),
    "window": ({"window_left": -1}, "window_left must be at least 0, got -1"),
    "window-type": ({"window_right": 1.5}, "window_right must be an int or None, got 1.5"),
    "chunk": ({"chunk": 0}, "chunk must be at least 1"),
    "sink-tokens": ({"sink_tokens": 2}, "window_left must be given"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_named(name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        softmax_attention(**(tensors() | change))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (tensors(N=2, M=2, D=257), "head size 257; supported are 1..256"),
        (tensors(N=2, M=2, E=300), "head size 300"),
        (tensors(N=2, M=2, dtype=torch.float64), "dtype torch.float64; supported are float16, bfloat16, float32"),
    ],
    ids=["D", "E", "dtype"],
)
def test_what_is_not_offered_is_refused(x: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        softmax_attention(**x)


def test_many_pairs_get_large_tiles_in_the_interpreter() -> None:
    assert interpreted_tile(INTERPRETED, 1024, 1023) == INTERPRETED[0]
    large = interpreted_tile(INTERPRETED, 1024, 1024)
    assert (large.block_m, large.block_n) == (LARGE, LARGE)
    Q, K, V = (torch.randn(1, 1, size, 4) for size in (1, 300, 300))
    few = softmax_attention(Q, K, V, config=large)
    torch.testing.assert_close(few, softmax_attention(Q, K, V, config=SMALL))
