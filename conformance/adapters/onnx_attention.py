"""ONNX's operator `Attention`: ONNX Runtime's CPU kernel and the reference evaluator of the `onnx` package.

Each case becomes a one-node model. Causal attention is aligned as the operator says: at the start without a cache, at
the end with one; so the bottom-right alignment is posed as a cache, with `past_key`/`past_value` where there are at
least as many keys as queries and as `nonpad_kv_seqlen` otherwise. `onnxruntime` builds opset 24 (23 where nothing
newer is needed), `onnx-reference` opset 25 when a window asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attnspec.conformance.adapters._library import MECHANISM, library, one_of, refusals, versions
from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported

INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
IR_VERSION = 11
# Empty axes, and a scale of 0 or below, of which the operator takes the square root.
REFUSALS = ("must be greater than 0",)
Q_RANK = 4


def _model(inputs: Mapping[str, Any], attributes: Mapping[str, Any], opset: int) -> Any:
    onnx = library("onnx", "onnx")
    helper = library("onnx.helper", "onnx")
    names = [name if name in inputs else "" for name in INPUTS]
    while not names[-1]:
        names.pop()
    outputs = ["Y", "present_key", "present_value"] if "past_key" in inputs else ["Y"]
    node = helper.make_node("Attention", names, outputs, **attributes)
    declared = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    element = helper.np_dtype_to_tensor_dtype(inputs["Q"].dtype)
    returned = [helper.make_tensor_value_info(name, element, [None] * Q_RANK) for name in outputs]
    graph = helper.make_graph([node], "attention", declared, returned)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model


def _node(
    Q: Any,
    K: Any,
    V: Any,
    *,
    bias: Any,
    mask: Any,
    kv_length: Any,
    causal: bool,
    causal_alignment: str,
    scale: float | None,
    softcap: float | None,
    window: tuple[int | None, int | None] = (None, None),
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Inputs, attributes and opset of the node for a case."""
    one_of("attn_mask", bias=bias, mask=mask)
    N, M = Q.shape[2], K.shape[2]
    inputs: dict[str, Any] = {"Q": Q, "K": K, "V": V}
    attributes: dict[str, Any] = {}
    opset = 23
    attn_mask = bias if mask is None else mask
    if attn_mask is not None:
        # The runtime broadcasts batch and heads, not queries.
        inputs["attn_mask"] = np.ascontiguousarray(np.broadcast_to(attn_mask, (*attn_mask.shape[:2], N, M)))
    if scale is not None:
        attributes["scale"] = float(scale)
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    if window != (None, None):
        attributes |= {
            name: side
            for name, side in zip(("left_window_size", "right_window_size"), window, strict=True)
            if side is not None
        }
        opset = 25
    positional = causal or window != (None, None)
    if causal:
        attributes["is_causal"] = 1
    at_end = positional and causal_alignment == "bottom_right"
    if kv_length is not None:
        if positional and not at_end:
            raise Unsupported("with nonpad_kv_seqlen the operator aligns at the end")
        inputs["nonpad_kv_seqlen"] = np.asarray(kv_length, np.int64)
    elif at_end and M > N > 0:
        past = M - N
        inputs |= {
            "K": np.ascontiguousarray(K[:, :, past:]),
            "V": np.ascontiguousarray(V[:, :, past:]),
            "past_key": np.ascontiguousarray(K[:, :, :past]),
            "past_value": np.ascontiguousarray(V[:, :, :past]),
        }
    elif at_end and M < N:
        inputs["nonpad_kv_seqlen"] = np.full(Q.shape[0], M, np.int64)
    if "nonpad_kv_seqlen" in inputs:
        opset = max(opset, 24)
    return inputs, attributes, opset


@candidate(
    mechanism=MECHANISM,
    framework="numpy",
    dtypes=("fp32", "fp16"),
    devices=("cpu",),
    declares={"unseen_values": "multiplied"},
    rounding="materialized",
    outputs=("O",),
    short_name="onnxruntime",
    version=versions("onnxruntime", "onnx"),
)
def onnxruntime(
    Q: Any,
    K: Any,
    V: Any,
    *,
    bias: Any = None,
    mask: Any = None,
    kv_length: Any = None,
    causal: bool = False,
    causal_alignment: str = "bottom_right",
    scale: float | None = None,
    softcap: float | None = None,
) -> Any:
    """ONNX Runtime on its CPU provider."""
    runtime = library("onnxruntime", "onnx")
    inputs, attributes, opset = _node(
        Q,
        K,
        V,
        bias=bias,
        mask=mask,
        kv_length=kv_length,
        causal=causal,
        causal_alignment=causal_alignment,
        scale=scale,
        softcap=softcap,
    )
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    state = runtime.capi.onnxruntime_pybind11_state
    with refusals({state.Fail: REFUSALS}):
        session = runtime.InferenceSession(
            _model(inputs, attributes, opset).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        (out,) = session.run(["Y"], {name: np.ascontiguousarray(array) for name, array in inputs.items()})
    return out


@candidate(
    mechanism=MECHANISM,
    framework="numpy",
    dtypes=("fp32", "fp16", "bf16"),
    devices=("cpu",),
    declares={"unseen_values": "multiplied"},
    rounding="materialized",
    outputs=("O",),
    short_name="onnx-reference",
    version=versions("onnx"),
)
def onnx_reference(
    Q: Any,
    K: Any,
    V: Any,
    *,
    bias: Any = None,
    mask: Any = None,
    kv_length: Any = None,
    causal: bool = False,
    causal_alignment: str = "bottom_right",
    window_left: int | None = None,
    window_right: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Any:
    """The reference evaluator, which defines the operator."""
    evaluator = library("onnx.reference", "onnx")
    if scale is not None and scale < 0:
        raise Unsupported("the operator takes the square root of the scale")
    if not K.shape[2]:
        raise Unsupported("the evaluator takes the maximum over an empty axis")
    inputs, attributes, opset = _node(
        Q,
        K,
        V,
        bias=bias,
        mask=mask,
        kv_length=kv_length,
        causal=causal,
        causal_alignment=causal_alignment,
        scale=scale,
        softcap=softcap,
        window=(window_left, window_right),
    )
    if Q.dtype.name == "bfloat16":
        # Without it the weights are summed in bfloat16, which stands still at 256 of them.
        attributes["softmax_precision"] = library("onnx", "onnx").TensorProto.FLOAT
    (out, *_) = evaluator.ReferenceEvaluator(_model(inputs, attributes, opset)).run(None, inputs)
    return out
