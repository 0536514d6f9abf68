"""The honest kernels behind the planted ones: no fault point is switched on, and the suite must pass every one of them.

They differ in how they compute (whole matrix, tiles of several sizes, split keys), so that a fault is never rejected
for its tiling.
"""

from __future__ import annotations

from attnspec.conformance.planted.kernel import make

plain = make("honest_plain", kind="plain")
tiles_16 = make("honest_tiles_16", block=(16, 16))
tiles_64 = make("honest_tiles_64", block=(64, 64))
tiles_128 = make("honest_tiles_128", block=(128, 128))
splits_2 = make("honest_splits_2", splits=2)
splits_3 = make("honest_splits_3", block=(16, 32), splits=3)

HONEST = {
    function.__name__: function for function in (plain, tiles_16, tiles_64, tiles_128, splits_2, splits_3)
}
