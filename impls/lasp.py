"""LASP-2 on Triton: linear attention over a sequence that is cut over devices, which exchange one state each.

`lasp2` computes all devices' parts on one; `lasp2_rank` is one rank's part under torch.distributed. Both use the same
local steps over the engine `engines.linear_chunks`: a device's state, the states before it, its outputs.
"""

# ruff: noqa: E741 (O is the field's name of the output)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attnspec.conformance.candidate import candidate
from attnspec.conformance.types import Unsupported
from attnspec.impls.engines import runtime  # noqa: F401 (first: it decides how Triton is imported)
from attnspec.impls.engines.arguments import Arguments
from attnspec.impls.engines.linear_launch import Recurrence, final_state, forward, read_state
from attnspec.impls.linear import MOST_FEATURES
from attnspec.impls.softmax import softmax_attention

FEATURE_MAPS = ("identity", "elu1", "relu", "silu")


@candidate(mechanism="lasp2", outputs=("O", "Mst"), output_dtypes={"Mst": "fp32"}, differentiable=False)
def lasp2(
    Q: Tensor, K: Tensor, V: Tensor, s: Tensor | None = None, *, devices: int = 1, causal: bool = True,
    layer: str = "linear", feature_map: str = "identity", scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sequence-parallel attention (LASP-2, arXiv 2502.07563, Algorithms 1 and 2, and LASP-2H), all parts on one device.

    Args:
        Q, K: `[b,h,i,d]`. V: `[b,h,i,e]`. One dtype: fp16, bf16 or fp32.
        s: `[h]`, at least 0: the factor from one token to the next is exp(-s). Causal linear layers only.
        devices: number of equal parts of the sequence. causal: False lets every token see all.
        layer: "linear", where the devices exchange states, or "softmax", where they exchange keys and values.
        feature_map: of queries and keys of a linear layer: "identity", "elu1" (elu + 1), "relu" or "silu".
        scale: of a softmax layer, default d ** -0.5.

    Returns:
        O `[b,h,i,e]` in the inputs' dtype, and each device's own state `[b,devices,h,d,e]` in float32.

    Raises: ValueError or TypeError for wrong arguments, Unsupported for features beyond 256 and for gradients.
    """
    devices = _checked(Q, K, V, s, devices, causal, layer, feature_map)
    Q, K = _mapped(Q, feature_map), _mapped(K, feature_map)
    parts = [tuple(x.tensor_split(devices, 2)[t] for x in (Q, K, V)) for t in range(devices)]
    states = torch.stack([local_state(k, v, s) for _, k, v in parts], 1)
    if layer == "softmax":
        O, _ = softmax_attention(Q, K, V, causal=causal, scale=scale)
        return O, states
    outs = [
        local_output(q, k, v, s, state_for(states, t, s, q.shape[2], causal), causal)
        for t, (q, k, v) in enumerate(parts)
    ]
    return torch.cat(outs, 2), states


def lasp2_rank(
    Q: Tensor, K: Tensor, V: Tensor, s: Tensor | None = None, *, causal: bool = True, layer: str = "linear",
    feature_map: str = "identity", scale: float | None = None, group: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """This rank's part of `lasp2`: its tokens' outputs, and its own state `[b,h,d,e]`.

    Args:
        Q, K, V: as for `lasp2`, this rank's tokens; all ranks hold equally many, in the order of their ranks.
        group: the process group of torch.distributed, default all.

    One all-gather of the states (of keys and values in a softmax layer), whatever the length of the sequence.
    """
    import torch.distributed as dist

    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    _checked(Q, K, V, s, 1, causal, layer, feature_map)
    Q, K = _mapped(Q, feature_map), _mapped(K, feature_map)
    own = local_state(K, V, s)
    if layer == "softmax":
        keys, values = (torch.cat(_gathered(x, ranks, group), 2) for x in (K, V))
        if causal:
            # Positions are counted from the end: what comes after this rank is left away.
            keys, values = (x[:, :, : (rank + 1) * Q.shape[2]] for x in (keys, values))
        return softmax_attention(Q, keys, values, causal=causal, scale=scale)[0], own
    states = torch.stack(_gathered(own, ranks, group), 1)
    return local_output(Q, K, V, s, state_for(states, rank, s, Q.shape[2], causal), causal), own


def local_state(K: Tensor, V: Tensor, s: Tensor | None) -> Tensor:
    """A device's own state `[b,h,d,e]`: what it sends."""
    return final_state(Recurrence(K, K, V, _log_decay(K, s), None, 1.0))


def state_for(states: Tensor, t: int, s: Tensor | None, tokens: int, causal: bool) -> Tensor:
    """What device t reads of all devices' states `[b,devices,h,d,e]`: those before it, decayed; or all."""
    if not causal:
        return states.sum(1)
    if s is None:
        return states[:, :t].sum(1)
    away = torch.arange(t - 1, -1, -1, device=states.device, dtype=torch.float32)
    weights = torch.exp(-away[:, None] * tokens * s.float())
    return (states[:, :t] * weights[:, :, None, None]).sum(1)


def local_output(Q: Tensor, K: Tensor, V: Tensor, s: Tensor | None, state: Tensor, causal: bool) -> Tensor:
    """A device's outputs `[b,h,i,e]` from its own tokens and what it reads of the others."""
    if not causal:
        return read_state(Q, state)
    return forward(Recurrence(Q, K, V, _log_decay(K, s), state, 1.0), last=False)[0]


def _log_decay(K: Tensor, s: Tensor | None) -> Tensor:
    rate = torch.zeros(K.shape[1], device=K.device) if s is None else s.detach().float()
    return -rate[None, :, None].expand(K.shape[:3])


def _mapped(x: Tensor, feature_map: str) -> Tensor:
    if feature_map == "identity":
        return x
    wide = x.float()
    if feature_map == "elu1":
        return torch.where(wide > 0, wide + 1.0, torch.exp(wide.clamp(max=0.0))).to(x.dtype)
    return (torch.relu(wide) if feature_map == "relu" else torch.nn.functional.silu(wide)).to(x.dtype)


def _gathered(x: Tensor, ranks: int, group: Any) -> list[Tensor]:
    import torch.distributed as dist

    found = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(ranks)]
    dist.all_gather(found, x.contiguous(), group=group)
    return found


