"""Agent attention on Triton: two calls of the softmax engine, and the depthwise convolution of `engines.depthwise`."""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnspec.conformance.candidate import candidate
from attnspec.impls import softmax
from attnspec.impls.engines import runtime  # first: it decides how Triton is imported
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.depthwise import depthwise, depthwise_weights
from attnspec.impls.engines.softmax_configs import TileConfig
from attnspec.impls.softmax_arguments import MAX_HEAD, Problem, check

INPUTS = ("Q", "K", "V", "A", "pool", "B1", "B2", "dwc_w", "dwc_b")


@dataclass(frozen=True)
class _Call:
    """Options of a checked call, and its mask `[b,j]`."""

    mask: Tensor | None
    scale: float
    query_scale: float
    shortcut: float
    width: int
    first: int
    config: Any

    def reading(self, agents: Tensor, x: dict[str, Any]) -> Problem:
        """The agents read from the keys."""
        mask = None if self.mask is None else self.mask[:, None, None, :]
        bias = None if x["B1"] is None else x["B1"][None]
        return check(agents, x["K"], x["V"], bias=bias, mask=mask, scale=self.scale)

    def answering(self, agents: Tensor, values: Tensor, x: dict[str, Any]) -> Problem:
        """The queries read from the agents."""
        bias = None if x["B2"] is None else x["B2"][None]
        return check(x["Q"], agents, values, bias=bias, scale=self.query_scale)

    def local(self, x: dict[str, Any]) -> bool:
        """Whether a token's own surroundings are added."""
        return x["dwc_w"] is not None or self.shortcut != 0.0


def _tile(call: _Call, Q: Tensor) -> Any:
    """Of both forward calls; None: the engine chooses, but its two stages beside a bias spill on Blackwell."""
    small = Q.shape[-1] <= 64 and Q.dtype.itemsize == 2 and runtime.target_of(Q) == ("cuda", 100)
    return call.config or (TileConfig(64, 32, 4, 1, registers=255) if small else None)


def _forward(call: _Call, x: dict[str, Any]) -> tuple[Tensor, ...]:
    """O, and what the backward pass needs: agents, their values and LSE, the attention's output and LSE."""
    agents = x["A"] if x["pool"] is None else torch.matmul(x["pool"], x["Q"])
    tile = _tile(call, x["Q"])
    values, read = softmax.forward(call.reading(agents, x), tile)
    core, answered = softmax.forward(call.answering(agents, values, x), tile)
    out = core
    if call.local(x):
        out = depthwise(
            x["V"], core, x["dwc_w"], x["dwc_b"], width=call.width, first=call.first, own=call.shortcut,
            dtype=core.dtype,
        )  # fmt: skip
    return out, agents, values, read, core, answered


def _backward(
    call: _Call, x: dict[str, Any], saved: tuple[Tensor, ...], dO: Tensor, wanted: dict[str, bool]
) -> dict[str, Tensor]:
    """Gradients by name; sums of several terms are taken in float32 and rounded once."""
    agents, values, read, core, answered = saved
    wide = torch.float32
    from_agents = wanted["A"] or (wanted["Q"] and x["pool"] is not None)
    reads = from_agents or any(wanted[name] for name in ("K", "V", "B1"))
    second = softmax.backward(
        call.answering(agents, values, x), core, answered, dO, None,
        {"Q": wanted["Q"], "K": from_agents, "V": reads, "bias": wanted["B2"], "sink": False},
        None if x["B2"] is None else x["B2"][None], call.config, wide,
    )  # fmt: skip
    first: dict[str, Tensor] = {}
    if reads:
        first = softmax.backward(
            call.reading(agents, x), values, read, second["V"].to(values.dtype), None,
            {"Q": from_agents, "K": wanted["K"], "V": wanted["V"], "bias": wanted["B1"], "sink": False},
            None if x["B1"] is None else x["B1"][None], call.config, wide,
        )  # fmt: skip
    grads = {"K": first.get("K"), "V": first.get("V"), "Q": second.get("Q")}
    grads["B1"] = first["bias"][0] if wanted["B1"] else None
    grads["B2"] = second["bias"][0] if wanted["B2"] else None
    if from_agents:
        grads["A"] = first["Q"] + second["K"]
        if x["pool"] is not None and wanted["Q"]:
            grads["Q"] = second["Q"] + torch.matmul(x["pool"].T.to(wide), grads["A"])
    if wanted["V"] and call.local(x):
        grads["V"] = depthwise(
            dO, first["V"], x["dwc_w"], None, width=call.width, first=call.first, own=call.shortcut, dtype=wide,
            turned=True,
        )  # fmt: skip
    if wanted["dwc_w"] or wanted["dwc_b"]:
        grads["dwc_w"], grads["dwc_b"] = depthwise_weights(x["V"], dO, width=call.width, first=call.first)
    return {name: grad.to(x[name].dtype) for name, grad in grads.items() if wanted[name] and grad is not None}


