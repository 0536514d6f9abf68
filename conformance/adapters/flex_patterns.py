"""FlexAttention with the mask or the score program of other mechanisms: neighborhoods, relative positions.

`flex-neighborhood` (mechanism `fused_neighborhood_attention`) and `flex-music-relative` (`music_relative_attention`).
What a query sees is written here as index arithmetic over the positions, as users of FlexAttention write it. On the CPU
FlexAttention itself refuses gradients. The factors of `urpe_attention` come after the softmax, where a program over
logits cannot reach.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnspec.conformance.adapters._library import library, refusals, versions
from attnspec.conformance.candidate import candidate

REFUSALS: dict[type[Exception], tuple[str, ...]] = {
    NotImplementedError: ("does not support backward on CPU",),
    IndexError: ("Expected reduction dim",),
}
VERSION = versions("torch")


def _attend(
    Q: Any, K: Any, V: Any, *, scale: float | None, mask_mod: Callable[..., Any], score_mod: Callable[..., Any] | None
) -> tuple[Any, Any]:
    """O and LSE of the library."""
    flex = library("torch.nn.attention.flex_attention", "torch")
    torch = library("torch", "torch")
    block_mask = flex.create_block_mask(mask_mod, Q.shape[0], Q.shape[1], Q.shape[2], K.shape[2], device=Q.device)
    with refusals(REFUSALS):
        out, extra = flex.flex_attention(
            Q, K, V, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=Q.shape[1] != K.shape[1],
            return_aux=flex.AuxRequest(lse=True),
        )  # fmt: skip
    lse = extra.lse
    return out, torch.empty(Q.shape[:3], dtype=torch.float32, device=Q.device) if lse is None else lse


def _axis(length: int, window: int, dilation: int, stride: int, causal: bool) -> Callable[[Any, Any], Any]:
    """Whether a query at coordinate `z` of one axis sees the key at `y`."""
    torch = library("torch", "torch")

    def sees(z: Any, y: Any) -> Any:
        # Among the tokens of one residue: how many there are, and the query's number.
        size = (length - z % dilation + dilation - 1) // dilation
        place = z // dilation
        shared = place // stride * stride + (stride - 1 if causal else stride // 2)
        center = torch.minimum(shared, size - 1)
        begin = center - (window - 1) if causal else torch.minimum(center - window // 2, size - window)
        begin = torch.clamp(begin, min=0)
        end = place if causal else begin + window - 1
        other = y // dilation
        return (z % dilation == y % dilation) & (other >= begin) & (other <= end)

    return sees


@candidate(
    mechanism="fused_neighborhood_attention", short_name="flex-neighborhood", outputs=("O", "LSE"),
    output_dtypes={"LSE": "fp32"}, version=VERSION, declares={"unseen_values": "multiplied"},
    guard_outputs=False,
)  # fmt: skip
def flex_neighborhood(
    Q: Any, K: Any, V: Any, *, rows: int = 1, window_y: int | None = None, window_x: int | None = None,
    dilation_y: int = 1, dilation_x: int = 1, stride_y: int = 1, stride_x: int = 1, causal_y: bool = False,
    causal_x: bool = False, scale: float | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """A `mask_mod` of two axes; the library has no keys that lie outside the grid."""
    cols = Q.shape[2] // rows
    down = _axis(rows, rows // dilation_y if window_y is None else window_y, dilation_y, stride_y, causal_y)
    right = _axis(cols, cols // dilation_x if window_x is None else window_x, dilation_x, stride_x, causal_x)

    def near(b: Any, h: Any, i: Any, j: Any) -> Any:
        return down(i // cols, j // cols) & right(i % cols, j % cols)

    return _attend(Q, K, V, scale=scale, mask_mod=near, score_mod=None)


def _visible(Q: Any, K: Any, mask: Any, causal: bool, block: int | None) -> Callable[..., Any]:
    """Up to the query's own position (aligned at the end), its block and the one before, and a boolean mask."""
    ahead = K.shape[2] - Q.shape[2]
    shown = None if mask is None else mask.expand(Q.shape[0], Q.shape[1], -1, -1)

    def sees(b: Any, h: Any, i: Any, j: Any) -> Any:
        seen = (j <= i + ahead) if causal else (j >= 0)
        if block is not None:
            seen = seen & (j // block >= (i + ahead) // block - 1)
        return seen if shown is None else seen & shown[b, h, i, j]

    return sees


@candidate(
    mechanism="music_relative_attention", short_name="flex-music-relative", outputs=("O",), version=VERSION,
    declares={"unseen_values": "multiplied"},
    guard_outputs=False,
)  # fmt: skip
def flex_music_relative(
    Q: Any, K: Any, V: Any, rel: Any, mask: Any = None, *, causal: bool = True, block: int | None = None,
    far: str = "zero", scale: float | None = None,
) -> Any:  # fmt: skip
    """A `score_mod` that adds the product of query and table row, computed in float32 beforehand."""
    torch = library("torch", "torch")
    rows, ahead = rel.shape[-2], K.shape[2] - Q.shape[2]
    factor = Q.shape[-1] ** -0.5 if scale is None else scale
    zero_at = rows - 1 if causal else (rows - 1) // 2
    logits = factor * (Q.float() @ rel.float().transpose(-1, -2))

    def add(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        row = j - i - ahead + zero_at
        relative = logits[b, h, i, torch.clamp(row, 0, rows - 1)]
        return score + (relative if far == "clamp" else torch.where((row >= 0) & (row < rows), relative, 0.0))

    return _attend(Q, K, V, scale=factor, mask_mod=_visible(Q, K, mask, causal, block), score_mod=add)[0]
