"""The planted kernels' common body: arguments in, O and LSE out, gradients by the hand-written backward.

`make` builds a candidate with the mechanism's full signature. Without faults it is an honest kernel, and the suite must
pass it (`honest.py`); with one, a planted one. What goes wrong around the computation itself (layout of the output,
inputs written, state between calls) is here, the rest in `problem`, `visibility`, `scores`, `forward` and `backward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnspec.conformance.candidate import candidate
from attnspec.conformance.planted import forward as passes
from attnspec.conformance.planted.backward import backward
from attnspec.conformance.planted.problem import Problem, state
from attnspec.conformance.planted.registry import Faults

Tensor = Any
LONG = 512
"""From this many keys on, tiles of 128 are used, as a kernel picks its tiles by length."""


def make(
    name: str,
    faults: Faults | None = None,
    *,
    kind: str = "tiled",
    block: tuple[int, int] = (16, 16),
    splits: int = 1,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A candidate function for torch tensors `[b,h,i,d]`.

    Args:
        kind: "tiled" or "plain".
        block: tile sizes of queries and keys, up to `LONG` keys.
        splits: parts of the keys that are computed apart and merged.
    """
    faults = Faults() if faults is None else faults
    body = _Body(faults, kind, block, splits)

    def kernel(
        Q: Tensor,
        K: Tensor | None = None,
        V: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        sink: Tensor | None = None,
        dropout_mask: Tensor | None = None,
        q_segment: Tensor | None = None,
        kv_segment: Tensor | None = None,
        q_length: Tensor | None = None,
        kv_length: Tensor | None = None,
        left_pad: Tensor | None = None,
        k_pages: Tensor | None = None,
        v_pages: Tensor | None = None,
        block_table: Tensor | None = None,
        causal: bool = False,
        causal_alignment: str = "bottom_right",
        window_left: int | None = None,
        window_right: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        chunk: int | None = None,
        sink_tokens: int = 0,
    ) -> tuple[Tensor, Tensor]:
        inputs = {
            "Q": Q, "K": K, "V": V, "bias": bias, "mask": mask, "sink": sink, "dropout_mask": dropout_mask,
            "q_segment": q_segment, "kv_segment": kv_segment, "q_length": q_length, "kv_length": kv_length,
            "left_pad": left_pad, "k_pages": k_pages, "v_pages": v_pages, "block_table": block_table,
        }  # fmt: skip
        options = {
            "causal": causal, "causal_alignment": causal_alignment, "window_left": window_left,
            "window_right": window_right, "softcap": softcap, "scale": scale, "dropout_p": dropout_p,
            "chunk": chunk, "sink_tokens": sink_tokens,
        }  # fmt: skip
        return body(inputs, options)

    kernel.__name__ = kernel.__qualname__ = name
    kernel.__doc__ = f"{kind} softmax attention, {' and '.join(sorted(faults.names)) or 'honest'}."
    return candidate(
        mechanism="softmax_attention",
        framework="torch",
        dtypes=("fp32", "fp16", "bf16"),
        devices=("cpu",),
        output_dtypes={"LSE": "fp32"},
        outputs=("O", "LSE"),
        name=f"attnspec.conformance.planted:{name}",
    )(kernel)


