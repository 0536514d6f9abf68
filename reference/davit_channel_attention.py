"""Channel-group attention: the channels of a group are the tokens, and the pixels their features.

Ding et al. 2022 (arXiv 2204.03645), Section 3.3, Eq. 4. The map of a group is added up pixel by pixel as outer
products of keys and values, softmaxed row by row, and mixes the queries' channels at every pixel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def davit_channel_attention(Q: Array, K: Array, V: Array, *, scale: float | None = None) -> dict[str, Array]:
    """Outputs by name.

    Args:
        Q: `[b,g,n,c]`, what is mixed. K, V: `[b,g,n,c]`, the two factors of the map. scale: C ** -0.5 if None.

    Returns:
        `O` `[b,g,n,c]` and the map `A` `[b,g,c,c']`.
    """
    batch, groups, pixels, channels = Q.shape
    scale = channels**-0.5 if scale is None else scale
    maps, out = np.zeros((batch, groups, channels, channels)), np.zeros(Q.shape)
    for b, g in np.ndindex(batch, groups):
        scores = np.zeros((channels, channels))
        for n in range(pixels):
            scores += scale * np.outer(K[b, g, n], V[b, g, n])
        for c in range(channels):
            raised = np.exp(scores[c] - scores[c].max())
            maps[b, g, c] = raised / raised.sum()
        for n in range(pixels):
            out[b, g, n] = maps[b, g] @ Q[b, g, n]
    return {"O": out, "A": maps}
