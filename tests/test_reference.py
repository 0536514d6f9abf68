"""Two readings of each paper: the equations and the hand-written reference agree to 1e-11, forward and backward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.spec import load, mechanisms

CASES = 120
LIMIT = 1e-11


def softmax_case(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A random call of softmax attention: any sizes, any combination of options that is allowed."""
    rng = np.random.default_rng(seed)

    def maybe(chance: float = 0.3) -> bool:
        return bool(rng.random() < chance)

    b, hk, group = (int(rng.integers(1, 3)) for _ in range(3))
    h, n, m, d, e = hk * group, *(int(rng.integers(low, 8)) for low in (0, 0, 1, 1))
    size = float(rng.choice([0.1, 1.0, 5.0]))
    inputs: dict[str, Any] = {"Q": size * rng.normal(size=(b, h, n, d))}
    options: dict[str, Any] = {}
    kind = rng.choice(["dense", "lengths", "segments", "paged"], p=[0.4, 0.2, 0.2, 0.2])
    if kind == "paged":
        slots, entries = int(rng.integers(1, 4)), int(rng.integers(0, 4))
        m = slots * entries
        pages = entries * b + 1
        inputs["k_pages"] = rng.normal(size=(pages, slots, hk, d))
        inputs["v_pages"] = rng.normal(size=(pages, slots, hk, e))
        inputs["block_table"] = rng.permutation(pages)[: entries * b].reshape(b, entries)
        inputs["kv_length"] = rng.integers(0, m + 1, size=b)
    else:
        inputs["K"], inputs["V"] = rng.normal(size=(b, hk, m, d)), rng.normal(size=(b, hk, m, e))
    if kind == "lengths":
        inputs["q_length"] = rng.integers(0, n + 1, size=b)
        inputs["left_pad"] = rng.integers(0, m + 1, size=b)
        if maybe():
            inputs["kv_length"] = np.array([int(rng.integers(0, m - pad + 1)) for pad in inputs["left_pad"]])
    if kind == "segments":
        inputs["q_segment"] = rng.integers(-1, 3, size=(b, n))
        inputs["kv_segment"] = rng.integers(-1, 3, size=(b, m))
    if maybe():
        inputs["bias"] = rng.normal(size=(rng.choice([1, b]), rng.choice([1, h]), rng.choice([1, n]) if n else 0, m))
        inputs["bias"][rng.random(inputs["bias"].shape) < 0.1] = -np.inf
    if maybe():
        inputs["mask"] = rng.random((rng.choice([1, b]), rng.choice([1, h]), rng.choice([1, n]) if n else 0, m)) < 0.7
    if maybe():
        inputs["sink"] = rng.normal(size=h)
        inputs["sink"][rng.random(h) < 0.1] = -np.inf
    if maybe():
        inputs["dropout_mask"] = rng.random((b, h, n, m)) < 0.7
        options["dropout_p"] = 0.3
    if maybe(0.5):
        options["causal"] = True
    options["causal_alignment"] = str(rng.choice(["bottom_right", "top_left"]))
    for name, high in (("window_left", 4), ("window_right", 4)):
        if maybe():
            options[name] = int(rng.integers(0, high))
    if "window_left" in options and maybe(0.5):
        options["sink_tokens"] = int(rng.integers(0, 3))
    if maybe():
        options["softcap"] = float(rng.uniform(0.3, 3))
    if maybe():
        options["scale"] = float(rng.normal())
    if maybe(0.2):
        options["chunk"] = int(rng.integers(1, 4))
    return inputs, options


def gap(got: Any, want: Any) -> float:
    """Largest difference relative to 1 + the row's largest magnitude; infinite where specials differ."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return float("inf")
    if not want.size:
        return 0.0
    finite = np.isfinite(want)
    if (
        not np.array_equal(np.where(finite, 0.0, want), np.where(finite, 0.0, got))
        or not np.isfinite(got[finite]).all()
    ):
        return float("inf")
    row = 1.0 + np.max(np.abs(np.where(finite, want, 0.0)), axis=-1, keepdims=True)
    return float(np.max(np.abs(np.where(finite, got, 0.0) - np.where(finite, want, 0.0)) / row))


@pytest.mark.parametrize("seed", range(CASES))
def test_softmax_attention_is_read_the_same_way_twice(seed: int) -> None:
    inputs, options = softmax_case(seed)
    mechanism = load("softmax_attention")
    forward, backward = reference.find("softmax_attention")
    want = mechanism.evaluate(inputs, options)
    got = forward(**inputs, **options)
    for name in mechanism.outputs:
        assert gap(got[name], want[name]) < LIMIT, name
    if "K" in inputs and backward is not None:
        rng = np.random.default_rng(seed)
        weights = {name: rng.normal(size=value.shape) for name, value in want.items()}
        gradients = mechanism.gradients(inputs, options, weights)
        found = backward(weights["O"], weights["LSE"], **inputs, **options)
        assert set(found) == set(gradients)
        for name, value in gradients.items():
            assert gap(found[name], value) < LIMIT, name


def test_the_generated_cases_use_every_input_and_option() -> None:
    mechanism = load("softmax_attention")
    seen: set[str] = set()
    for seed in range(CASES):
        inputs, options = softmax_case(seed)
        seen |= set(inputs) | set(options)
    assert seen == set(mechanism.inputs) | set(mechanism.options)


def test_the_comparison_notices_a_single_wrong_element() -> None:
    want = np.ones((2, 3))
    wrong = want.copy()
    wrong[1, 2] += 1e-9
    assert gap(want, want) == 0.0
    assert gap(wrong, want) > LIMIT
    assert gap(np.full((2, 3), np.nan), want) == float("inf")


def test_every_mechanism_has_a_reference() -> None:
    for name in mechanisms():
        assert callable(reference.find(name)[0])


def test_an_unknown_reference_is_named() -> None:
    with pytest.raises(LookupError, match="no_such_thing"):
        reference.find("no_such_thing")


def test_the_reference_imports_numpy_alone() -> None:
    import subprocess
    import sys

    code = (
        "import sys; import attnspec.reference.softmax_attention;"
        "print([m for m in sys.modules if m.startswith(('attnspec.spec', 'torch', 'sympy', 'scipy'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
