"""The array evaluator agrees with direct NumPy code, construct by construct, and names what it cannot evaluate."""

from __future__ import annotations

import math
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest

from attnspec.perf import language as language_perf
from attnspec.spec.language import (
    Declarations,
    EvaluationError,
    Program,
    evaluate,
    infer_sizes,
    read,
    resolve_options,
    static_value,
)
from attnspec.spec.language import read_expression as expression
from attnspec.spec.language.syntax import OptionDecl
from attnspec.tests.language_build import attention, declared

inf, nan = math.inf, math.nan
RNG = np.random.default_rng(0)
Q, K, V = RNG.standard_normal((5, 4)), RNG.standard_normal((7, 4)), RNG.standard_normal((7, 3))
X = np.array([0.5, -1.5, 2.0, 2.0, -0.25])
IDS = np.array([3, 0, 0, 4, 1])

SIMPLE = declared(
    "i:N j k:N d:D",
    "x:i n!int:i keep!bool:i m:ij",
    "",
    options=[
        OptionDecl("causal", "bool", False),
        OptionDecl("order", "enum", "left", choices=("left", "right")),
        OptionDecl("cap", "float", None, nullable=True),
        OptionDecl("rate", "float", None, formula=expression("N ** -0.5")),
    ],
    sizes={"D": ""},
)
M = np.arange(10.0).reshape(5, 2)


def value(text: str, *, name: str = "y", sizes: Any = None, options: Any = None, xp: Any = None, **changed: Any) -> Any:
    """The value of `y` in some equations over x, n, keep and m."""
    inputs = {"x": X, "n": IDS, "keep": X > 0, "m": M} | changed
    program = read(text, SIMPLE)
    return evaluate(program, inputs, options, sizes=sizes, outputs=[name], xp=xp)[name]


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    shifted = np.exp(x - np.where(np.isneginf(x.max(axis, keepdims=True)), 0, x.max(axis, keepdims=True)))
    total = shifted.sum(axis, keepdims=True)
    return np.asarray(shifted / np.where(total == 0, 1, total))


