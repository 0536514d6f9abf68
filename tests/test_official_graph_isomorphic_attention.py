"""The released GIN-attention, and the Sparse-GIN branch with its projections and norm around the operator.

`Xout_released` of case1 is not compared: the layer as shipped keeps only the edges from a token to itself, so it is no
attention; `Xout` is the same layer with the edges that its paper describes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.spec import load
from attnspec.tests.official import ROOT

NAME = "graph_isomorphic_attention"


def readings() -> list[Callable[..., Any]]:
    return [
        lambda given, **options: load(NAME).evaluate(given, options)["O"],
        lambda given, **options: reference.find(NAME)[0](**given, **options)["O"],
    ]


def recorded(case: str) -> dict[str, Any]:
    with np.load(ROOT / NAME / f"{case}.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("reading", readings(), ids=["equations", "reference"])
def test_the_recorded_gin_attention_comes_out(reading: Callable[..., Any]) -> None:
    found = recorded("case0")
    batch, heads, tokens, width = found["Q"].shape
    given = {
        "Q": found["Q"], "K": found["K"], "U": found["X"].reshape(batch, tokens, heads, width).transpose(0, 2, 1, 3),
        "W1": found["W1"], "b1": found["b1"], "W2": found["W2"], "b2": found["b2"], "norm": found["gn"],
        "self_weight": found["eps"], "sharpness": found["alpha"],
    }  # fmt: skip
    got = reading(given, tau=float(found["tau"]))
    assert np.abs(got.transpose(0, 2, 1, 3).reshape(found["O"].shape) - found["O"]).max() < 1e-11
    units = {
        "U": np.zeros((batch, heads, tokens, tokens)) + np.eye(tokens),
        "W1": np.zeros((heads, tokens, tokens)) + np.eye(tokens),
        "W2": np.zeros((heads, tokens, tokens)) + np.eye(tokens),
    }
    weights = reading({"Q": found["Q"], "K": found["K"]} | units, activation="identity")
    assert np.abs(weights - found["A"]).max() < 1e-11


def logits_of(weights: Any) -> dict[str, Any]:
    """Queries and keys whose causal softmax, at scale 1, has the given weights."""
    batch, heads, tokens, _ = weights.shape
    logits = np.where(np.tril(np.ones((tokens, tokens), dtype=bool)), np.log(np.maximum(weights, 1e-300)), 0.0)
    return {"Q": logits, "K": np.zeros((batch, heads, tokens, tokens)) + np.eye(tokens)}


@pytest.mark.parametrize("reading", readings(), ids=["equations", "reference"])
def test_the_recorded_sparse_gin_layer_comes_out(reading: Callable[..., Any]) -> None:
    found = recorded("case1")
    options = {
        "adjacency": "sparse", "threshold": float(found["th"]), "sharp": float(found["ath"]),
        "edge_threshold": float(found["eth"]), "scale": 1.0,
    }  # fmt: skip
    nodes = found["X"] @ found["Win"].T + found["bin"]
    given = logits_of(found["P"]) | {
        "U": nodes[:, None], "W1": found["W1"][None], "b1": found["b1"][None], "W2": found["W2"][None],
        "b2": found["b2"][None], "self_weight": found["eps"],
    }  # fmt: skip
    branch = reading(given, activation="prelu", slope=float(found["slope"]), skip=True, **options)[:, 0]
    out = branch @ found["Wout"].T + found["bout"]
    out = out / np.sqrt((out * out).mean(-1, keepdims=True) + 1e-5) * found["gn"]
    assert np.abs(found["X"] + found["lam"] * out - found["Xout"]).max() < 1e-11
    unit = np.eye(len(found["At"][0]))
    units = {"U": np.zeros((len(nodes), 1, *unit.shape)) + unit, "W1": unit[None], "W2": unit[None]}
    graph = reading(logits_of(found["P"]) | units, activation="identity", **options)[:, 0]
    assert np.abs(graph - found["At"]).max() < 1e-11
    assert (np.tril(found["At"] == 0)).any()
