"""A call's arguments as the planted kernels see them: tensors in the compute dtype, positions, pages, heads.

Shared by the plain and the tiled kernel and their backward. Everything here is right unless a fault point is switched
on: `faults("name")` marks where a planted kernel goes wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attnspec.conformance.planted.registry import Faults

Tensor = Any


@dataclass
class Problem:
    """One call. `q` `[B,H,N,D]`, `k` `[B,Hk,M,D]`, `v` `[B,Hk,M,E]` in the compute dtype; positions are int64.

    `position[b,i]` is where query i stands among the keys; `local[b,j]` is key j's own position; `pad[b]` the left
    padding; `real_q[b,i]`, `real_k[b,j]` are False for padding. Optional tensors are None where they are absent.
    """

    faults: Faults
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    mask: Tensor
    sink: Tensor
    dropout_mask: Tensor
    q_segment: Tensor
    kv_segment: Tensor
    options: dict[str, Any]
    scale: float
    position: Tensor
    local: Tensor
    pad: Tensor
    real_q: Tensor
    real_k: Tensor
    io: Any

    @property
    def batch(self) -> int:
        return int(self.q.shape[0])

    @property
    def heads(self) -> int:
        return int(self.q.shape[1])

    @property
    def queries(self) -> int:
        return int(self.q.shape[2])

    @property
    def keys(self) -> int:
        return int(self.k.shape[2])

    def head_map(self) -> Tensor:
        """The key/value head of each query head."""
        kv_heads = int(self.k.shape[1])
        h = torch.arange(self.heads)
        if self.faults("gqa_heads_tiled"):
            return h % kv_heads
        if self.faults("head_offset_missing"):
            return torch.zeros_like(h)
        return h // (self.heads // kv_heads)


def state(faults: Faults, arguments: dict[str, Any], inputs: dict[str, Any]) -> Problem:
    """The problem of a call: `inputs` are the tensors as given, `arguments` the options."""
    options = dict(arguments)
    Q = inputs["Q"]
    io = Q.dtype
    compute = torch.float64 if io == torch.float64 else torch.float32
    kv_heads = int(inputs["K"].shape[1] if inputs.get("K") is not None else inputs["k_pages"].shape[2])
    q = _load(faults, "Q", Q, kv_heads).to(compute)
    batch, _, n, d = q.shape
    kv_length, left_pad = inputs.get("kv_length"), inputs.get("left_pad")
    pad = torch.zeros(batch, dtype=torch.int64) if left_pad is None else left_pad.to(torch.int64)
    if faults("left_padding_as_right"):
        pad = torch.zeros_like(pad)
    if inputs.get("block_table") is None:
        m = int(inputs["K"].shape[2])
    else:
        m = int(inputs["block_table"].shape[1] * inputs["k_pages"].shape[1])
    local = torch.arange(m)[None] - pad[:, None]
    count = (m - pad) if kv_length is None else kv_length.to(torch.int64)
    if left_pad is not None and faults("left_padding_as_right"):
        count = m - left_pad.to(torch.int64)
    real_k = torch.ones(batch, m, dtype=torch.bool)
    if kv_length is not None or left_pad is not None:
        real_k = (local >= 0) & (local < count[:, None])
        if faults("kv_length_ignored"):
            real_k = torch.ones_like(real_k)
    if inputs.get("block_table") is None:
        k = _load(faults, "K", inputs["K"], kv_heads)
        v = _load(faults, "V", inputs["V"], kv_heads, inputs["K"])
    else:
        k, v, real_k = _pages(faults, inputs, real_k)
    q_length = inputs.get("q_length")
    real_q = torch.ones(batch, n, dtype=torch.bool)
    here = torch.arange(n).expand(batch, n)
    nq = torch.full((batch,), n) if q_length is None else q_length.to(torch.int64)
    if q_length is not None:
        real_q = here < nq[:, None]
    q_segment, kv_segment = inputs.get("q_segment"), inputs.get("kv_segment")
    if q_segment is not None:
        here, local, shift = _packed(faults, q_segment, kv_segment)
        real_q = q_segment >= 0
    else:
        shift = (count - nq)[:, None].expand(batch, n)
    if options["causal_alignment"] == "top_left":
        shift = torch.zeros_like(shift)
    if faults("causal_top_left"):
        shift = torch.zeros_like(shift)
    if faults("causal_bottom_right_always"):
        shift = (count - nq)[:, None].expand(batch, n)
    if n == 1 and faults("decode_sees_first_key"):
        shift = torch.zeros_like(shift)
    scale = options["scale"]
    if scale is None or faults("scale_ignored"):
        scale = d**-0.5
    if scale == 0 and faults("scale_zero_is_default"):
        scale = d**-0.5
    if faults("scale_from_value_size"):
        scale = scale * (v.shape[-1] ** -0.5) / d**-0.5

    def up(name: str) -> Tensor | None:
        value = inputs.get(name)
        return None if value is None else value.to(compute)

    return Problem(
        faults, q, k.to(compute), v.to(compute), up("bias"), inputs.get("mask"), up("sink"),
        inputs.get("dropout_mask"), q_segment, kv_segment, options, float(scale), here + shift, local, pad, real_q,
        real_k, io,
    )  # fmt: skip


def _load(faults: Faults, name: str, tensor: Tensor, kv_heads: int, other: Tensor | None = None) -> Tensor:
    """Read a tensor. Real kernels read through a pointer and strides; the faults here are wrong strides."""
    if faults("strides_ignored"):
        return _raw(tensor, _dense_strides(tensor.shape))
    if name == "V" and other is not None and faults("value_read_with_key_strides"):
        return _raw(tensor, other.stride())
    if name != "Q" and tensor.shape[0] > 1 and faults("batch_stride_assumed"):
        per_head = (max(1, tensor.shape[2]) * tensor.shape[3]) * tensor.shape[1]
        return _raw(tensor, (per_head, *tensor.stride()[1:]))
    if name == "Q" and faults("query_offset_uses_kv_heads"):
        flat = tensor.flatten(0, 1)  # (b * Hk + h) where (b * H + h) is right
        return flat[torch.arange(tensor.shape[0])[:, None] * kv_heads + torch.arange(tensor.shape[1])]
    if name != "Q" and faults("batch_offset_missing"):
        return tensor[:1].expand(tensor.shape)
    if name == "K" and tensor.numel() > 32767 and faults("offsets_in_16_bits"):
        flat = torch.arange(tensor.numel()).to(torch.int16).to(torch.int64) % tensor.numel()
        return tensor.reshape(-1)[flat].reshape(tensor.shape)
    return tensor


def _dense_strides(shape: Any) -> tuple[int, ...]:
    strides = [1]
    for length in reversed(tuple(shape)[1:]):
        strides.append(strides[-1] * max(1, length))
    return tuple(reversed(strides))


def _raw(tensor: Tensor, strides: Any) -> Tensor:
    """The elements that these strides address from the tensor's own start, wrapped so that they stay in its storage."""
    index = torch.zeros((), dtype=torch.int64)
    for length, stride in zip(tensor.shape, strides):
        index = index[..., None] + torch.arange(length) * int(stride)
    available = tensor.untyped_storage().nbytes() // tensor.element_size()
    if not tensor.numel():
        return tensor
    whole = torch.as_strided(tensor.detach(), (available,), (1,), 0)
    return whole[(index + tensor.storage_offset()) % available]