AT = np.arange(5)
EXPRESSIONS: list[tuple[str, Any]] = [
    ("y[i] = x[i] + 2 * n[i] - i", X + 2 * IDS - AT),
    ("y[i] = x[i] / n[i]", [X[0] / 3, -inf, inf, 0.5, -0.25]),
    ("y[i] = -n[i] // 2", -IDS // 2),
    ("y[i] = -n[i] % 3", -IDS % 3),
    ("y[i] = x[i] ** 3", X**3),
    ("y[i] = n[i] ** 2", IDS**2),
    ("y[i] = 2 ** n[i]", 2**IDS),
    ("y[i] = abs(x[i]) ** -0.5", np.abs(X) ** -0.5),
    ("y[i] = i < n[i] <= 3", (AT < IDS) & (IDS <= 3)),
    ("y[i] = i == n[i] or not keep[i] and i != 2", (AT == IDS) | (~(X > 0) & (AT != 2))),
    ("y[i] = keep[i] == (i < 2)", (X > 0) == (AT < 2)),
    ("y[i] = x[i] if keep[i] else i", np.where(X > 0, X, AT)),
    ("y[i] = n[i] if keep[i] else i", np.where(X > 0, IDS, AT)),
    ("y[i] = keep[i] if i > 1 else True", np.where(AT > 1, X > 0, True)),
    ("y[i] = +x[i]", X),
    ("y[i] = exp(x[i])", np.exp(X)),
    ("y[i] = exp2(x[i])", np.exp2(X)),
    ("y[i] = log(x[i] - 2)", [nan, nan, -inf, -inf, nan]),
    ("y[i] = log2(abs(x[i]))", np.log2(np.abs(X))),
    ("y[i] = log1p(abs(x[i]))", np.log1p(np.abs(X))),
    ("y[i] = sqrt(x[i])", [math.sqrt(0.5), nan, math.sqrt(2), math.sqrt(2), nan]),
    ("y[i] = rsqrt(x[i] * x[i])", 1 / np.abs(X)),
    ("y[i] = abs(x[i]) + abs(n[i] - 3)", np.abs(X) + np.abs(IDS - 3)),
    ("y[i] = sign(x[i]) * sign(n[i])", np.sign(X) * np.sign(IDS)),
    ("y[i] = floor(x[i])", np.floor(X).astype(int)),
    ("y[i] = ceil(x[i])", np.ceil(X).astype(int)),
    ("y[i] = sin(x[i]) + cos(x[i]) + tanh(x[i])", np.sin(X) + np.cos(X) + np.tanh(X)),
    ("y[i] = sigmoid(x[i])", 1 / (1 + np.exp(-X))),
    ("y[i] = sigmoid(1000 * x[i])", [1, 0, 1, 1, np.exp(-250) / (1 + np.exp(-250))]),
    ("y[i] = softplus(x[i])", np.log1p(np.exp(X))),
    ("y[i] = softplus(1000 * x[i])", [500, 0, 2000, 2000, np.exp(-250)]),
    ("y[i] = relu(x[i]) + relu(n[i] - 2)", np.maximum(X, 0) + np.maximum(IDS - 2, 0)),
    ("y[i] = elu(x[i])", np.where(X > 0, X, np.expm1(X))),
    ("y[i] = gelu(x[i])", [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in X]),
    ("y[i] = silu(x[i])", X / (1 + np.exp(-X))),
    ("y[i] = erf(x[i])", [math.erf(v) for v in X]),
    ("y[i] = pow(abs(x[i]), 1.5)", np.abs(X) ** 1.5),
    ("y[i] = min(x[i], n[i], 1)", np.minimum(np.minimum(X, IDS), 1)),
    ("y[i] = max(n[i], i)", np.maximum(IDS, AT)),
    ("y[i] = clip(x[i], -1, 1)", np.clip(X, -1, 1)),
    ("y[i] = logaddexp(x[i], n[i])", np.logaddexp(X, IDS)),
    ("y[i] = logaddexp(-inf, log(0 * x[i]))", np.full(5, -inf)),
    ("y[i] = logaddexp(inf, -inf) + 0 * i", np.full(5, inf)),
    ("y[i] = atan2(x[i], n[i] - 2)", np.arctan2(X, IDS - 2)),
    ("y[i] = atan2(0 * x[i], -0.0 * x[i])", np.zeros(5)),
    ("y[i] = pi * i", math.pi * AT),
    ("y = N + 2 * 3", 11),
    ("y = N ** -0.5", 5**-0.5),
    ("y = -7 // 2 + -7 % 2", -3),
    ("y = 1 / 0.0", inf),
    ("y = 0 / 0.0 if causal else 1.0", 1.0),
    ("y[i] = sum[k](x[k]) + i", X.sum() + AT),
    ("y[i] = sum[k : k <= i](x[k])", np.cumsum(X)),
    ("y[i] = mean[k : k <= i](n[k])", np.cumsum(IDS) / (AT + 1)),
    ("y[i] = mean[k : k > i](x[k])", [np.mean(X[k + 1 :]) if k < 4 else 0 for k in range(5)]),
    ("y[i] = prod[k : k <= i](x[k])", np.cumprod(X)),
    ("y[i] = max[k : k < i](x[k])", [-inf, *np.maximum.accumulate(X)[:-1]]),
    ("y[i] = min[k : k < i](x[k])", [inf, *np.minimum.accumulate(X)[:-1]]),
    ("y[i] = max[k : k <= i](n[k])", np.maximum.accumulate(IDS)),
    ("y[i] = any[k : k < i](keep[k])", [False, True, True, True, True]),
    ("y[i] = all[k : k < i](keep[k])", [True, True, False, False, False]),
    ("y[i] = logsumexp[k : k < i](x[k])", [-inf, *np.logaddexp.accumulate(X)[:-1]]),
    ("y[i] = argmax[k : k < i](x[k])", [-1, 0, 0, 2, 2]),
    ("y[i] = argmax[k](min(x[k], -3) + 0 * i)", [0, 0, 0, 0, 0]),
    ("y[i] = sum[k : k >= 0](2)", np.full(5, 10)),
    ("y[i] = prod[k : k >= 0](2.0)", np.full(5, 32.0)),
    ("y[i] = sum[j](m[i,j])", M.sum(1)),
    ("y[i] = sum[j,k : k < j](m[k,j] * x[i])", X * M[0, 1]),
    ("y[i] = softmax[i](x[i])", softmax(X)),
    ("y[i] = softmax[i : keep[i]](x[i])", softmax(np.where(X > 0, X, -inf))),
    ("y[i] = softmax[i](log(0 * x[i]))", np.zeros(5)),
    ("y[i,j] = softmax[i,j](m[i,j])", softmax(M.reshape(1, -1)).reshape(5, 2)),
    ("y[i,j] = softmax[j : j < 2](x[i])", np.full((5, 2), 0.5)),
    ("y[i] = sum[j](softmax[j](m[i,j]) * m[i,j])", (softmax(M) * M).sum(1)),
    ("y[i] = rank[i](x[i])", [2, 4, 0, 1, 3]),
    ("y[i] = rank[i : i != 2](x[i])", [1, 3, 4, 0, 2]),
    ("y[i] = argsort[i](x[i])", [2, 3, 0, 4, 1]),
    ("y[i] = argsort[i : i != 2](x[i])", [3, 0, 4, 1, 2]),
    ("y[i] = rank[i](n[i])", [1, 3, 4, 0, 2]),
    ("y[i] = rank[i : keep[i]](-inf)", [0, 3, 1, 2, 4]),
    ("y[i] = x[N - 1 - i]", X[::-1]),
    ("y[i] = x[n[i]]", X[IDS]),
    ("y[i,j] = m[n[i], 1 - j]", M[IDS][:, ::-1]),
    ("y[i] = m[i, i % 2]", M[AT, AT % 2]),
    ("y[i] = sum[k](m[k, (i + k) % 2])", [M[AT, (k + AT) % 2].sum() for k in range(5)]),
    ("y[i] = x[i - 1] if i > 0 else 0", [0, *X[:-1]]),
    ("y[i] = 0 if i == 0 else x[i - 1]", [0, *X[:-1]]),
    ("y[i] = sum[k](x[k] * x[i - 1]) if i > 0 else 0", [0, *(X.sum() * X[:-1])]),
    ("y[i] = sum[i : i > 2](x[i - 3]) if i > 0 else 0", [0, *np.full(4, X[:2].sum())]),
    ("y[i] = sum[j,k : k < N](m[i,j] * (k if causal else 2))", 10 * M.sum(1)),
    ("y[i] = sum[j,k](m[i,j] * x[i] * (k if causal else 2))", 10 * M.sum(1) * X),
    ("y[i] = sum[k : k > 0](x[k - 1]) + i", X[:-1].sum() + AT),
    ("y[i] = any[k](k > 0 and x[k - 1] > i)", [True, True, False, False, False]),
    ("y[i] = all[k](k == 0 or x[k - 1] < 2 + i)", [False, True, True, True, True]),
    ("z[k,i] = k + 10 * i\ny[i,k] = z[i,k]", AT[:, None] + 10 * AT[None, :]),
    ("z[i,k] = k + 10 * i\ny[i] = z[i,i]", 11 * AT),
    ("z[i] = x[3]\ny[i] = z[i] + z[0]", np.full(5, 4.0)),
    ("y[i] = sum[i](x[i]) * i", X.sum() * AT),
    ("y[i] = 1 if order == 'left' else 2", np.full(5, 1)),
    ("y = rate", 5**-0.5),
    ("y[i] = min(x[i], cap) if present(cap) else x[i]", X),
    ("y[i] = i // 1 + 0", AT),
]


@pytest.mark.parametrize(("text", "wanted"), EXPRESSIONS, ids=[text.replace("\n", "; ") for text, _ in EXPRESSIONS])
def test_values(text: str, wanted: Any) -> None:
    wanted = np.asarray(wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = value(text)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("text", "wanted"), EXPRESSIONS, ids=[text.replace("\n", "; ") for text, _ in EXPRESSIONS])
def test_torch_gives_the_same_values(text: str, wanted: Any) -> None:
    torch = pytest.importorskip("torch")
    got = value(text, xp=torch, x=torch.tensor(X), m=torch.tensor(M))
    assert isinstance(got, torch.Tensor)
    assert got.dtype in (torch.float64, torch.int64, torch.bool)
    np.testing.assert_allclose(got.numpy(), np.asarray(wanted), rtol=1e-14, atol=1e-15)


def test_excluded_elements_never_contribute() -> None:
    bad = np.array([nan, 1.0, inf, -inf, 2.0])
    keep = np.array([False, True, False, False, True])
    for reduction, wanted in [("sum", 3), ("prod", 2), ("max", 2), ("min", 1), ("mean", 1.5), ("argmax", 4)]:
        assert value(f"y = {reduction}[i : keep[i]](x[i])", x=bad, keep=keep) == wanted
    assert value("y = logsumexp[i : keep[i]](x[i])", x=bad, keep=keep) == pytest.approx(np.logaddexp(1, 2))
    np.testing.assert_array_equal(value("y[i] = rank[i : keep[i]](x[i])", x=bad, keep=keep), [2, 1, 3, 4, 0])
    weights = value("y[i] = softmax[i : keep[i]](x[i])", x=bad, keep=keep)
    np.testing.assert_allclose(weights, [0, 1 / (1 + math.e), 0, 0, math.e / (1 + math.e)])


PAIR = declared("i:N j e", "P:ij V:je use!bool:j", "O:ie")


def summed_in_loops(P: np.ndarray, V: np.ndarray, use: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.array(
            [
                [sum(P[i, j] * V[j, e] for j in range(len(V)) if use[j]) for e in range(V.shape[1])]
                for i in range(len(P))
            ]
        )


@pytest.mark.parametrize("seed", range(20))
def test_non_finite_entries_of_products_leak_exactly_where_they_are_included(seed: int) -> None:
    rng = np.random.default_rng(seed)
    P, V = rng.standard_normal((4, 6)), rng.standard_normal((6, 3))
    for array in (P, V):
        array[rng.random(array.shape) < 0.15] = rng.choice([nan, inf, -inf, 0.0])
    use = rng.random(6) < 0.7
    program = read("O[i,e] = sum[j : use[j]](P[i,j] * V[j,e])", PAIR)
    got = evaluate(program, {"P": P, "V": V, "use": use})["O"]
    np.testing.assert_allclose(got, summed_in_loops(P, V, use), rtol=1e-13)


def test_a_condition_over_axes_that_no_factor_has_is_a_factor_of_its_own() -> None:
    declarations = declared("i:N j e", "P:i V:je", "O:e")
    program = read("O[e] = sum[i,j : i <= j](P[i] * V[j,e])", declarations)
    P, W = RNG.standard_normal(7), RNG.standard_normal((7, 3))
    W[2, 1] = nan
    got = evaluate(program, {"P": P, "V": W})["O"]
    mask = np.arange(7)[:, None] <= np.arange(7)[None]
    wanted = np.einsum("i,ij,je->e", P, mask, W)
    np.testing.assert_allclose(got, wanted, rtol=1e-13)


@pytest.mark.parametrize(
    ("body", "formula"),
    [
        ("a[i,d] * c[j,d] * w[d]", "id,jd,d->ij"),
        ("-a[i,d] * c[j,d] / 2", "id,jd->ij"),
        ("a[i,d] * c[j,d] / w[d]", "id,jd,d->ij"),
        ("a[i,d] * c[j,d] + w[d] * c[j,d]", ""),
        ("a[i,d] * c[j,d] - a[i,d] * w[d] * a[i,d]", ""),
        ("a[i,d] * 3", ""),
        ("w[d] * w[d] * a[i,d] * c[j,d]", "id,jd,d,d->ij"),
    ],
)
def test_sums_of_products_contract(body: str, formula: str) -> None:
    declarations = declared("i:N j:M d", "a:id c:jd w:d", "O:ij")
    a, c, w = RNG.standard_normal((5, 4)), RNG.standard_normal((6, 4)), RNG.standard_normal(4)
    program = read(f"O[i,j] = sum[d]({body})", declarations)
    got = evaluate(program, {"a": a, "c": c, "w": w})["O"]
    names = {"a": a[:, None, :], "c": c[None, :, :], "w": w[None, None, :]}
    text = body.replace("[i,d]", "").replace("[j,d]", "").replace("[d]", "")
    wanted = np.broadcast_to(eval(text, names), (5, 6, 4)).sum(-1)
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-14)


def test_an_index_that_no_factor_has_multiplies_by_its_size() -> None:
    declarations = declared("i:N j:M d k:L", "a:id c:jd", "O:ij", options=[OptionDecl("causal", "bool", False)])
    program = read("O[i,j] = sum[d,k](a[i,d] * c[j,d] * (k if causal else 2))", declarations)
    for causal, factor in ((False, 6), (True, 3)):
        got = evaluate(program, {"a": Q, "c": K}, {"causal": causal}, sizes={"L": 3})["O"]
        np.testing.assert_allclose(got, factor * (Q @ K.T), rtol=1e-13)


def by_hand(bias: np.ndarray | None = None, causal: bool = False) -> np.ndarray:
    scores = Q @ K.T * 0.5
    if bias is not None:
        scores = scores + bias
    if causal:
        scores = np.where(np.arange(7)[None] <= np.arange(5)[:, None] + 2, scores, -inf)
    return np.asarray(softmax(scores) @ V)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [None, (5, 7), (1, 7)])
