"""A small suite for tests of the machinery: dense softmax attention with a plain NumPy oracle and a fixed
tolerance.

It has the methods of `conformance.suite.Suite`, a dozen of cases in three shapes, and needs neither the
equation language nor the noise model, so that a failure in a test of the runner is a failure of the runner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnspec.conformance.interface import InputFace, Interface, OptionFace
from attnspec.conformance.suite import Suite
from attnspec.conformance.types import (
    CandidateSignature,
    Case,
    CaseData,
    Direction,
    Level,
    Observation,
    OutputEvidence,
)

PAIRS = ("b", "h", "i", "j")
INTERFACE = Interface(
    mechanism="softmax_attention",
    inputs={
        face.name: face
        for face in (
            InputFace("Q", ("b", "h", "i", "d"), role="query", differentiable=True),
            InputFace("K", ("b", "g", "j", "d"), role="key", optional=True, differentiable=True),
            InputFace("V", ("b", "g", "j", "e"), role="value", optional=True, differentiable=True),
            InputFace("bias", PAIRS, role="bias", optional=True, differentiable=True),
            InputFace("mask", PAIRS, kind="bool", role="mask", optional=True),
            InputFace("sink", ("h",), role="sink", optional=True, differentiable=True),
            InputFace("dropout_mask", PAIRS, kind="bool", role="dropout", optional=True),
            InputFace("kv_length", ("b",), kind="int", role="length", optional=True),
        )
    },
    options={
        face.name: face
        for face in (
            OptionFace("causal", "bool", False),
            OptionFace("causal_alignment", "enum", "bottom_right", choices=("bottom_right", "top_left")),
            OptionFace("window_left", "int", None, nullable=True),
            OptionFace("window_right", "int", None, nullable=True),
            OptionFace("softcap", "float", None, nullable=True),
            OptionFace("scale", "float", None, computed=True),
            OptionFace("dropout_p", "float", 0.0),
        )
    },
    outputs={"O": ("b", "h", "i", "e"), "LSE": ("b", "h", "i")},
)

SHAPES = {"small": (1, 2, 3, 5, 4), "square": (2, 2, 4, 4, 8), "decode": (1, 4, 1, 9, 16)}
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}
_PLAIN: tuple[tuple[str, ...], dict[str, Any]] = ((), {})
LAYOUTS = ("contiguous", "transposed", "strided")


def attention(data: CaseData) -> tuple[dict[str, Any], dict[str, Any]]:
    """Outputs in float64, and gradients of Q, K, V for the case's cotangents."""
    Q, K, V = (data.inputs[name] for name in ("Q", "K", "V"))
    groups = Q.shape[1] // K.shape[1]
    K, V = np.repeat(K, groups, axis=1), np.repeat(V, groups, axis=1)
    N, M = Q.shape[2], K.shape[2]
    scale = data.options.get("scale", Q.shape[-1] ** -0.5)
    S = scale * np.einsum("bhid,bhjd->bhij", Q, K)
    if "bias" in data.inputs:
        S = S + data.inputs["bias"]
    if "mask" in data.inputs:
        S = np.where(data.inputs["mask"], S, -np.inf)
    if data.options.get("causal"):
        shift = M - N if data.options.get("causal_alignment", "bottom_right") == "bottom_right" else 0
        S = np.where(np.arange(M)[None, :] <= np.arange(N)[:, None] + shift, S, -np.inf)
    top = S.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(S - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(-1, keepdims=True)
    P = weights / np.where(total > 0, total, 1.0)
    with np.errstate(divide="ignore"):
        LSE = (np.log(total) + top)[..., 0]
    out = np.einsum("bhij,bhje->bhie", P, V)
    grads: dict[str, Any] = {}
    if "O" in data.cotangents:
        dO = data.cotangents["O"]
        dP = np.einsum("bhie,bhje->bhij", dO, V)
        dS = P * (dP - (dO * out).sum(-1, keepdims=True))
        heads = (Q.shape[0], Q.shape[1] // groups, groups)
        grads["Q"] = scale * np.einsum("bhij,bhjd->bhid", dS, K)
        dK = scale * np.einsum("bhij,bhid->bhjd", dS, Q)
        dV = np.einsum("bhij,bhie->bhje", P, dO)
        grads["K"] = dK.reshape(*heads, *dK.shape[2:]).sum(2)
        grads["V"] = dV.reshape(*heads, *dV.shape[2:]).sum(2)
        grads["bias"] = dS
    return {"O": out, "LSE": LSE}, grads


def rounded(array: Any, dtype: str) -> Any:
    """Round to the dtype, in float64."""
    if dtype == "fp64":
        return array
    if dtype == "bf16":
        bits = array.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(float)
    return array.astype(np.float16 if dtype == "fp16" else np.float32).astype(np.float64)


class SmallSuite(Suite):
    """The suite's interface over this file's oracle. `variants` are (inputs, options) pairs to pose besides
    plain."""

    def __init__(self, variants: Sequence[tuple[tuple[str, ...], dict[str, Any]]] = ()) -> None:
        self.name = "small"
        self.interface = INTERFACE
        self.variants = tuple(variants)

    def __reduce__(self) -> tuple[Any, ...]:
        return SmallSuite, (self.variants,)

    def cases(
        self,
        level: Level,
        dtypes: Sequence[str],
        direction: Direction,
        seed: int,
        signature: CandidateSignature,
    ) -> list[Case]:
        found = []
        for shape in SHAPES:
            for layout in LAYOUTS:
                for number, (inputs, options) in enumerate([_PLAIN, *self.variants]):
                    found += [
                        make_case(shape, layout, dtype, direction, seed, inputs, options, number) for dtype in dtypes
                    ]
        return found

    def build(self, case: Case, signature: CandidateSignature | None = None) -> CaseData:
        return build(case)

    def frame(self, case: Case, data: CaseData) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        Q, V = data.inputs["Q"], data.inputs["V"]
        resolved = {name: face.default for name, face in INTERFACE.options.items()} | {"scale": Q.shape[-1] ** -0.5}
        return resolved | data.options, {"O": (*Q.shape[:3], V.shape[3]), "LSE": Q.shape[:3]}

    def expected(self, case: Case, data: CaseData, signature: CandidateSignature) -> Any:
        return attention(data)

    def check(self, signature: CandidateSignature) -> None:
        return

    def to_candidate(self, data: CaseData, signature: CandidateSignature) -> CaseData:
        return data

    def stripped(self, expected: Any) -> Any:
        return expected

    def restored(self, expected: Any, data: CaseData) -> Any:
        return expected

    def rounding(self, signature: CandidateSignature) -> dict[str, Any]:
        return {"name": "fixed"}

    def judge(self, case: Case, expected: Any, observation: Observation) -> list[OutputEvidence]:
        outputs, grads = expected
        want, got = (grads, observation.gradients) if case.direction == "backward" else (outputs, observation.outputs)
        return [_evidence(name, got[name].astype(float), want[name], TOLERANCE[case.dtype]) for name in got]


def make_case(
    shape: str = "small",
    layout: str = "contiguous",
    dtype: str = "fp32",
    direction: Direction = "forward",
    seed: int = 0,
    inputs: tuple[str, ...] = (),
    options: dict[str, Any] | None = None,
    number: int = 0,
    check: str = "tolerance",
) -> Case:
    """One case; the id says what it is."""
    B, H, N, M, D = SHAPES[shape]
    return Case(
        id=f"small/{shape}/{layout}/{dtype}/{direction}/{number}/{seed}",
        mechanism="softmax_attention",
        group=shape,
        level="smoke",
        sizes={"B": B, "H": H, "N": N, "M": M, "D": D},
        options=options or {},
        inputs=inputs,
        values="normal",
        layout=layout,
        dtype=dtype,
        direction=direction,
        check=check,
        seed=seed,
    )


def build(case: Case) -> CaseData:
    """Normal values, different for every case."""
    size = case.sizes
    B, H, N, M, D = (size[name] for name in ("B", "H", "N", "M", "D"))
    rng = np.random.default_rng([case.seed, *case.id.encode()])
    inputs: dict[str, Any] = {
        "Q": rng.standard_normal((B, H, N, D)),
        "K": rng.standard_normal((B, H // 2, M, D)),
        "V": rng.standard_normal((B, H // 2, M, D + 2)),
    }
    if "bias" in case.inputs:
        inputs["bias"] = rng.standard_normal((B, H, N, M))
    if "sink" in case.inputs:
        inputs["sink"] = rng.standard_normal(H)
    inputs = {name: rounded(value, case.dtype) for name, value in inputs.items()}
    if "mask" in case.inputs:
        inputs["mask"] = rng.random((B, H, N, M)) < 0.7
    cotangents = {}
    if case.direction == "backward":
        cotangents["O"] = rounded(rng.standard_normal((B, H, N, D + 2)), case.dtype)
    return CaseData(inputs, dict(case.options), cotangents)


def _evidence(name: str, got: Any, want: Any, tolerance: float) -> OutputEvidence:
    with np.errstate(invalid="ignore"):
        z = np.where(got == want, 0.0, np.abs(got - want) / tolerance)
    z = np.where(np.isnan(z), np.inf, z)
    worst = np.unravel_index(int(z.argmax()), z.shape)
    return OutputEvidence(
        name=name,
        passed=bool(z.max() <= 4),
        elements=z.size,
        rms_z=float(np.sqrt((z**2).mean())),
        max_z=float(z.max()),
        rms_limit=4.0,
        max_limit=4.0,
        worst_index=tuple(int(part) for part in worst),
        worst_got=float(got[worst]),
        worst_want=float(want[worst]),
        worst_sigma=tolerance,
    )
