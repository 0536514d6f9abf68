"""Efficient channel attention: pool each channel, slide a small kernel along the channels, gate.

Wang et al. 2019 (arXiv 1910.03151), Section 3.2: one kernel for all channels, or one for each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def eca_channel_attention(X: Array, w: Array) -> dict[str, Array]:
    """Outputs by name.

    Args:
        X: `[b,c,y,x]`. w: `[1,m]`, an odd number of taps shared by all channels, or `[c,m]`, taps of each channel.

    Returns:
        `O` `[b,c,y,x]` and the gate `g` `[b,c]`.
    """
    batch, channels, height, width = X.shape
    gate = np.zeros((batch, channels))
    for b in range(batch):
        pooled = [sum(float(value) for value in X[b, c].flat) / (height * width) for c in range(channels)]
        for c in range(channels):
            taps = w[c if len(w) > 1 else 0]
            inner = 0.0
            for m, tap in enumerate(taps):
                near = c + m - len(taps) // 2
                if 0 <= near < channels:
                    inner += float(tap) * pooled[near]
            gate[b, c] = 1.0 / (1.0 + np.exp(-inner))
    return {"O": gate[:, :, None, None] * X, "g": gate}