def test_softmax_attention_with_options(causal: bool, shape: tuple[int, int] | None) -> None:
    inputs = {"Q": Q, "K": K, "V": V}
    bias = None if shape is None else RNG.standard_normal(shape)
    if bias is not None:
        inputs["bias"] = bias
    got = evaluate(attention(), inputs, {"causal": causal})["O"]
    np.testing.assert_allclose(got, by_hand(bias, causal), rtol=1e-13, atol=1e-14)


def test_a_batch_is_its_slices_side_by_side() -> None:
    inputs = {name: RNG.standard_normal((2, *value.shape)) for name, value in (("Q", Q), ("K", K), ("V", V))}
    inputs["bias"] = RNG.standard_normal((2, 1, 7))
    got = evaluate(attention("b"), inputs, {"causal": True})["O"]
    for b in range(2):
        alone = evaluate(attention(), {name: value[b] for name, value in inputs.items()}, {"causal": True})["O"]
        np.testing.assert_allclose(got[b], alone, rtol=1e-13, atol=1e-15)


def test_rows_restrict_an_output_without_changing_it() -> None:
    inputs = {"Q": Q, "K": K, "V": V}
    full = evaluate(attention(), inputs, {"causal": True})["O"]
    choices: list[dict[str, Any]] = [
        {"i": [3]},
        {"i": [4, 0, 4]},
        {"e": [2, 1]},
        {"i": [1], "e": [0]},
        {"i": []},
        {"i": range(5)},
    ]
    for rows in choices:
        got = evaluate(attention(), inputs, {"causal": True}, rows=rows)["O"]
        i, e = rows.get("i", range(5)), rows.get("e", range(3))
        np.testing.assert_allclose(got, full[np.ix_(list(i), list(e))], rtol=1e-13, atol=1e-15)


