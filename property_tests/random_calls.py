"""Random calls of any mechanism: sizes, options and optional inputs that its file allows, from a seed.

Unlike a law's trial, a random call wants nothing in particular: every optional input and every option is used now and
then, sizes go from their minimum upwards, and what the constraints forbid is drawn again. Reference, forms and
gradients are compared on such calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attnspec.conformance.settings import option_values
from attnspec.conformance.shapes import admissible, derived
from attnspec.property_tests.draw import draw_input
from attnspec.spec.language import SpecError, static_value
from attnspec.spec.mechanism import Mechanism

ATTEMPTS = 400
Call = tuple[dict[str, Any], dict[str, Any]]


def random_call(mechanism: Mechanism, seed: int, *, largest: int = 6, empty: bool = True) -> Call:
    """Inputs and options of one call.

    Args:
        largest: of the free sizes; sizes whose minimum is larger get that.
        empty: whether sizes may be 0 where the file allows it (now and then).

    Raises:
        SpecError: no allowed call was found; the file's constraints are too narrow for small sizes.
    """
    rng = np.random.default_rng([seed, *mechanism.name.encode()])
    for _ in range(ATTEMPTS):
        found = _attempt(mechanism, rng, largest, empty)
        if found is not None:
            return found
    raise SpecError(f"no allowed call found in {ATTEMPTS} attempts at sizes up to {largest}", file=mechanism.name)


def cotangents(mechanism: Mechanism, outputs: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Random cotangents of all real outputs."""
    rng = np.random.default_rng([seed, 1])
    return {name: rng.normal(size=np.shape(value)) for name, value in outputs.items()}


def _attempt(mechanism: Mechanism, rng: np.random.Generator, largest: int, empty: bool) -> Call | None:
    sizes: dict[str, int] = {}
    for name, size in mechanism.sizes.items():
        if size.value is None:
            low = size.minimum if empty and rng.random() < 0.1 else max(size.minimum, 1)
            top = max(low, 3 if name.startswith(("B", "H")) else largest)
            sizes[name] = int(rng.integers(low, top + 1))
    options: dict[str, Any] = {}
    for name, option in mechanism.options.items():
        if rng.random() < 0.4:
            values = option_values(option, "exhaustive", int(rng.integers(0, 4)))
            if values:
                options[name] = values[int(rng.integers(0, len(values)))]
    present = {name for name, decl in mechanism.inputs.items() if not decl.optional} | set(mechanism.usual)
    # Now and then none of the usual inputs: what stands in for them (pages, say) excludes them all.
    leave = 1.0 if mechanism.usual and rng.random() < 0.2 else 0.1
    for name, decl in mechanism.inputs.items():
        if decl.optional and rng.random() < (leave if name in mechanism.usual else 0.5):
            present ^= {name}
    if not present & set(mechanism.usual):
        # What stands in for the usual inputs fixes their sizes: the capacity of a cache, say.
        for name, formula in mechanism.otherwise.items():
            value = static_value(formula, sizes=sizes)
            sizes[name] = sizes[name] if value is None else int(value)
    chosen = [name for name in mechanism.inputs if name in present]
    if not admissible(mechanism, sizes, options, chosen):
        if "N" not in sizes or "M" not in sizes:
            return None
        sizes["M"] = sizes["N"]  # some options want self-attention
        if not admissible(mechanism, sizes, options, chosen):
            return None
    full = derived(mechanism, sizes)
    inputs: dict[str, Any] = {}
    try:
        for name in chosen:
            inputs[name] = draw_input(mechanism, mechanism.inputs[name], full, rng, None, inputs, broadcast=True)
        mechanism.resolve(inputs, options)
    except SpecError:
        return None
    return inputs, options
