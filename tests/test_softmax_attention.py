"""Softmax attention: the equations on worked examples, and three routes to the gradients that must agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attnspec.spec import SpecError, load

MECHANISM = load("softmax_attention")
INF = float("inf")


def example(**extra: Any) -> dict[str, Any]:
    """One query, two keys: logits 1 and 0."""
    return {
        "Q": np.array([[[[1.0, 0.0]]]]),
        "K": np.array([[[[1.0, 0.0], [0.0, 1.0]]]]),
        "V": np.array([[[[1.0], [2.0]]]]),
        **extra,
    }


def value(inputs: dict[str, Any], **options: Any) -> tuple[float, float]:
    got = MECHANISM.evaluate(inputs, {"scale": 1.0, **options})
    return float(got["O"].item()), float(got["LSE"].item())


# Worked by hand: exp(1) / (1 + exp(1)) = 0.731059 and so on.
E1 = np.exp(1.0)


@pytest.mark.parametrize(
    ("inputs", "options", "output", "lse"),
    [
        pytest.param(example(), {}, (E1 + 2) / (E1 + 1), np.log(E1 + 1), id="plain"),
        pytest.param(example(sink=np.zeros(1)), {}, (E1 + 2) / (E1 + 2), np.log(E1 + 2), id="sink"),
        pytest.param(
            example(),
            {"softcap": 1.0},
            2 - 1 / (1 + np.exp(-np.tanh(1))),
            np.log(np.exp(np.tanh(1)) + 1),
            id="softcap",
        ),
        pytest.param(example(mask=np.zeros((1, 1, 1, 2), bool)), {}, 0.0, -INF, id="empty-row"),
        pytest.param(
            example(mask=np.zeros((1, 1, 1, 2), bool), sink=np.zeros(1)),
            {},
            0.0,
            0.0,
            id="empty-row-with-sink",
        ),
        pytest.param(example(), {"causal": True, "causal_alignment": "top_left"}, 1.0, 1.0, id="top-left"),
        pytest.param(example(), {"causal": True}, (E1 + 2) / (E1 + 1), np.log(E1 + 1), id="bottom-right"),
    ],
)
def test_worked_examples_come_out(inputs: dict[str, Any], options: dict[str, Any], output: float, lse: float) -> None:
    got = value(inputs, **options)
    assert got == pytest.approx((output, lse), abs=1e-12)


def test_gradients_of_the_worked_example_come_out() -> None:
    grads = MECHANISM.gradients(example(), {"scale": 1.0}, {"O": np.ones((1, 1, 1, 1))})
    p = E1 / (1 + E1)
    slope = p * (1 - p)
    np.testing.assert_allclose(grads["Q"].ravel(), [-slope, slope], atol=1e-12)
    np.testing.assert_allclose(grads["K"].ravel(), [-slope, 0, slope, 0], atol=1e-12)
    np.testing.assert_allclose(grads["V"].ravel(), [p, 1 - p], atol=1e-12)


def test_gradient_of_the_sink_in_the_worked_example_comes_out() -> None:
    grads = MECHANISM.gradients(example(sink=np.zeros(1)), {"scale": 1.0}, {"O": np.ones((1, 1, 1, 1))})
    assert grads["sink"].item() == pytest.approx(-1 / (E1 + 2), abs=1e-12)


OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": ((), {}),
    "causal": ((), {"causal": True}),
    "top-left": ((), {"causal": True, "causal_alignment": "top_left"}),
    "window": ((), {"window_left": 2, "window_right": 1}),
    "window-with-sink-tokens": ((), {"causal": True, "window_left": 1, "sink_tokens": 2}),
    "chunk": ((), {"chunk": 3, "causal_alignment": "top_left"}),
    "softcap": ((), {"softcap": 0.7}),
    "scale": ((), {"scale": -0.3}),
    "bias": (("bias",), {}),
    "mask": (("mask",), {}),
    "sink": (("sink", "mask"), {}),
    "dropout": (("dropout_mask",), {"dropout_p": 0.25}),
    "lengths": (("q_length", "kv_length"), {"causal": True}),
    "left-pad": (("left_pad",), {"causal": True}),
    "segments": (("q_segment", "kv_segment"), {"causal": True}),
    "everything": (
        ("bias", "mask", "sink", "dropout_mask"),
        {"causal": True, "softcap": 1.5, "dropout_p": 0.5},
    ),
}


def drawn(names: tuple[str, ...], n: int = 5, m: int = 7) -> dict[str, Any]:
    rng = np.random.default_rng(11)
    extra: dict[str, Any] = {
        "bias": rng.normal(size=(1, 4, n, m)),
        "mask": rng.random((2, 1, n, m)) < 0.6,
        "sink": rng.normal(size=4),
        "dropout_mask": rng.random((2, 4, n, m)) < 0.75,
        "q_length": np.array([3, n]),
        "kv_length": np.array([m, 2]),
        "left_pad": np.array([0, 3]),
        "q_segment": np.array([[0, 0, 1, 1, 2], [0, 1, 1, 1, -1]]),
        "kv_segment": np.array([[0, 0, 0, 1, 1, 1, 2], [1, 1, 1, 2, 2, -1, -1]]),
    }
    inputs = {
        "Q": rng.normal(size=(2, 4, n, 3)), "K": rng.normal(size=(2, 2, m, 3)), "V": rng.normal(size=(2, 2, m, 2))
    }  # fmt: skip
    return inputs | {name: extra[name] for name in names}


def cotangents() -> dict[str, Any]:
    rng = np.random.default_rng(12)
    return {"O": rng.normal(size=(2, 4, 5, 2)), "LSE": rng.normal(size=(2, 4, 5))}


@pytest.mark.parametrize("case", OPTIONS)
def test_backward_equations_equal_autograd(case: str) -> None:
    pytest.importorskip("torch")
    names, options = OPTIONS[case]
    inputs = drawn(names)
    by_equations = MECHANISM.gradients(inputs, options, cotangents())
    by_autograd = MECHANISM.gradients(inputs, options, cotangents(), method="autograd")
    assert set(by_equations) == set(by_autograd) >= {"Q", "K", "V"}
    for name, got in by_equations.items():
        assert got.shape == inputs[name].shape
        np.testing.assert_allclose(got, by_autograd[name], atol=1e-11, err_msg=name)


@pytest.mark.parametrize("case", OPTIONS)
def test_backward_equations_equal_finite_differences(case: str) -> None:
    names, options = OPTIONS[case]
    inputs = drawn(names)
    weights = cotangents()
    rng = np.random.default_rng(13)

    def loss(changed: dict[str, Any]) -> float:
        got = MECHANISM.evaluate(changed, options)
        return sum(float(np.sum(np.where(np.isfinite(got[n]), got[n], 0) * w)) for n, w in weights.items())

    for name, gradient in MECHANISM.gradients(inputs, options, weights).items():
        step = rng.normal(size=inputs[name].shape)
        h = 1e-5
        slope = (loss({**inputs, name: inputs[name] + h * step}) - loss({**inputs, name: inputs[name] - h * step})) / (
            2 * h
        )
        assert float(np.sum(gradient * step)) == pytest.approx(slope, rel=2e-8, abs=2e-8), name


def test_a_wrong_backward_equation_is_noticed() -> None:
    """The comparison above has teeth: without the softcap's derivative the gradients differ."""
    inputs = drawn(())
    right = MECHANISM.gradients(inputs, {"softcap": 0.7}, cotangents())
    wrong = MECHANISM.gradients(inputs, {}, cotangents())
    assert np.max(np.abs(right["Q"] - wrong["Q"])) > 1e-3


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"K": None}, {}, "give either K and V"),
        (
            {"K": np.zeros((2, 3, 7, 3)), "V": np.zeros((2, 3, 7, 2))},
            {},
            "multiple of the number of key/value heads",
        ),
        ({"q_segment": np.zeros((2, 5), int)}, {}, "q_segment and kv_segment go together"),
        ({}, {"dropout_p": 0.5}, "dropout_p needs an explicit dropout_mask"),
        ({}, {"dropout_p": 1.0}, "dropout_p"),
        ({}, {"softcap": 0.0}, "softcap"),
        ({}, {"causal": 1.5}, "causal"),
        ({}, {"causal_alignment": "left"}, "causal_alignment"),
        ({}, {"windw_left": 3}, "windw_left"),
        ({"Kx": np.zeros(3)}, {}, "Kx"),
        ({"V": np.zeros((2, 2, 6, 2))}, {}, "V"),
        ({"mask": np.zeros((2, 1, 5, 7))}, {}, "mask"),
        ({"Q": np.zeros((2, 4, 5, 4))}, {}, "K"),
        ({"sink": np.zeros(3)}, {}, "sink"),
        ({"kv_length": np.array([8, 0])}, {}, "'kv_length' holds 8, expected 0 <= kv_length <= M with M = 7"),
        ({"q_length": np.array([-1, 0])}, {}, "'q_length' holds -1"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    inputs = {name: array for name, array in (drawn(()) | change).items() if array is not None}
    with pytest.raises(SpecError) as caught:
        MECHANISM.evaluate(inputs, options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0), (1, 1)])
