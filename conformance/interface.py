"""A mechanism's names and axes as plain data, without its equations.

The worker process binds and calls candidates with this alone, so that it never needs the oracle; the runner
makes it from a `Mechanism` with `Interface.of`. It holds no values and refuses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class InputFace:
    """An input: all its axes, the batch axes first; kind is "real", "int" or "bool"."""

    name: str
    axes: tuple[str, ...]
    kind: str = "real"
    role: str = "parameter"
    optional: bool = False
    differentiable: bool = False


@dataclass(frozen=True)
class OptionFace:
    """An option; `computed` marks a default that is a formula in the sizes."""

    name: str
    type: str
    default: Any = None
    nullable: bool = False
    choices: tuple[str, ...] = ()
    computed: bool = False


@dataclass(frozen=True)
class Interface:
    """What a function that implements the mechanism takes and returns."""

    mechanism: str
    inputs: Mapping[str, InputFace]
    options: Mapping[str, OptionFace]
    outputs: Mapping[str, tuple[str, ...]]

    @staticmethod
    def of(mechanism: Any) -> Interface:
        """Read the interface off a `Mechanism`."""
        return Interface(
            mechanism=mechanism.name,
            inputs={
                name: InputFace(
                    name, (*decl.batch, *decl.axes), decl.kind, decl.role, decl.optional, decl.differentiable
                )
                for name, decl in mechanism.inputs.items()
            },
            options={
                name: OptionFace(
                    name,
                    decl.type,
                    decl.default,
                    decl.nullable,
                    tuple(decl.choices),
                    decl.formula is not None,
                )
                for name, decl in mechanism.options.items()
            },
            outputs={name: (*mechanism.batch, *decl.axes) for name, decl in mechanism.outputs.items()},
        )