def test_rows_of_a_batch_axis_are_slices() -> None:
    inputs = {name: RNG.standard_normal((3, *value.shape)) for name, value in (("Q", Q), ("K", K), ("V", V))}
    full = evaluate(attention("b"), inputs)["O"]
    np.testing.assert_allclose(evaluate(attention("b"), inputs, rows={"b": [2, 0]})["O"], full[[2, 0]], rtol=1e-13)


def test_rows_compute_only_what_they_need() -> None:
    declarations = declared("i:N j", "x:i u:j", "y:i")
    program = read("S[i,j] = x[i] * u[j]\nT[i,j] = S[N - 1 - i, j]\ny[i] = sum[j](T[i,j]) + S[3,0]", declarations)
    n = 20_000
    inputs = {"x": np.arange(float(n)), "u": np.ones(1000)}
    tracemalloc.start()
    got = evaluate(program, inputs, rows={"i": [5, 7]})["y"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(got, [(n - 6) * 1000.0 + 3, (n - 8) * 1000.0 + 3])
    assert peak < n * 1000 * 8 / 100


def test_gathers_that_follow_rows_are_restricted_too() -> None:
    declarations = declared("i:N j s:S", "x:j t!int:is", "y:i")
    program = read("z[j] = x[j] ** 2\ny[i] = sum[s](z[t[i,s]])", declarations)
    x, t = RNG.standard_normal(50), RNG.integers(0, 50, (20, 3))
    full = (x[t] ** 2).sum(1)
    np.testing.assert_allclose(evaluate(program, {"x": x, "t": t})["y"], full)
    np.testing.assert_allclose(evaluate(program, {"x": x, "t": t}, rows={"i": [7, 3]})["y"], full[[7, 3]])


def test_the_examples_of_the_language() -> None:
    W = 3
    grid = declared("y:Y x:X u:W w:W d e", "Q:yxd K:yxd V:yxe", "O:yxe", sizes={"W": ""})
    neighborhood = read(
        "scale = D ** -0.5\n"
        "y0[y] = min(max(y - W//2, 0), Y - W)\n"
        "x0[x] = min(max(x - W//2, 0), X - W)\n"
        "P[y,x,u,w] = softmax[u,w](scale * sum[d](Q[y,x,d] * K[y0[y]+u, x0[x]+w, d]))\n"
        "O[y,x,e] = sum[u,w](P[y,x,u,w] * V[y0[y]+u, x0[x]+w, e])",
        grid,
    )
    q, k, v = RNG.standard_normal((6, 5, 4)), RNG.standard_normal((6, 5, 4)), RNG.standard_normal((6, 5, 2))
    wanted = np.zeros((6, 5, 2))
    for y in range(6):
        for x in range(5):
            a, b = min(max(y - 1, 0), 6 - W), min(max(x - 1, 0), 5 - W)
            keys, values = k[a : a + W, b : b + W].reshape(9, 4), v[a : a + W, b : b + W].reshape(9, 2)
            wanted[y, x] = softmax(keys @ q[y, x] / 2) @ values
    inputs = {"Q": q, "K": k, "V": v}
    np.testing.assert_allclose(evaluate(neighborhood, inputs, sizes={"W": W})["O"], wanted, rtol=1e-12, atol=1e-14)
    some = evaluate(neighborhood, inputs, sizes={"W": W}, rows={"y": [5, 2], "x": [0]})["O"]
    np.testing.assert_allclose(some, wanted[[5, 2]][:, [0]], rtol=1e-12, atol=1e-14)

    third = read(
        "P[i,j,k] = softmax[j,k](sum[d](Q[i,d] * K1[j,d] * K2[k,d]) / D)\n"
        "O[i,e] = sum[j,k](P[i,j,k] * V1[j,e] * V2[k,e])",
        declared("i:N j:M k:L d e", "Q:id K1:jd K2:kd V1:je V2:ke", "O:ie"),
    )
    k2, v2 = RNG.standard_normal((6, 4)), RNG.standard_normal((6, 3))
    weights = softmax((np.einsum("id,jd,kd->ijk", Q, K, k2) / 4).reshape(5, -1)).reshape(5, 7, 6)
    got = evaluate(third, {"Q": Q, "K1": K, "K2": k2, "V1": V, "V2": v2})["O"]
    np.testing.assert_allclose(got, np.einsum("ijk,je,ke->ie", weights, V, v2), rtol=1e-12, atol=1e-14)

    agent = read(
        "scale = D ** -0.5\n"
        "C[a,e] = sum[j](softmax[j](scale * sum[d](A[a,d] * K[j,d])) * V[j,e])\n"
        "O[i,e] = sum[a](softmax[a](scale * sum[d](Q[i,d] * A[a,d])) * C[a,e])",
        declared("i:N j:M a:R d e", "Q:id K:jd A:ad V:je", "O:ie"),
    )
    A = RNG.standard_normal((3, 4))
    got = evaluate(agent, {"Q": Q, "K": K, "A": A, "V": V})["O"]
    np.testing.assert_allclose(got, softmax(Q @ A.T / 2) @ (softmax(A @ K.T / 2) @ V), rtol=1e-12)

    top = read(
        "R[i,j] = rank[j](S[i,j])\nP[i,j] = softmax[j : R[i,j] < topk](S[i,j])",
        declared("i:N j:M", "S:ij", "P:ij", options=[OptionDecl("topk", "int", 3)]),
    )
    scores = RNG.integers(0, 4, (5, 7)).astype(float)
    order = np.argsort(-scores, 1, kind="stable")
    kept = np.full_like(scores, -inf)
    np.put_along_axis(kept, order[:, :3], np.take_along_axis(scores, order[:, :3], 1), 1)
    np.testing.assert_allclose(evaluate(top, {"S": scores})["P"], softmax(kept))
    np.testing.assert_allclose(evaluate(top, {"S": scores}, rows={"j": [6, 0]})["P"], softmax(kept)[:, [6, 0]])


def test_heads_share_keys_through_integer_division() -> None:
    declarations = declared("h:H g:Hk i:N j d", "Q:hid K:gjd", "S:hij", sizes={"G": "H // Hk", "Hk": ""}, batch="")
    program = read("S[h,i,j] = sum[d](Q[h,i,d] * K[h // G, j, d])", declarations)
    q, k = RNG.standard_normal((6, 5, 4)), RNG.standard_normal((2, 7, 4))
    for heads, keys in ((6, 2), (6, 1), (2, 2)):
        got = evaluate(program, {"Q": q[:heads], "K": k[:keys]})["S"]
        wanted = np.einsum("hid,hjd->hij", q[:heads], np.repeat(k[:keys], heads // keys, 0))
        np.testing.assert_allclose(got, wanted, rtol=1e-13, atol=1e-14)


def test_pages_are_gathered_per_batch_entry() -> None:
    declarations = declared(
        "b j:M k:Kt p:Np o:Ps d", "pages:pod table!int:k", "K:jd", sizes={"M": "Kt * Ps"}, batch="b"
    )
    inputs = {**declarations.inputs, "pages": type(declarations.inputs["pages"])("pages", ("p", "o", "d"))}
    declarations = Declarations(
        declarations.sizes, declarations.indices, inputs, {}, declarations.outputs, declarations.batch
    )
    program = read("K[j,d] = pages[table[j // Ps], j % Ps, d]", declarations)
    pages, table = RNG.standard_normal((6, 4, 3)), RNG.integers(0, 6, (2, 3))
    got = evaluate(program, {"pages": pages, "table": table})["K"]
    np.testing.assert_array_equal(got, pages[table].reshape(2, 12, 3))


def test_empty_axes_give_the_values_of_empty_sets() -> None:
    empty = {"Q": Q, "K": np.zeros((0, 4)), "V": np.zeros((0, 3))}
    np.testing.assert_array_equal(evaluate(attention(), empty)["O"], np.zeros((5, 3)))
    none = {"Q": np.zeros((0, 4)), "K": K, "V": V}
    assert evaluate(attention(), none)["O"].shape == (0, 3)
    declarations = declared("i:N", "x:i", "")
    for text, wanted in [
        ("sum", 0), ("prod", 1), ("max", -inf), ("min", inf), ("mean", 0), ("logsumexp", -inf), ("argmax", -1),
    ]:  # fmt: skip
        program = read(f"y = {text}[i](x[i])", declarations)
        assert evaluate(program, {"x": np.zeros(0)}, outputs=["y"])["y"] == wanted


def test_chains_longer_than_the_recursion_limit_evaluate() -> None:
    lines = ["t0[i] = x[i]", *(f"t{k}[i] = t{k - 1}[i] + 1" for k in range(1, 399))]
    declarations = declared("i:N", "x:i", "t398:i")
    np.testing.assert_array_equal(evaluate(read("\n".join(lines), declarations), {"x": X})["t398"], X + 398)


def test_intermediates_are_returned_when_asked_for() -> None:
    got = evaluate(attention(), {"Q": Q, "K": K, "V": V}, {"causal": True}, intermediates=True)
    assert set(got) == {"O", "P", "allowed", "scale"}
    assert got["P"].shape == (5, 7)
    assert evaluate(attention(), {"Q": Q, "K": K, "V": V}, outputs=["P"]).keys() == {"P"}


def test_inputs_stay_as_they_are_and_outputs_are_fresh() -> None:
    declarations = declared("i:N", "x:i", "y:i")
    x = np.arange(3.0)
    got = evaluate(read("y[i] = x[i]", declarations), {"x": x})["y"]
    got[0] = 9
    assert x[0] == 0
    frozen = {"Q": Q.copy(), "K": K.copy(), "V": V.copy()}
    for array in frozen.values():
        array.flags.writeable = False
    evaluate(attention(), frozen, {"causal": True})


def test_static_branches_may_use_what_is_absent() -> None:
    text = "y[i] = (x[i] * cap if cap > 1 else 0) if present(cap) and causal else x[i]"
    np.testing.assert_array_equal(value(text), X)
    np.testing.assert_array_equal(value(text, options={"cap": 2.0}), X)
    np.testing.assert_array_equal(value(text, options={"cap": 2.0, "causal": True}), 2 * X)


ERRORS: list[tuple[str, dict[str, Any], str, int | None, int | None]] = [
    ("y[i] = x[i + 1]", {}, "subscript 1 of 'x' is outside 0..4 at i=4: it is 5", 1, 10),
    ("y[i] = x[-1]", {}, "subscript 1 of 'x' is -1, outside 0..4", 1, 10),
    ("y[i] = sum[k : k < 4](x[k + i])", {}, "subscript 1 of 'x' is outside 0..4 at", 1, 25),
    ("z[i] = x[i]\ny[i] = z[n[i] + 1]", {}, "subscript 1 of 'z' is outside 0..4 at i=3: it is 5", 2, 10),
    ("y[i] = x[i - 1] if i > 1 or i == 0 else 0", {}, "at i=0: it is -1", 1, 10),
    ("y[i] = min(x[i], cap)", {}, "option 'cap' is not set here; guard its use with present(cap)", 1, 18),
    ("y[i] = 1 // n[i]", {}, "'//' by zero at i=1", 1, 13),
    ("y[i] = n[i] ** (i - 1)", {}, "an integer to a negative power", 1, 17),
    ("y[i] = floor(1 / n[i])", {}, "floor of a number that is not finite at i=1", 1, 8),
    ("y[i] = argmax[k](x[k] + log(0 * x[k]) * 0) + i", {}, "NaN in the operand of argmax", 1, 18),
    ("y[i] = max[k : k < i](n[k])", {}, "max of integers over nothing at i=0", 1, 8),
    ("y[i] = 2 ** (N + 60)", {}, "static integer larger than 2**63 - 1", 1, 8),
    ("y[i] = x[i] / D", {}, "size 'D' is not determined by the inputs' shapes; give it in sizes=", 1, 15),
    ("y[i] = sum[d](d * x[i])", {}, "the size of index 'd' is not determined", None, None),
]


@pytest.mark.parametrize(("text", "changed", "message", "line", "column"), ERRORS, ids=[e[0] for e in ERRORS])
def test_what_cannot_be_evaluated_is_named(
    text: str, changed: dict[str, Any], message: str, line: int | None, column: int | None
) -> None:
    with pytest.raises(EvaluationError) as caught:
        value(text, **changed)
    assert message in caught.value.message
    assert (caught.value.equation, caught.value.column) == (line, column)


def call(program: Program | None = None, options: Any = None, **changed: Any) -> Any:
    more = {key: changed.pop(key) for key in ("rows", "outputs", "sizes", "xp") if key in changed}
    inputs = {"Q": Q, "K": K, "V": V} | changed
    return evaluate(program or attention(), inputs, options, **more)


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"Q": Q[0]}, r"input 'Q' has shape (4,), expected 2 axes [i,d]"),
    ({"V": V[:6]}, "input 'V' has length 6 along axis 'j', but M = 7 from input 'K'"),
    ({"Q": None}, "input 'Q' is missing"),
    ({"Qq": Q}, "unknown input 'Qq'; did you mean 'Q'?"),
    ({"bias": RNG.standard_normal((5, 1))}, "input 'bias' has length 1 along axis 'j', but M = 7"),
    ({"Q": Q.astype(complex)}, "input 'Q' has dtype complex128, expected real numbers"),
    ({"options": {"casual": True}}, "unknown option 'casual'; did you mean 'causal'?"),
    ({"options": {"causal": 1}}, "option 'causal' is 1, expected True or False"),
    ({"options": {"causal": None}}, "option 'causal' cannot be None"),
    ({"sizes": {"Z": 3}}, "unknown size 'Z'"),
    ({"sizes": {"N": 3}}, "input 'Q' has length 5 along axis 'i', but N = 3 from sizes="),
    ({"rows": {"q": [1]}}, "rows name 'q', which is no index"),
    ({"rows": {"j": [1]}}, "rows name 'j', which is no axis of O"),
    ({"rows": {"i": [1, 5]}}, "rows of 'i' hold 5, outside 0..4"),
    ({"outputs": ["U"]}, "unknown output 'U'"),
    ({"xp": math}, "xp must be an array API namespace such as numpy or torch, got math"),
]


