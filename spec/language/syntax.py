"""The syntax tree of the equation language: what every evaluator walks.

Nodes are frozen and hashable; `at` is the place in the equations text and does not take part in comparison.
The reader builds the tree, the checker fills `kind` information beside it, nobody changes it afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["real", "int", "bool"]


@dataclass(frozen=True)
class Place:
    """A position: `line` of the equation in its text and `column`, both from 1."""

    line: int
    column: int


NOWHERE = Place(0, 0)


@dataclass(frozen=True)
class Node:
    """Base of all expression nodes."""

    at: Place = field(default=NOWHERE, compare=False, kw_only=True)


@dataclass(frozen=True)
class Num(Node):
    """A literal number; `inf` and `pi` are Names."""

    value: int | float


@dataclass(frozen=True)
class Str(Node):
    """A string literal, only compared with an enumerated option."""

    value: str


@dataclass(frozen=True)
class Bool(Node):
    value: bool


@dataclass(frozen=True)
class Name(Node):
    """An index, a size, an option, a constant, or a tensor without axes."""

    id: str


@dataclass(frozen=True)
class Ref(Node):
    """A tensor element `name[subscripts]`."""

    name: str
    subscripts: tuple[Node, ...]


@dataclass(frozen=True)
class Unary(Node):
    """`op` is `-`, `+` or `not`."""

    op: str
    operand: Node


@dataclass(frozen=True)
class Binary(Node):
    """`op` is one of `+ - * / // % **`."""

    op: str
    left: Node
    right: Node


@dataclass(frozen=True)
class Compare(Node):
    """A chain `operands[0] ops[0] operands[1] …`; ops are `< <= > >= == !=`."""

    ops: tuple[str, ...]
    operands: tuple[Node, ...]


@dataclass(frozen=True)
class Logic(Node):
    """`op` is `and` or `or`."""

    op: str
    operands: tuple[Node, ...]


@dataclass(frozen=True)
class Cond(Node):
    """`then if test else otherwise`."""

    test: Node
    then: Node
    otherwise: Node


@dataclass(frozen=True)
class Call(Node):
    """An elementwise function, or `present(name)`. Macros are expanded by the reader."""

    function: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True)
class Reduce(Node):
    """`op[indices : condition](body)`, for reductions and normalizers alike."""

    op: str
    indices: tuple[str, ...]
    condition: Node | None
    body: Node


REDUCTIONS = ("sum", "prod", "max", "min", "mean", "any", "all", "logsumexp", "argmax")
NORMALIZERS = ("softmax", "rank", "argsort")


@dataclass(frozen=True)
class SizeDecl:
    """A size: free (bound by shapes), at least `minimum`, or derived by the expression `value`."""

    name: str
    minimum: int = 0
    value: Node | None = None


@dataclass(frozen=True)
class InputDecl:
    """An input tensor.

    `axes` are index names (their sizes come from `Declarations.indices`); `batch` are the leading batch axes that
    this input carries; the axes in `broadcast` may have length 1. Absent optional inputs are tested by `present`.
    `domain` is what is legal; `drawn`, where stated, is what callers give in practice and cases hold: a narrower
    domain, or "unit" for vectors of length 1 along the last axis.
    """

    name: str
    axes: tuple[str, ...]
    batch: tuple[str, ...] = ()
    kind: Kind = "real"
    role: str = "parameter"
    optional: bool = False
    broadcast: tuple[str, ...] = ()
    differentiable: bool = False
    domain: str = "normal"
    drawn: str = ""
    doc: str = ""


@dataclass(frozen=True)
class OptionDecl:
    """An option. `default` None means absent (nullable); `formula` is a default computed from sizes."""

    name: str
    type: Literal["int", "float", "bool", "enum"]
    default: int | float | bool | str | None = None
    formula: Node | None = None
    nullable: bool = False
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    doc: str = ""


@dataclass(frozen=True)
class OutputDecl:
    """An output: the definition `name` with its axes in order; `batch` axes lead."""

    name: str
    axes: tuple[str, ...]
    doc: str = ""


@dataclass(frozen=True)
class Declarations:
    """Everything that equations may refer to. `indices` maps an index to the expression of its size."""

    sizes: Mapping[str, SizeDecl]
    indices: Mapping[str, Node]
    inputs: Mapping[str, InputDecl]
    options: Mapping[str, OptionDecl]
    outputs: Mapping[str, OutputDecl]
    batch: tuple[str, ...] = ()


@dataclass(frozen=True)
class Definition:
    """`name[subscripts] = body`. `boundary` marks the initial line of a recurrence (a subscript that is no index)."""

    name: str
    subscripts: tuple[Node, ...]
    body: Node
    line: int
    text: str
    boundary: bool = False


@dataclass(frozen=True)
class Scan:
    """A recurrence group: `names` are evaluated together along `index`, `step` +1 forward or -1 in reverse."""

    names: tuple[str, ...]
    index: str
    step: int


@dataclass(frozen=True)
class Program:
    """Checked equations. `order` lists definition names (a scan group appears as its names in inner order)."""

    declarations: Declarations
    definitions: Mapping[str, Definition]
    boundaries: Mapping[str, Definition]
    order: tuple[str, ...]
    scans: tuple[Scan, ...]
    kinds: Mapping[str, Kind]
    text: str
    file: str = "<text>"