class _Agent(torch.autograd.Function):  # type: ignore[misc]
    """Saves the inputs, the agents and the outputs of both attentions; the weights are computed again."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Any) -> Any:
        out, *kept = _forward(call, dict(zip(INPUTS, inputs)))
        ctx.save_for_backward(*inputs, *kept)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dO: Tensor) -> Any:
        x = dict(zip(INPUTS, ctx.saved_tensors))
        wanted = dict(zip(INPUTS, ctx.needs_input_grad[1:]))
        grads = _backward(ctx.call, x, ctx.saved_tensors[len(INPUTS) :], dO, wanted)
        return None, *(grads.get(name) for name in INPUTS)


@candidate(mechanism="agent_attention", outputs=("O",))
def agent_attention(
    Q: Tensor, K: Tensor, V: Tensor, A: Tensor | None = None, pool: Tensor | None = None, B1: Tensor | None = None,
    B2: Tensor | None = None, mask: Tensor | None = None, dwc_w: Tensor | None = None, dwc_b: Tensor | None = None, *,
    width: int | None = None, class_token: bool = False, shortcut: float = 0.0, scale: float | None = None,
    query_scale: float | None = None, config: Any = None,
) -> Tensor:  # fmt: skip
    """Agent attention (Han et al., arXiv 2312.08874, Eq. 3 to 6): agents read from the keys, queries from the agents.

    Args:
        Q: `[b,h,i,d]`. K: `[b,h,j,d]`. V: `[b,h,j,e]`. All of one dtype: fp16, bf16 or fp32.
        A: `[b,h,r,d]`, the agents; or pool `[r,i]`, which makes them of the queries: A = pool Q.
        B1: `[h,r,j]`, B2: `[h,i,r]`: added to the logits. mask: bool `[b,j]`, True = the agents may read key j.
        dwc_w: `[c,3,3]`, c = h * E + e: depthwise kernel over the map of values. dwc_b: `[c]`.
        width: columns of the map, default floor(sqrt(j)). class_token: token 0 is not on the map.
        shortcut: this multiple of V is added. scale, query_scale: of the two products, default d ** -0.5.
        config: a `TileConfig` for all attention kernels.

    Returns:
        O `[b,h,i,e]`; agents that may read no key hold zeros.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for head sizes beyond 256.
    """
    call = Arguments("agent_attention")
    call.tensor("Q", Q, "b h i d")
    call.tensor("K", K, "b h j d")
    call.tensor("V", V, "b h j e")
    if (A is None) == (pool is None):
        raise ValueError("agent_attention: give the agents A, or pool")
    call.tensor("A", A, "b h r d", optional=True)
    call.tensor("pool", pool, "r i", optional=True)
    call.tensor("B1", B1, "h r j", real=True, optional=True)
    call.tensor("B2", B2, "h i r", real=True, optional=True)
    call.at_most("d e", MAX_HEAD)
    if dwc_b is not None and dwc_w is None:
        raise ValueError("agent_attention: dwc_b goes with dwc_w")
    H, N, M, E, R = call.sizes("h i j e r")
    for name, value, shape in (("dwc_w", dwc_w, (H * E, 3, 3)), ("dwc_b", dwc_b, (H * E,))):
        call.tensor(name, value, "c y x"[: 2 * len(shape) - 1], real=True, optional=True)
        if value is not None and tuple(value.shape) != shape:
            raise call.wrong(name, f"of shape {list(shape)}", list(value.shape))
    if R < 1:
        raise call.wrong("A" if pool is None else "pool", "of at least one agent", R)
    added = call.number("shortcut", shortcut)
    if (dwc_w is not None or added != 0.0) and N != M:
        raise ValueError(f"agent_attention: the convolution and the shortcut need N = M, got {N} and {M}")
    given = _Call(
        mask=call.boolean("mask", mask, "b j"), scale=call.number("scale", scale, Q.shape[3] ** -0.5),
        query_scale=call.number("query_scale", query_scale, Q.shape[3] ** -0.5), shortcut=added,
        width=max(math.isqrt(M), 1) if width is None else call.count("width", width),
        first=int(call.flag("class_token", class_token)), config=config,
    )  # fmt: skip
    inputs = (Q, K, V, A, pool, B1, B2, dwc_w, dwc_b)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        O: Tensor = _Agent.apply(given, *inputs)
        return O
    return _forward(given, dict(zip(INPUTS, inputs)))[0]


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Calls for the ahead-of-time compiler: (mechanism, label, call)."""

    def run(D: int, side: int, agents: int, local: bool) -> Tensor:
        H, tokens = 4, side * side
        g = dict[str, Any](dtype=dtype, requires_grad=True)
        Q, K, V = (torch.zeros(1, H, tokens, D, **g) for _ in range(3))
        more: dict[str, Any] = {"A": torch.zeros(1, H, agents, D, **g)}
        if local:
            more |= {
                "B1": torch.zeros(H, agents, tokens, **g), "B2": torch.zeros(H, tokens, agents, **g),
                "dwc_w": torch.zeros(H * D, 3, 3, **g), "dwc_b": torch.zeros(H * D, **g), "shortcut": 0.075,
            }  # fmt: skip
        O = agent_attention(Q, K, V, **more)
        O.backward(torch.zeros_like(O))
        return O

    yield "agent_attention", "local-64", lambda: run(64, 24, 49, True)
    yield "agent_attention", "plain-128", lambda: run(128, 24, 49, False)