@pytest.mark.parametrize(("changed", "message"), ARGUMENTS, ids=[message for _, message in ARGUMENTS])
def test_wrong_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        call(**changed)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_integers_and_conditions_are_never_cast() -> None:
    program = read("y[i] = n[i] if keep[i] else 0", declared("i:N", "n!int:i keep!bool:i", "y:i"))
    whole = {"n": np.array([1, 2]), "keep": np.array([False, True])}
    np.testing.assert_array_equal(evaluate(program, whole)["y"], [0, 2])
    with pytest.raises(EvaluationError, match="input 'n' has dtype float64, expected integers"):
        evaluate(program, whole | {"n": np.array([1.0, 2.0])})
    with pytest.raises(EvaluationError, match="input 'keep' has dtype int64, expected booleans"):
        evaluate(program, whole | {"keep": np.array([0, 1])})
    with pytest.raises(EvaluationError, match="input 'n' has dtype bool, expected integers"):
        evaluate(program, whole | {"n": np.array([True, False])})


def test_options_are_typed_and_bounded() -> None:
    options = [
        OptionDecl("rate", "float", 0.0, minimum=0, maximum=1),
        OptionDecl("count", "int", nullable=True),
        OptionDecl("order", "enum", "left", choices=("left", "right")),
        OptionDecl("scale", "float", formula=expression("N ** -0.5")),
        OptionDecl("needed", "int"),
    ]
    declarations = declared("i:N", "x:i", "", options=options)
    given: dict[str, Any] = {"needed": np.int64(3), "rate": 1}
    assert resolve_options(declarations, given, {"N": 4}) == {
        "rate": 1.0, "count": None, "order": "left", "scale": 0.5, "needed": 3,
    }  # fmt: skip
    refused: list[tuple[dict[str, Any], str]] = [
        ({"rate": 2}, "option 'rate' is 2, expected a value from 0 to 1"),
        ({"rate": "a"}, "option 'rate' is 'a', expected a number of type float"),
        ({"rate": nan}, "expected a value from 0 to 1"),
        ({"count": 1.5}, "option 'count' is 1.5, expected an integer"),
        ({"count": True}, "option 'count' is True, expected a number of type int"),
        ({"order": "lefd"}, "expected one of left, right; did you mean 'left'?"),
        ({"needed": None}, "option 'needed' cannot be None"),
    ]
    for wrong, message in refused:
        with pytest.raises(EvaluationError) as caught:
            resolve_options(declarations, given | wrong, {"N": 4})
        assert message in caught.value.message
    with pytest.raises(EvaluationError, match="option 'needed' is missing and has no default"):
        resolve_options(declarations, {}, {"N": 4})