def test_sizes_zero_and_one_work(n: int, m: int) -> None:
    inputs = {"Q": np.ones((1, 2, n, 3)), "K": np.ones((1, 1, m, 3)), "V": np.full((1, 1, m, 2), 5.0)}
    got = MECHANISM.evaluate(inputs, {"causal": True})
    assert got["O"].shape == (1, 2, n, 2)
    assert got["LSE"].shape == (1, 2, n)
    if m == 0:
        assert not got["O"].any()
        assert np.all(got["LSE"] == -INF)
    elif n:
        assert np.all(got["O"] == 5.0)


def test_restricted_rows_equal_the_rows_of_the_whole() -> None:
    inputs = drawn(("mask", "sink"))
    whole = MECHANISM.evaluate(inputs, {"causal": True})
    part = MECHANISM.evaluate(inputs, {"causal": True}, rows={"i": [4, 0, 2]})
    np.testing.assert_allclose(part["O"], whole["O"][:, :, [4, 0, 2]], atol=1e-13)
    np.testing.assert_allclose(part["LSE"], whole["LSE"][:, :, [4, 0, 2]], atol=1e-13)


def test_what_no_query_may_read_does_not_matter() -> None:
    """Masked keys and values, unused page slots and table entries may hold anything."""
    inputs = drawn(("kv_length",))
    want = MECHANISM.evaluate(inputs, {"causal": True})
    inputs["K"][1, :, 2:] = np.nan
    inputs["V"][1, :, 2:] = np.inf
    got = MECHANISM.evaluate(inputs, {"causal": True})
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)


