"""What a planted kernel is, and how the modules of this package register theirs.

A planted kernel is a wrong attention kernel modelled on a bug that really happened. Most are the honest kernel of
`kernel.py` with one fault point switched on (`plant`); what does not fit a fault point is a function of its own
(`planted`). Registration happens on import: a new module in this package needs no entry in a list. A name that is
registered twice, or a fault point that no code asks for, is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from attnspec.conformance.types import Level

REGIONS = ("row", "diagonal", "block", "head", "batch", "column", "everything", "lse", "gradient", "memory", "repeat")
"""Where an error shows: some rows, along the (shifted) diagonal, from a tile's edge on, some heads, some batch entries,
some feature columns, everywhere, only in LSE, only in gradients, in memory that is not the output, or only in a later
call."""


class Faults:
    """The fault points that are switched on, and which of them the code passed: `faults("name")` asks and records."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = frozenset(names)
        self.reached: set[str] = set()

    def __call__(self, name: str) -> bool:
        if name in self.names:
            self.reached.add(name)
            return True
        return False


@dataclass(frozen=True)
class Witness:
    """The smallest known call on which a planted kernel differs from the honest one.

    Attributes:
        sizes: B, H, Hk, N, M, D, E where they are not 1, 1, 1, 3, 3, 4, 4.
        options: options of the call.
        inputs: optional inputs, either an array-like value or the name of a generator in `witness.GENERATORS`.
        values: "normal", or the name of a generator for Q, K and V.
        dtype: fp32, fp16 or bf16.
        backward: also compare gradients, for random cotangents of O and LSE.
        before: options of an earlier call on the same kernel, for kernels that remember.
        guarded: surround every tensor with NaN and also compare the surroundings.
        strided: names of the tensors that are passed as transposed views.
        repeats: call this often and also compare the calls with each other.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    values: str = "normal"
    dtype: str = "fp32"
    backward: bool = False
    before: Mapping[str, Any] | None = None
    guarded: bool = False
    strided: tuple[str, ...] = ()
    repeats: int = 1


@dataclass(frozen=True)
class Planted:
    """A wrong kernel.

    Attributes:
        name: how it is called: `attnspec.conformance.planted:NAME` is its address for the command line.
        function: the candidate function, with the mechanism's names as parameters.
        evidence: public issues, pull requests and commits that show the bug, as `owner/repository#number` or commit.
        region: where the error shows; one of `REGIONS`.
        options: names of the inputs and options that the function takes.
        framework: "torch" or "numpy".
        summary: what is wrong, in one line.
        witness: the smallest call that shows it.
        build: makes a fresh function (a kernel that remembers starts anew) that reports to the `Faults` it is given.
        level: the lowest level that rejects it. Only what honest code of another rounding model does too needs more
            than `standard`.
    """

    name: str
    function: Callable[..., Any]
    evidence: tuple[str, ...]
    region: str
    options: tuple[str, ...]
    framework: str
    summary: str
    witness: Witness
    build: Callable[[Faults], Callable[..., Any]]
    level: Level = "standard"


REGISTRY: dict[str, Planted] = {}


def plant(
    name: str,
    summary: str,
    *,
    evidence: Iterable[str],
    region: str,
    witness: Witness,
    kind: str = "tiled",
    splits: int = 1,
    level: Level = "standard",
) -> None:
    """Register the honest kernel with the fault point `name` switched on.

    Args:
        kind: "tiled" (online softmax over tiles) or "plain" (the whole score matrix).
        splits: the number of parts into which the tiled kernel splits the keys.
        level: the lowest level that rejects it.
    """
    from attnspec.conformance.planted.kernel import make

    def build(faults: Faults) -> Callable[..., Any]:
        return make(name, faults, kind=kind, splits=splits)

    _register(name, summary, tuple(evidence), region, witness, build, level)


def planted(
    summary: str, *, evidence: Iterable[str], region: str, witness: Witness
) -> Callable[[Callable[[Faults], Callable[..., Any]]], Callable[[Faults], Callable[..., Any]]]:
    """Register a factory: a function that takes `Faults` (and asks for its own name) and returns the wrong kernel."""

    def attach(build: Callable[[Faults], Callable[..., Any]]) -> Callable[[Faults], Callable[..., Any]]:
        _register(build.__name__, summary, tuple(evidence), region, witness, build)
        return build

    return attach


def _register(
    name: str,
    summary: str,
    evidence: tuple[str, ...],
    region: str,
    witness: Witness,
    build: Callable[[Faults], Callable[..., Any]],
    level: Level = "standard",
) -> None:
    import inspect

    from attnspec.conformance.candidate import described

    if name in REGISTRY:
        raise ValueError(f"planted kernel {name!r} is registered twice")
    if region not in REGIONS:
        raise ValueError(f"planted kernel {name!r}: region {region!r} is none of {', '.join(REGIONS)}")
    if not evidence:
        raise ValueError(f"planted kernel {name!r} names no evidence")
    function = build(Faults({name}))
    description = described(function)
    if description is None:
        raise ValueError(f"planted kernel {name!r} is not described with @candidate")
    taken = tuple(inspect.signature(function).parameters)
    REGISTRY[name] = Planted(
        name, function, evidence, region, taken, description.framework, summary, witness, build, level
    )