def test_sizes_come_from_shapes_and_formulas() -> None:
    declarations = declared(
        "h:H g:Hk k:Kt*Ps", "Q:h K:g p?:k", "", sizes={"Hk": "", "G": "H // Hk", "Kt": "", "Ps": ""}
    )
    inputs = {"Q": np.zeros(6), "K": np.zeros(2)}
    assert infer_sizes(declarations, inputs) == {"H": 6, "Hk": 2, "G": 3}
    with pytest.raises(EvaluationError, match="input 'p' has length 7 along axis 'k', expected 6"):
        infer_sizes(declarations, inputs | {"p": np.zeros(7)}, {"Kt": 2, "Ps": 3})
    with pytest.raises(EvaluationError, match="size G = 2 from sizes=, but its formula gives 3"):
        infer_sizes(declarations, inputs, {"G": 2})


def test_static_values_are_exact_or_unknown() -> None:
    assert static_value(expression("N // 2 + 2 ** 40"), sizes={"N": 7}) == 3 + 2**40
    assert static_value(expression("N * M"), sizes={"N": 7}) is None
    assert static_value(expression("M > 3 or N > 3"), sizes={"N": 7}) is True
    assert static_value(expression("1 if present(x) else 2"), sizes={}, present={"x"}) == 1
    with pytest.raises(EvaluationError):
        static_value(expression("1 // N"), sizes={"N": 0})