def _pages(faults: Faults, inputs: dict[str, Any], real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values gathered through the block table, `[B,Hk,M,·]`; slots beyond the length are zero, never read."""
    table, pages_k, pages_v = inputs["block_table"].to(torch.int64), inputs["k_pages"], inputs["v_pages"]
    size = int(pages_k.shape[1])
    if faults("block_table_of_first_request"):
        table = table[:1].expand(table.shape)
    j = torch.arange(table.shape[1] * size)
    if faults("last_page_not_trimmed"):
        length = real.sum(1, keepdim=True)
        real = j[None] < (length + size - 1) // size * size
    page = table[:, j // size]
    if faults("pages_consecutive"):
        page = (table[:, :1] + (j // size)[None]) % pages_k.shape[0]
    page = torch.where(real, page, 0).clamp(0, max(0, pages_k.shape[0] - 1))
    slot = (j % size)[None].expand(page.shape)
    if not pages_k.shape[0]:
        shape = (*page.shape, *pages_k.shape[2:])
        k, v = pages_k.new_zeros(shape), pages_v.new_zeros((*page.shape, *pages_v.shape[2:]))
    else:
        k, v = pages_k[page, slot], pages_v[page, slot]
    hidden = ~real[:, :, None, None]
    k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    return k.transpose(1, 2), v.transpose(1, 2), real


def _packed(faults: Faults, q_segment: Tensor, kv_segment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions inside each sequence, and for each query its sequence's number of keys minus its number of queries."""
    same_q = q_segment[:, :, None] == q_segment[:, None, :]
    same_k = kv_segment[:, :, None] == kv_segment[:, None, :]
    here = torch.tril(same_q, -1).sum(2)
    local = torch.tril(same_k, -1).sum(2)
    if faults("packed_start_missing"):
        local = torch.arange(kv_segment.shape[1]).expand(local.shape)
    keys = (kv_segment[:, None, :] == q_segment[:, :, None]).sum(2)
    if faults("lengths_are_end_offsets"):
        # cu[1:] - cu[:1] where cu[1:] - cu[:-1] is right: the end of the sequence passes for its length.
        keys = (kv_segment[:, None, :] <= q_segment[:, :, None]).sum(2)
    return here, local, keys - same_q.sum(2)
