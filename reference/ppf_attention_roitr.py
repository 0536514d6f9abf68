"""Rotation-invariant attention of points: pair features of every neighbour, embedded, added to keys and to values.

Yu et al. 2023 (arXiv 2303.08231), Section 3.2, Eq. 1 (point pair features), Eq. 2-4 (local attention), and Section 3.3
(global attention with a geometry summary). Neighbour by neighbour, with scalar geometry.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def pair_feature(p_i: Array, n_i: Array, p_j: Array, n_j: Array) -> Array:
    """Distance and three angles over pi, of anchor i and neighbour j."""
    apart = p_j - p_i
    angles = [_angle(n_i, apart), _angle(n_j, apart), _angle(n_i, n_j)]
    return np.array([math.sqrt(float(apart @ apart)), *(angle / math.pi for angle in angles)])


def _angle(a: Array, b: Array) -> float:
    """Between 0 and pi; 0 where one of the vectors is zero."""
    normal = np.cross(a, b)
    return math.atan2(math.sqrt(float(normal @ normal)), float(a @ b))