def test_torch_gradients_agree_with_differences() -> None:
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in (("Q", Q), ("K", K), ("V", V))}
    program = attention()

    def loss(*values: Any) -> Any:
        return (evaluate(program, dict(zip(tensors, values)), {"causal": True}, xp=torch)["O"] ** 2).sum()

    assert torch.autograd.gradcheck(loss, tuple(tensors.values()), eps=1e-6, atol=1e-7)


GUARDED = [
    "sum[i : keep[i]](log(x[i]))",
    "sum[i : keep[i]](sqrt(x[i]) / x[i])",
    "sum[i](sqrt(x[i]) if keep[i] else 0)",
    "sum[i](rsqrt(x[i]) * x[i] ** 0.5 if keep[i] else 2 * x[0])",
    "logsumexp[i : keep[i]](1 / x[i])",
    "sum[i](softmax[i : keep[i]](1 / x[i]) * i)",
    "max[i : keep[i]](log(x[i]))",
]


@pytest.mark.parametrize("text", GUARDED)
def test_excluded_places_give_no_nan_gradients(text: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.tensor([2.0, 0.0, 3.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    result = value(f"y = {text}", xp=torch, x=x, keep=torch.tensor([True, False, True, False, True]))
    result.backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[[0, 2, 4]] != 0).any()
    assert x.grad[1] == 0 and x.grad[3] == 0


def test_poison_behind_a_mask_reaches_neither_output_nor_gradient() -> None:
    torch = pytest.importorskip("torch")
    grads = []
    for poison in (0.0, nan, inf):
        key, val = K.copy(), V.copy()
        key[5:], val[5:] = poison, poison
        tensors = {name: torch.tensor(v, requires_grad=True) for name, v in (("Q", Q), ("K", key), ("V", val))}
        bias = torch.zeros(1, 7, dtype=torch.float64)
        text = (
            "S[i,j] = sum[d](Q[i,d] * K[j,d])\nP[i,j] = softmax[j : j < 5](S[i,j])\n"
            "O[i,e] = sum[j : j < 5](P[i,j] * V[j,e])"
        )
        program = read(text, attention().declarations)
        out = evaluate(program, {**tensors, "bias": bias}, xp=torch)["O"]
        out.square().sum().backward()
        grads.append([out.detach(), *(t.grad for t in tensors.values())])
    for poisoned in grads[1:]:
        for got, clean in zip(poisoned, grads[0]):
            np.testing.assert_allclose(got.numpy(), clean.numpy(), rtol=1e-12, atol=1e-14)


def test_another_array_api_namespace_works() -> None:
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    try:
        got = evaluate(attention(), {"Q": Q, "K": K, "V": V}, {"causal": True}, xp=jax.numpy)["O"]
    finally:
        jax.config.update("jax_enable_x64", False)
    np.testing.assert_allclose(np.asarray(got), by_hand(causal=True), rtol=1e-13, atol=1e-14)


def test_attention_never_builds_the_outer_product_of_all_axes() -> None:
    inputs = language_perf.drawn(1, 2, 128, 128, 64)
    program = language_perf.program()
    evaluate(program, inputs)
    peak = language_perf.peak_bytes(lambda: evaluate(program, inputs))
    assert peak < 6 * 2 * 128 * 128 * 8
    np.testing.assert_allclose(evaluate(program, inputs)["O"], language_perf.by_hand(**inputs), rtol=1e-12, atol=1e-14)