class _Body:
    """The computation, and what it remembers between calls where a fault point makes it remember."""

    def __init__(self, faults: Faults, kind: str, block: tuple[int, int], splits: int) -> None:
        self.faults, self.kind, self.block, self.splits = faults, kind, block, splits
        self.remembered: dict[Any, Any] = {}

    def __call__(self, inputs: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        options = self.compiled(inputs, options)
        real = [inputs[name] for name in ("Q", "K", "V", "bias", "sink")]
        out, lse = _Attention.apply(*real, self, inputs, options)
        return self.leave(inputs, out), lse

    def compiled(self, inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """The options that the kernel was compiled for."""
        if not self.faults("compiled_for_the_first_options"):
            return options
        key = tuple(inputs["Q"].shape)
        return dict(self.remembered.setdefault(key, options))

    def leave(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        """The output as it is handed over."""
        faults = self.faults
        b, h, n, e = out.shape
        if faults("heads_merged_without_transpose"):
            return out.transpose(1, 2).reshape(b, h, n, e)
        if faults("batch_squeezed_away"):
            return out.squeeze(0)
        if faults("padded_in_front_trimmed_behind") and n % 4:
            return torch.cat([out.new_zeros((b, h, 4 - n % 4, e)), out], 2)[:, :, :n]
        return out

    def run(self, p: Problem) -> tuple[Tensor, Tensor]:
        if self.kind == "plain":
            return passes.plain(p)
        return passes.tiled(p, self.tiles(p), self.splits)

    def tiles(self, p: Problem) -> tuple[int, int]:
        return (128, 128) if p.keys >= LONG or p.queries >= LONG else self.block


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    """Ties the hand-written backward to torch's autograd."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, K: Tensor, V: Tensor, bias: Tensor, sink: Tensor, body: _Body,
                inputs: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        faults = body.faults
        if faults("query_scaled_in_place"):
            Q.mul_(options["scale"] if options["scale"] is not None else Q.shape[-1] ** -0.5)
            options = {**options, "scale": 1.0}
        p = state(faults, options, inputs)
        out, lse = body.run(p)
        out = out.to(p.io)
        _spoil(faults, p, Q, K, V, out)
        ctx.body, ctx.inputs, ctx.options = body, inputs, options
        ctx.save_for_backward(out, lse)
        return out, lse.to(torch.float64 if p.io == torch.float64 else torch.float32)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
        body = ctx.body
        p = state(body.faults, ctx.options, ctx.inputs)
        out, lse = ctx.saved_tensors
        undropped = None
        if p.dropout_mask is not None and body.faults("delta_without_dropout"):
            without = {**ctx.inputs, "dropout_mask": None}
            undropped = body.run(state(body.faults, ctx.options, without))[0]
        compute = p.q.dtype
        with torch.no_grad():
            grads = backward(p, out.to(compute), lse.to(compute), d_out.to(compute), d_lse.to(compute),
                             body.tiles(p), undropped)
        wanted = []
        for position, name in enumerate(("Q", "K", "V", "bias", "sink")):
            given = ctx.inputs[name]
            wanted.append(grads[name].to(given.dtype) if given is not None and ctx.needs_input_grad[position]
                          else None)
        return (*wanted, None, None, None)


def _spoil(faults: Faults, p: Problem, Q: Tensor, K: Tensor | None, V: Tensor | None, out: Tensor) -> None:
    """What is wrong with the finished output or with memory around it."""
    e = out.shape[-1]
    if faults("value_columns_taken_from_query_size"):
        out[..., Q.shape[-1] :] = 0
    if faults("value_tiles_stored_at_column_0") and e > 4:
        out[..., : e - 4] = out[..., 4:].clone()
        out[..., e - 4 :] = 0
    if faults("key_passed_as_value") and K is not None and K.shape[-1] == e:
        problem = state(Faults(), p.options, {"Q": Q, "K": K, "V": K})
        out.copy_(passes.plain(problem)[0])
    if faults("padded_rows_not_written"):
        out.masked_fill_(~p.real_q[:, None, :, None], torch.nan)
    if faults("heads_beyond_the_grid_not_written"):
        out.flatten(0, 1)[4:] = 0
    if faults("one_head_size_corrupt") and Q.shape[-1] == 64 and p.keys >= 64:
        out[..., e // 2 :] = out[..., e // 2 :].roll(1, 2)
    if faults("order_of_sums_varies"):
        out[..., :1, :1] *= 1 + torch.finfo(out.dtype).eps * int(torch.randint(0, 2, ()))
    if faults("reads_behind_the_keys") and K is not None:
        out.add_(0 * _behind(K).to(out.dtype))
    if faults("writes_behind_the_keys") and K is not None:
        _behind(K).zero_()
    if faults("output_overwrites_query") and Q.shape == out.shape:
        Q.detach().copy_(out)


def _behind(tensor: Tensor) -> Tensor:
    """The element behind the tensor's last one, where the storage goes on; else the last one's copy."""
    reach = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride())) + 1
    available = tensor.untyped_storage().nbytes() // tensor.element_size()
    place = tensor.storage_offset() + reach
    if not tensor.numel() or place >= available:
        return tensor.new_zeros(())
    return torch.as_strided(tensor.detach(), (), (), place)
