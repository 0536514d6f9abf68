"""Efficient channel attention: pool each channel, slide one small kernel along the channels, gate.

Wang et al. 2019 (arXiv 1910.03151), Section 3.2 (Eq. 5-7 for the shared and the unshared kernel), Section 3.3, Eq. 12
(the kernel's size from the number of channels).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def eca_channel_attention(X: Array, w: Array | None = None, W: Array | None = None) -> dict[str, Array]:
    """Outputs by name.

    Args:
        X: `[b,c,y,x]`. w: `[m]`, an odd number of taps shared by all channels, or W: `[c,m]`, taps of each channel.

    Returns:
        `Y` `[b,c,y,x]` and the gate `g` `[b,c]`.
    """
    batch, channels, height, width = X.shape
    gate = np.zeros((batch, channels))
    for b in range(batch):
        pooled = [sum(float(v) for v in X[b, c].flat) / (height * width) for c in range(channels)]
        for c in range(channels):
            taps = w if w is not None else W[c]
            inner = 0.0
            for m, tap in enumerate(taps):
                near = c + m - (len(taps) - 1) // 2
                if 0 <= near < channels:
                    inner += float(tap) * pooled[near]
            gate[b, c] = 1.0 / (1.0 + np.exp(-inner))
    return {"Y": gate[:, :, None, None] * X, "g": gate}
