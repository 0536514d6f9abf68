"""Recurrences run step by step, forward and in reverse, alone and in groups, and their boundary can be read."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from attnspec.spec.language import EvaluationError, evaluate, read
from attnspec.spec.language.syntax import OptionDecl
from attnspec.tests.language_build import declared

RNG = np.random.default_rng(0)
T, D, E = 9, 4, 3
Q, K, V = RNG.standard_normal((T, D)), RNG.standard_normal((T, D)), RNG.standard_normal((T, E))
FEATURES = declared("t:T d e c:D", "Q:td K:td V:te beta?:t S0?:de", "O:te", options=[OptionDecl("gamma", "float", 0.9)])
LINE = declared("t:T s:T", "x:t n!int:t", "y:t")

LINEAR = """
S[-1,d,e] = S0[d,e] if present(S0) else 0
S[t,d,e] = gamma * S[t-1,d,e] + K[t,d] * V[t,e]
O[t,e] = sum[d](Q[t,d] * S[t,d,e])
"""


def linear(q: np.ndarray, k: np.ndarray, v: np.ndarray, start: Any = 0.0, gamma: float = 0.9) -> np.ndarray:
    state, out = np.zeros((k.shape[-1], v.shape[-1])) + start, []
    for t in range(len(q)):
        state = gamma * state + np.outer(k[t], v[t])
        out.append(q[t] @ state)
    return np.array(out).reshape(len(q), v.shape[-1])


def test_a_decayed_linear_recurrence() -> None:
    program = read(LINEAR, FEATURES)
    inputs = {"Q": Q, "K": K, "V": V}
    np.testing.assert_allclose(evaluate(program, inputs)["O"], linear(Q, K, V), rtol=1e-13, atol=1e-15)
    start = RNG.standard_normal((D, E))
    got = evaluate(program, inputs | {"S0": start}, {"gamma": 0.5})["O"]
    np.testing.assert_allclose(got, linear(Q, K, V, start, 0.5), rtol=1e-13, atol=1e-15)


def test_rows_run_only_as_far_as_they_need() -> None:
    program = read(LINEAR, FEATURES)
    full = linear(Q, K, V)
    poisoned = V.copy()
    poisoned[6:] = np.nan
    for rows in ([5, 2], [0], [5]):
        got = evaluate(program, {"Q": Q, "K": K, "V": poisoned}, rows={"t": rows})["O"]
        np.testing.assert_allclose(got, full[rows], rtol=1e-13)
    np.testing.assert_allclose(evaluate(program, {"Q": Q, "K": K, "V": V}, rows={"e": [1]})["O"], full[:, [1]])


def test_a_batch_of_recurrences() -> None:
    declarations = declared("t:T d e b h:H", "Q:htd K:htd V:hte", "O:hte", batch="b")
    program = read(
        "S[h,-1,d,e] = 0\nS[h,t,d,e] = S[h,t-1,d,e] * 0.9 + K[h,t,d] * V[h,t,e]\n"
        "O[h,t,e] = sum[d](Q[h,t,d] * S[h,t,d,e])",
        declarations,
    )
    q, k, v = (RNG.standard_normal((2, 3, T, n)) for n in (D, D, E))
    got = evaluate(program, {"Q": q, "K": k, "V": v})["O"]
    for b in range(2):
        for h in range(3):
            np.testing.assert_allclose(got[b, h], linear(q[b, h], k[b, h], v[b, h]), rtol=1e-13, atol=1e-15)


def test_the_delta_rule_reads_its_own_state_with_other_indices() -> None:
    program = read(
        "S[-1,d,e] = 0\n"
        "u[t,e] = V[t,e] - sum[c](K[t,c] * S[t-1,c,e])\n"
        "S[t,d,e] = S[t-1,d,e] + beta[t] * K[t,d] * u[t,e]\n"
        "O[t,e] = sum[d](Q[t,d] * S[t,d,e])",
        FEATURES,
    )
    beta = RNG.uniform(0, 1, T)
    state, wanted = np.zeros((D, E)), []
    for t in range(T):
        state = state + beta[t] * np.outer(K[t], V[t] - K[t] @ state)
        wanted.append(Q[t] @ state)
    got = evaluate(program, {"Q": Q, "K": K, "V": V, "beta": beta})["O"]
    np.testing.assert_allclose(got, wanted, rtol=1e-13, atol=1e-15)


X = RNG.standard_normal(T)
N = np.array([0, 3, 1, 8, 2, 2, 7, 5, 4])
RUN = np.cumsum(X)
BACK = np.cumsum(X[::-1])[::-1]
LINES: list[tuple[str, Any]] = [
    ("S[-1] = 0\nS[t] = S[t-1] + x[t]\ny[t] = S[t]", RUN),
    ("S[-1] = 5\nS[t] = S[t-1] + x[t]\ny[t] = S[t-1]", [5, *(5 + RUN)[:-1]]),
    ("S[-1] = 5\nS[t] = S[t-1] + x[t]\ny[t] = S[T-1] + S[-1]", np.full(T, RUN[-1] + 10)),
    ("S[-1] = 0\nS[t] = S[t-1] + x[t]\ny[t] = S[n[t]]", RUN[N]),
    ("S[-1] = 0\nS[t] = S[t-1] + x[t]\ny[t] = S[n[t] - 1]", np.r_[0, RUN][N]),
    ("S[-1] = 0\nS[t] = S[t-1] + x[t]\ny[t] = sum[s : s < t](S[s])", np.r_[0, np.cumsum(RUN)[:-1]]),
    ("S[-1] = 0\nS[t] = x[t] + S[-1 + t]\ny[t] = S[T - 1 - t]", RUN[::-1]),
    ("S[T] = 0\nS[t] = S[t+1] + x[t]\ny[t] = S[t]", BACK),
    ("S[T] = 2\nS[t] = S[1 + t] + x[t]\ny[t] = S[t+1]", [*(2 + BACK)[1:], 2]),
    ("S[T] = 0\nS[t] = S[t+1] + x[t]\ny[t] = S[0] + S[T]", np.full(T, X.sum())),
    ("y[-1] = 0\ny[t] = max(y[t-1], x[t])", np.maximum.accumulate(np.r_[0, X])[1:]),
    ("y[-1] = 0\ny[t] = y[t-1] * x[t] + (x[t-1] if t > 0 else 1)", None),
    ("a[-1] = 1\nb[-1] = 0\na[t] = a[t-1] / 2 + b[t-1]\nb[t] = b[t-1] / 2 + x[t] * a[t]\ny[t] = a[t] + b[t]", None),
    ("m[t] = x[t] ** 2\nS[-1] = m[0]\nS[t] = S[t-1] * 0.5 + sum[s : s <= t](m[s])\ny[t] = S[t]", None),
    ("c[-1] = 0\nc[t] = c[t-1] + (1 if x[t] > 0 else 0)\ny[t] = x[c[t] - 1] if c[t] > 0 else 0", None),
    ("S[-1] = x[1]\nS[t] = S[t-1]\ny[t] = S[t] * t", X[1] * np.arange(T)),
]


def in_loops(position: int) -> np.ndarray:
    """The four that have no closed form."""
    out = []
    if position == 11:
        y = 0.0
        for t in range(T):
            y = y * X[t] + (X[t - 1] if t else 1)
            out.append(y)
    elif position == 12:
        a, b = 1.0, 0.0
        for t in range(T):
            a = a * 0.5 + b
            b = b * 0.5 + X[t] * a
            out.append(a + b)
    elif position == 13:
        s = X[0] ** 2
        for t in range(T):
            s = s * 0.5 + (X[: t + 1] ** 2).sum()
            out.append(s)
    else:
        c = np.cumsum(X > 0)
        out = [X[c[t] - 1] if c[t] else 0.0 for t in range(T)]
    return np.array(out)


@pytest.mark.parametrize("position", range(len(LINES)), ids=[text.replace("\n", "; ") for text, _ in LINES])
@pytest.mark.parametrize("rows", [None, [4], [8, 0, 3], []])
def test_values(position: int, rows: list[int] | None) -> None:
    text, wanted = LINES[position]
    wanted = in_loops(position) if wanted is None else np.asarray(wanted)
    restriction = None if rows is None else {"t": rows}
    got = evaluate(read(text, LINE), {"x": X, "n": N}, rows=restriction)["y"]
    np.testing.assert_allclose(got, wanted if rows is None else wanted[rows], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("position", range(len(LINES)))
def test_torch_gives_the_same_values_and_gradients_flow(position: int) -> None:
    torch = pytest.importorskip("torch")
    text, wanted = LINES[position]
    x = torch.tensor(X, requires_grad=True)
    got = evaluate(read(text, LINE), {"x": x, "n": N}, xp=torch)["y"]
    np.testing.assert_allclose(got.detach().numpy(), in_loops(position) if wanted is None else wanted, rtol=1e-13)
    program = read(text, LINE)
    assert torch.autograd.gradcheck(lambda v: evaluate(program, {"x": v, "n": N}, xp=torch)["y"], (x,), atol=1e-6)


def test_without_steps_the_boundary_remains() -> None:
    empty = {"x": np.zeros(0), "n": np.zeros(0, dtype=int)}
    for text in (
        "S[-1] = 7\nS[t] = S[t-1] + x[t]\nz = S[T-1]\ny[t] = S[t]",
        "S[T] = 7\nS[t] = S[t+1] + x[t]\nz = S[0]\ny[t] = S[t]",
    ):
        got = evaluate(read(text, LINE), empty, outputs=["z", "y", "S"])
        assert got["z"] == 7
        assert got["y"].shape == got["S"].shape == (0,)


def test_the_state_itself_is_an_output_without_its_boundary() -> None:
    got = evaluate(read("y[-1] = 3\ny[t] = y[t-1] + x[t]", LINE), {"x": X, "n": N}, intermediates=True)
    np.testing.assert_allclose(got["y"], 3 + RUN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("S[-1] = 0\nS[t] = S[t-1] + x[t]\ny[t] = S[t-2]", "subscript 1 of 'S' is outside -1..8 at t=0: it is -2"),
        ("S[-1] = 0\nS[t] = S[t-1] + x[t]\ny[t] = S[t+1]", "subscript 1 of 'S' is outside -1..8 at t=8: it is 9"),
        ("S[T] = 0\nS[t] = S[t+1] + x[t]\ny[t] = S[t-1]", "subscript 1 of 'S' is outside 0..9 at t=0: it is -1"),
        ("S[-1] = 0\nS[t] = S[t-1] + x[t+1]\ny[t] = S[t]", "subscript 1 of 'x' is 9, outside 0..8"),
        ("u[t] = S[t-1]\nS[-1] = 0\nS[t] = u[t] + x[t]\ny[t] = u[t-1]", "subscript 1 of 'u' is outside 0..8"),
    ],
)
def test_steps_outside_the_recurrence_are_errors(text: str, message: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        evaluate(read(text, LINE), {"x": X, "n": N})
    assert message in caught.value.message


def test_conditions_exclude_steps_outside() -> None:
    text = "S[-1] = 0\nS[t] = S[t-1] + (x[t+1] if t + 1 < T else 0)\ny[t] = S[t-2] if t > 0 else 1"
    wanted = np.r_[1, 0, np.cumsum(X[1:])[: T - 2]]
    np.testing.assert_allclose(evaluate(read(text, LINE), {"x": X, "n": N})["y"], wanted, rtol=1e-13)


def test_an_equation_that_a_step_uses_is_computed_once() -> None:
    declarations = declared("t:T s:T", "x:t", "y:t")
    program = read("m[t] = sum[s : s <= t](exp(x[s] * x[t]))\ny[-1] = 0\ny[t] = 0.5 * y[t-1] + m[t]", declarations)
    x = RNG.standard_normal(400) * 0.1
    start = time.perf_counter()
    got = evaluate(program, {"x": x})["y"]
    assert time.perf_counter() - start < 5.0
    m, y = np.tril(np.exp(np.outer(x, x))).sum(1), 0.0
    for t in range(400):
        y = 0.5 * y + m[t]
    assert got[-1] == pytest.approx(y)
