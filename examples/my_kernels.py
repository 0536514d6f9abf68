"""Two small kernels to try the suite on: one is right, one has a bug that random tests at square shapes do not see.

attnspec check examples/my_kernels.py:attention --mechanism softmax_attention
attnspec check examples/my_kernels.py:attention_with_a_bug --mechanism softmax_attention
"""

from __future__ import annotations

import torch

import attnspec

# The weights of unseen keys are zero, but they are multiplied: NaN in an unseen value spreads. Many kernels do this, so
# it has a name; without the declaration the suite reports it.
multiplied = attnspec.candidate(mechanism="softmax_attention", declares={"unseen_values": "multiplied"})


@multiplied
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """Softmax attention, causal masks aligned at the end: query i sees key j iff j <= i + M - N."""
    n, m = q.shape[2], k.shape[2]
    return _attend(q, k, v, torch.ones(n, m).tril(m - n).bool() if causal else None)


@multiplied
def attention_with_a_bug(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """The same with the diagonal one too far: every query sees the next key."""
    n, m = q.shape[2], k.shape[2]
    return _attend(q, k, v, torch.ones(n, m).tril(m - n + 1).bool() if causal else None)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if k.shape[2] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    scores = (q.float() @ k.float().mT) * q.shape[3] ** -0.5
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    return ((weights @ v.float()) / total.clamp_min(torch.finfo(torch.float32).tiny)).to(q.dtype)