def _checked(
    Q: Tensor, K: Tensor, V: Tensor, s: Tensor | None, devices: int, causal: bool, layer: str, feature_map: str
) -> int:
    call = Arguments("lasp2")
    call.tensor("Q", Q, "b h i d")
    call.tensor("K", K, "b h i d")
    call.tensor("V", V, "b h i e")
    call.tensor("s", s, "h", real=True, optional=True)
    call.at_most("d e", MOST_FEATURES)
    devices = call.count("devices", devices)
    causal = call.flag("causal", causal)
    if layer not in ("linear", "softmax"):
        raise call.wrong("layer", "'linear' or 'softmax'", repr(layer))
    if feature_map not in FEATURE_MAPS:
        raise call.wrong("feature_map", f"one of {', '.join(FEATURE_MAPS)}", repr(feature_map))
    if call.sizes("i")[0] % devices:
        raise call.wrong("Q", f"of a multiple of {devices} tokens, the devices", call.sizes("i")[0])
    if s is not None and (not causal or layer == "softmax"):
        raise ValueError("lasp2: only causal linear layers decay: give s with neither causal=False nor layer='softmax'")
    if layer == "softmax" and feature_map != "identity":
        raise ValueError("lasp2: a softmax layer has no feature map")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (Q, K, V)):
        raise Unsupported("lasp2: no kernel for gradients; call it under torch.no_grad()")
    return devices


def typical_calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Calls for the ahead-of-time compiler: (mechanism, label, call); `call` launches everything that is compiled."""
    for width in (64, 128):
        for causal in (True, False):

            def call(width: int = width, causal: bool = causal) -> object:
                Q, K, V = (torch.zeros(2, 4, 512, width, dtype=dtype) for _ in range(3))
                return lasp2(Q, K, V, torch.ones(4) if causal else None, devices=2, causal=causal)

            yield "lasp2", f"D{width} {'causal' if causal else 'all'}", call
