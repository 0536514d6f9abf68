"""The released local block, and global and cross attention, with their projections and norms around the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec import reference
from attnspec.spec import load
from attnspec.tests.official import ROOT

NAME = "ppf_attention_roitr"
LIMIT = 1e-11


def readings() -> list[Callable[..., Any]]:
    return [
        lambda given, **options: load(NAME).evaluate(given, options),
        lambda given, **options: reference.find(NAME)[0](**given, **options),
    ]


def recorded(case: str) -> dict[str, Any]:
    with np.load(ROOT / NAME / f"{case}.npz") as stored:
        return dict(stored)


def linear(x: Any, found: dict[str, Any], name: str) -> Any:
    return x @ found[f"W{name}"].T + found[f"b{name}"]


def heads(x: Any, found: dict[str, Any]) -> Any:
    """`[n,c]` as `[1,h,n,e]`; heads are blocks of the channels."""
    return x.reshape(len(x), int(found["H"]), -1).transpose(1, 0, 2)[None]


def embedding_maps(found: dict[str, Any]) -> dict[str, Any]:
    count = int(found["H"])
    return {
        key: found[name].reshape(count, -1, *found[name].shape[1:])
        for key, name in (("Wp", "Wp"), ("bp", "bp"), ("Wvp", "Wvp"), ("bvp", "bvp"))
    }


@pytest.mark.parametrize("reading", readings(), ids=["equations", "reference"])
@pytest.mark.parametrize("embedded", [False, True], ids=["from points", "from the recorded embedding"])
def test_the_recorded_local_block_comes_out(reading: Callable[..., Any], embedded: bool) -> None:
    found = recorded("case0")
    x = linear(found["Xin"], found, "in")
    assert np.abs(x - found["X"]).max() < LIMIT
    mine = x[found["node"]]
    given = {
        "Q": heads(linear(mine, found, "q"), found),
        "K": heads(linear(x, found, "k"), found),
        "V": heads(linear(x, found, "v"), found),
        "nb": found["nb"][None],
        "node": found["node"][None],
    } | embedding_maps(found)
    if embedded:
        given["pair"] = found["G"][None]
    else:
        given |= {"points": found["p"][None], "normals": found["nrm"][None], "Wg": found["Wg"], "bg": found["bg"]}
    got = reading(given)["O"][0].transpose(1, 0, 2)
    assert np.abs(got - found["O"]).max() < LIMIT
    y = linear(got.reshape(len(got), -1), found, "o") + mine
    y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5) * found["lnw"] + found["lnb"]
    assert np.abs(y - found["Y"]).max() < LIMIT
    assert np.abs(linear(y, found, "out") - found["out"]).max() < LIMIT


@pytest.mark.parametrize("reading", readings(), ids=["equations", "reference"])
def test_the_recorded_pair_features_and_weights_come_out(reading: Callable[..., Any]) -> None:
    """With one neighbour at a time the output is its embedding, here the features; unit vectors show the weights."""
    found = recorded("case0")
    points, near = found["p"], found["nb"]
    for k in range(near.shape[1]):
        given = {
            "Q": np.zeros((1, 1, len(near), 1)), "K": np.zeros((1, 1, len(points), 1)),
            "V": np.zeros((1, 1, len(points), 4)), "nb": near[None, :, k : k + 1], "node": found["node"][None],
            "points": points[None], "normals": found["nrm"][None], "Wg": np.eye(4), "Wp": np.zeros((1, 1, 4)),
            "Wvp": np.eye(4)[None],
        }  # fmt: skip
        assert np.abs(reading(given)["O"][0, 0] - found["ppf"][:, k]).max() < LIMIT
    x, count = found["X"], int(found["H"])
    place = np.zeros((1, count, len(points), len(points))) + np.eye(len(points))
    given = {
        "Q": heads(linear(x[found["node"]], found, "q"), found), "K": heads(linear(x, found, "k"), found), "V": place,
        "nb": near[None], "node": found["node"][None], "pair": found["G"][None],
    } | embedding_maps(found)  # fmt: skip
    given |= {"Wvp": np.zeros((count, len(points), found["G"].shape[2]))}
    given.pop("bvp")
    got = reading(given, geometry_in_values=False)["O"][0]
    want = np.zeros(got.shape)
    for h, i, k in np.ndindex(found["P"].shape):
        want[h, i, near[i, k]] += found["P"][h, i, k]
    assert np.abs(got - want).max() < LIMIT


@pytest.mark.parametrize("reading", readings(), ids=["equations", "reference"])
@pytest.mark.parametrize("cloud", ["A", "B"])
def test_the_recorded_global_attention_comes_out(reading: Callable[..., Any], cloud: str) -> None:
    found = recorded("case1")
    x = found[f"X{cloud}"]
    given = {
        "Q": heads(linear(x, found, "q"), found),
        "K": heads(linear(x, found, "k"), found),
        "V": heads(linear(x, found, "v"), found),
        "pair": pair_embedding(found[f"p{cloud}"], found)[None],
    } | embedding_maps(found)
    assert np.abs(given["pair"][0] - found[f"Eg{cloud}"]).max() < LIMIT
    got = reading(given, geometry_in_values=False)
    assert np.abs(got["O"][0].transpose(1, 0, 2) - found[f"H{cloud}"]).max() < LIMIT
    assert np.abs(got["pos"][0].transpose(1, 0, 2).reshape(len(x), -1) - found[f"pos{cloud}"]).max() < LIMIT
    if cloud == "A":
        given["V"] = np.zeros((1, int(found["H"]), len(x), len(x))) + np.eye(len(x))
        given["Wvp"] = np.zeros((int(found["H"]), len(x), x.shape[1]))
        given.pop("bvp")
        assert np.abs(reading(given, geometry_in_values=False)["O"][0] - found["PA"]).max() < LIMIT


@pytest.mark.parametrize("reading", readings(), ids=["equations", "reference"])
def test_the_recorded_cross_attention_comes_out(reading: Callable[..., Any]) -> None:
    found = recorded("case1")
    value = heads(linear(found["XB"], found, "vx"), found)
    places = np.zeros((1, int(found["H"]), len(found["XB"]), len(found["XB"]))) + np.eye(len(found["XB"]))
    for v, want in ((value, found["O"].transpose(1, 0, 2)), (places, found["PX"])):
        given = {
            "Q": heads(linear(found["XA"] + found["posA"], found, "qx"), found),
            "K": heads(linear(found["XB"] + found["posB"], found, "kx"), found),
            "V": v,
            "node": np.zeros((1, len(found["XA"])), dtype=int),
            "Wp": np.zeros((int(found["H"]), found["XA"].shape[1] // int(found["H"]), 1)),
            "Wvp": np.zeros((int(found["H"]), v.shape[3], 1)),
        }
        assert np.abs(reading(given)["O"][0] - want).max() < LIMIT


def pair_embedding(points: Any, found: dict[str, Any]) -> Any:
    """GeoTransformer's: a linear map of the distance's sinusoids, and the largest of three of the angles'."""
    apart = points[None] - points[:, None]
    distance = np.sqrt((apart * apart).sum(-1))
    embedded = linear(sinusoid(distance / 0.2, found["Wd"].shape[1]), found, "d")
    for i in range(len(points)):
        near = [j for j in np.argsort(distance[i], kind="stable") if j != i][:3]
        angles = np.zeros((3, len(points)))
        for row, j in enumerate(near):
            normal = np.cross(apart[i, j], apart[i])
            angles[row] = np.arctan2(np.sqrt((normal * normal).sum(-1)), apart[i] @ apart[i, j])
        lines = linear(sinusoid(angles * 180 / (15 * np.pi), found["Wang"].shape[1]), found, "ang")
        embedded[i] += lines.max(0)
    return embedded


def sinusoid(x: Any, width: int) -> Any:
    frequency = 10000.0 ** (-2 * np.arange(width // 2) / width)
    at = x[..., None] * frequency
    return np.stack([np.sin(at), np.cos(at)], axis=-1).reshape(*np.shape(x), width)