def test_a_mask_narrower_than_the_block_table_is_refused() -> None:
    pages = np.zeros((4, 2, 1, 3))
    inputs = {"Q": np.zeros((1, 1, 2, 3)), "k_pages": pages, "v_pages": pages, "block_table": np.array([[0, 1]])}
    assert MECHANISM.evaluate({**inputs, "mask": np.ones((1, 1, 2, 4), bool)})["O"].shape == (1, 1, 2, 3)
    with pytest.raises(SpecError, match="a column for every slot"):
        MECHANISM.evaluate({**inputs, "mask": np.ones((1, 1, 2, 3), bool)})


def test_a_paged_cache_reads_only_its_own_slots() -> None:
    rng = np.random.default_rng(5)
    pages = rng.normal(size=(6, 4, 2, 3))
    values = rng.normal(size=(6, 4, 2, 2))
    table = np.array([[5, 1, -1], [2, 0, 4]])
    lengths = np.array([7, 10])
    keys = np.stack([pages[row].reshape(12, 2, 3).swapaxes(0, 1) for row in table])
    vals = np.stack([values[row].reshape(12, 2, 2).swapaxes(0, 1) for row in table])
    queries = rng.normal(size=(2, 4, 5, 3))
    dense = MECHANISM.evaluate({"Q": queries, "K": keys, "V": vals, "kv_length": lengths}, {"causal": True})
    pages[1, 3] = pages[4, 2:] = pages[3] = np.nan
    paged = MECHANISM.evaluate(
        {"Q": queries, "k_pages": pages, "v_pages": values, "block_table": table, "kv_length": lengths},
        {"causal": True},
    )
    for name, array in dense.items():
        np.testing.assert_allclose(paged[name], array, atol=1e-13)
