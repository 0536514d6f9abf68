"""The operators that make mutants: for one node of an equation, everything that may be wrong with it.

`variants` yields `(operator, changed node, what was changed)`. Operators follow the mistakes that kernels really make:
comparisons off by one, factors and terms dropped, guards removed, the wrong axis, the wrong tensor, options ignored.
Used by `mutate`, which checks the results and drops repetitions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from attnspec.spec.language.check import kind_of
from attnspec.spec.language.errors import SpecError
from attnspec.spec.language.macros import children, rebuild
from attnspec.spec.language.sizes import index_size
from attnspec.spec.language.syntax import (
    NORMALIZERS,
    Binary,
    Bool,
    Call,
    Compare,
    Cond,
    Definition,
    Logic,
    Name,
    Node,
    Num,
    Program,
    Reduce,
    Ref,
    Unary,
)
from attnspec.spec.language.unparse import unparse

Variant = tuple[str, Node, str]

_FLIPPED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
_REVERSED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_REDUCERS: dict[str, tuple[str, ...]] = {
    "sum": ("max", "mean"), "mean": ("sum",), "prod": ("sum",), "max": ("min", "sum"), "min": ("max",),
    "any": ("all",), "all": ("any",), "logsumexp": ("max", "sum"),
}  # fmt: skip
_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "exp": ("exp2", ""), "exp2": ("exp",), "log": ("log2", ""), "log2": ("log",), "log1p": ("log", ""),
    "sqrt": ("",), "rsqrt": ("sqrt", ""), "abs": ("",), "sign": ("",), "floor": ("ceil",), "ceil": ("floor",),
    "sin": ("cos",), "cos": ("sin",), "tanh": ("", "sigmoid"), "sigmoid": ("tanh", ""), "softplus": ("relu", ""),
    "relu": ("",), "elu": ("relu", ""), "gelu": ("relu", ""), "silu": ("relu", "sigmoid"), "erf": ("tanh",),
    "min": ("max",), "max": ("min",), "logaddexp": ("max",),
}  # fmt: skip


@dataclass(frozen=True)
class Context:
    """Where a node stands: its program and equation, the indices in scope, scan index by name, inside a subscript."""

    program: Program
    line: Definition
    scope: frozenset[str]
    scans: Mapping[str, str]
    in_subscript: bool = False

    def kind(self, node: Node) -> str:
        try:
            return kind_of(node, self.program)
        except SpecError:
            return "text"


def variants(node: Node, context: Context) -> Iterator[Variant]:
    """Everything that may be wrong with this node itself; what lies below it is visited by the caller."""
    match node:
        case Compare():
            yield from _compare(node, context)
        case Binary():
            yield from _binary(node)
        case Unary():
            operator = "negation-dropped" if node.op == "not" else "sign-dropped"
            yield operator, node.operand, f"{_q(node)} replaced by {_q(node.operand)}"
        case Logic():
            yield from _logic(node)
        case Cond():
            yield from _cond(node, context)
        case Call():
            yield from _call(node)
        case Reduce():
            yield from _reduce(node, context)
        case Ref():
            yield from _reference(node, context)
        case Name():
            yield from _name(node, context)
        case Num(value=value):
            if isinstance(value, int):
                for changed in (value + 1, value - 1):
                    yield "constant", Num(changed), f"`{value}` replaced by `{changed}`"
            else:
                yield "constant", Num(value + 1), f"`{value}` replaced by `{value + 1}`"
        case Bool(value=truth):
            yield "constant", Bool(not truth), f"`{truth}` replaced by `{not truth}`"


def _q(node: Node, limit: int = 60) -> str:
    text = unparse(node)
    return f"`{text if len(text) <= limit else text[: limit - 3] + '...'}`"


def _compare(node: Compare, context: Context) -> Iterator[Variant]:
    for number, op in enumerate(node.ops):
        for operator, table in (("comparison-flipped", _FLIPPED), ("comparison-reversed", _REVERSED)):
            if op in table:
                ops = (*node.ops[:number], table[op], *node.ops[number + 1 :])
                place = "" if len(node.ops) == 1 else f" (the {('first', 'second', 'third')[min(number, 2)]})"
                yield operator, replace(node, ops=ops), f"`{op}`{place} replaced by `{table[op]}`"
        right = node.operands[number + 1]
        if op in _REVERSED and context.kind(right) == "int":
            # `<` against `<=` is the step that flipping makes; this is the step to the other side.
            sign = "+" if op in ("<=", ">") else "-"
            shifted = Binary(sign, right, Num(1))
            operands = (*node.operands[: number + 1], shifted, *node.operands[number + 2 :])
            yield "comparison-off-by-one", replace(node, operands=operands), f"{_q(right)} replaced by {_q(shifted)}"


def _binary(node: Binary) -> Iterator[Variant]:
    left, right = node.left, node.right
    if node.op == "*":
        for kept, dropped in ((left, right), (right, left)):
            yield "factor-dropped", kept, f"factor {_q(dropped)} dropped"
    elif node.op in ("/", "//"):
        yield "division-dropped", left, f"division by {_q(right)} dropped"
        if node.op == "/":
            yield "operator-replaced", replace(node, op="*"), "`/` replaced by `*`"
        else:
            yield "operator-replaced", replace(node, op="%"), "`//` replaced by `%`"
    elif node.op == "%":
        yield "operator-replaced", replace(node, op="//"), "`%` replaced by `//`"
        yield "division-dropped", left, f"`% {unparse(right)}` dropped"
    elif node.op == "**":
        yield "power-dropped", left, f"exponent {_q(right)} dropped"
    else:
        yield "term-dropped", left, f"term {_q(right)} dropped"
        yield "term-dropped", right if node.op == "+" else Unary("-", right), f"term {_q(left)} dropped"
        other = "-" if node.op == "+" else "+"
        yield "sign-flipped", replace(node, op=other), f"`{node.op}` replaced by `{other}` before {_q(right)}"


def _logic(node: Logic) -> Iterator[Variant]:
    parts = node.operands
    for number, part in enumerate(parts):
        rest = (*parts[:number], *parts[number + 1 :])
        kept = rest[0] if len(rest) == 1 else replace(node, operands=rest)
        yield "guard-dropped", kept, f"condition {_q(part)} dropped"
    for number, part in enumerate(parts):
        negated = (*parts[:number], Unary("not", part), *parts[number + 1 :])
        yield "guard-negated", replace(node, operands=negated), f"condition {_q(part)} negated"
    other = "or" if node.op == "and" else "and"
    yield "logic-replaced", replace(node, op=other), f"`{node.op}` replaced by `{other}`"


def _cond(node: Cond, context: Context) -> Iterator[Variant]:
    test = _q(node.test)
    if not _mentions_present(node.test):
        yield "branch-ignored", node.then, f"always {_q(node.then)}, whatever {test}"
        yield "branches-swapped", replace(node, then=node.otherwise, otherwise=node.then), f"branches of {test} swapped"
    elif any(isinstance(part, Ref | Name) and _optional(part, context) for part in _outside(node.otherwise)):
        return  # the other branch stands on another absent input: it cannot be taken here
    yield "branch-ignored", node.otherwise, f"always `else`, whatever {test}"


def _outside(node: Node) -> Iterator[Node]:
    """The nodes of an expression that no test of `present` guards."""
    yield node
    if isinstance(node, Cond) and _mentions_present(node.test):
        yield from _outside(node.otherwise)
        return
    for child in children(node):
        yield from _outside(child)


def _optional(node: Ref | Name, context: Context) -> bool:
    name = node.name if isinstance(node, Ref) else node.id
    inputs = context.program.declarations.inputs
    return name in inputs and inputs[name].optional


def _mentions_present(node: Node) -> bool:
    return (isinstance(node, Call) and node.function == "present") or any(map(_mentions_present, children(node)))


def _call(node: Call) -> Iterator[Variant]:
    if node.function == "present":
        return
    for other in _FUNCTIONS.get(node.function, ()):
        if other:
            yield "function-replaced", replace(node, function=other), f"{node.function} replaced by {other}"
        else:
            yield "function-dropped", node.arguments[0], f"{node.function} dropped"
    if node.function in ("min", "max", "logaddexp"):
        for number, argument in enumerate(node.arguments):
            rest = (*node.arguments[:number], *node.arguments[number + 1 :])
            kept = rest[0] if len(rest) == 1 else replace(node, arguments=rest)
            yield "argument-dropped", kept, f"argument {_q(argument)} of {node.function} dropped"
    elif node.function == "clip":
        yield "function-dropped", node.arguments[0], "clip dropped"
    elif node.function == "pow":
        yield "power-dropped", node.arguments[0], f"exponent {_q(node.arguments[1])} dropped"


def _reduce(node: Reduce, context: Context) -> Iterator[Variant]:
    for other in _REDUCERS.get(node.op, ()):
        if other in ("max", "min") and context.kind(node.body) == "int":
            continue  # an integer maximum over nothing has no value
        yield "reduction-replaced", replace(node, op=other), f"{node.op} replaced by {other}"
    if node.condition is not None:
        condition = node.condition
        yield "guard-dropped", replace(node, condition=None), f"condition {_q(condition)} of {node.op} dropped"
        negated = Unary("not", condition)
        yield "guard-negated", replace(node, condition=negated), f"condition {_q(condition)} of {node.op} negated"
    if node.op in NORMALIZERS and len(node.indices) == 1:
        for other in sorted(context.scope - set(node.indices)):
            what = f"{node.op} over {other} instead of {node.indices[0]}"
            yield "axis-replaced", replace(node, indices=(other,)), what
    if len(node.indices) > 1:
        for index in node.indices:
            rest = tuple(other for other in node.indices if other != index)
            if node.op in NORMALIZERS:
                yield "axis-dropped", replace(node, indices=rest), f"{node.op} not over {index}"
            else:
                first = replace(
                    node,
                    indices=rest,
                    condition=None if node.condition is None else _substituted(node.condition, index),
                    body=_substituted(node.body, index),
                )
                yield "axis-dropped", first, f"{node.op} not over {index}: its first value only"


def _substituted(node: Node, index: str) -> Node:
    """`node` with a free index set to 0."""
    if isinstance(node, Name) and node.id == index:
        return Num(0)
    if isinstance(node, Reduce) and index in node.indices:
        return node
    return rebuild(node, tuple(_substituted(child, index) for child in children(node)))


def _reference(node: Ref, context: Context) -> Iterator[Variant]:
    program = context.program
    axes = _axes(node.name, program)
    if axes is None:
        return
    scan = context.scans.get(node.name)
    for number, subscript in enumerate(node.subscripts):
        axis = axes[number]
        if axis is None or axis == scan:
            continue
        shifted = Binary("+", subscript, Num(1))
        parts = (*node.subscripts[:number], shifted, *node.subscripts[number + 1 :])
        what = f"subscript {_q(subscript)} of {node.name} replaced by {_q(shifted)} (kept inside)"
        yield "subscript-off-by-one", replace(node, subscripts=parts), what
    for first in range(len(axes)):
        for second in range(first + 1, len(axes)):
            if _same_size(axes[first], axes[second], program) and node.subscripts[first] != node.subscripts[second]:
                turned = list(node.subscripts)
                turned[first], turned[second] = turned[second], turned[first]
                yield "subscripts-swapped", replace(node, subscripts=tuple(turned)), f"subscripts of {_q(node)} swapped"
    for other in _like(node.name, axes, context):
        yield "tensor-replaced", replace(node, name=other), f"{node.name} replaced by {other} in {_q(node)}"


def inside(node: Node, program: Program) -> Node:
    """`node` with every subscript kept inside its tensor, except plain indices of their own axis and scan positions.

    Clipping the position in a recurrence would hide what the change does: one step too many would be the last again.
    """
    parts = tuple(inside(child, program) for child in children(node))
    if not isinstance(node, Ref):
        return rebuild(node, parts)
    axes = _axes(node.name, program)
    scanned = {name: scan.index for scan in program.scans for name in scan.names}
    if axes is None:
        return rebuild(node, parts)
    kept = []
    for axis, subscript in zip(axes, parts):
        own = isinstance(subscript, Name) and _same_size(axis, subscript.id, program)
        if axis is None or own or axis == scanned.get(node.name):
            kept.append(subscript)
        else:
            last = Binary("-", index_size(program.declarations, axis), Num(1))
            kept.append(Call("clip", (subscript, Num(0), last)))
    return replace(node, subscripts=tuple(kept))


def _axes(name: str, program: Program) -> tuple[str | None, ...] | None:
    """The axes of a tensor, by index name; None where the left side is no plain index."""
    if name in program.declarations.inputs:
        return program.declarations.inputs[name].axes
    if name in program.definitions:
        left = program.definitions[name].subscripts
        return tuple(s.id if isinstance(s, Name) else None for s in left)
    return None


def _same_size(first: str | None, second: str | None, program: Program) -> bool:
    if first is None or second is None:
        return False
    indices = program.declarations.indices
    return first == second or (first in indices and second in indices and indices[first] == indices[second])


def _like(name: str, axes: tuple[str | None, ...], context: Context) -> Iterator[str]:
    """Tensors that stand in for `name` by mistake: its neighbours of the same kind whose axes have the same sizes."""
    program = context.program
    inputs, place = program.declarations.inputs, list(program.definitions)
    kind = inputs[name].kind if name in inputs else program.kinds.get(name)
    if name in inputs:
        own = inputs[name]
        pool = [other for other, decl in inputs.items() if decl.kind == kind and decl.batch == own.batch]
    else:
        pool = [other for other in place if program.kinds.get(other) == kind and other not in context.scans]
    here = pool.index(name) if name in pool else -1
    if here < 0:
        return
    fitting = []
    for number, other in enumerate(pool):
        theirs = _axes(other, program)
        if (
            other != name
            and theirs is not None
            and len(theirs) == len(axes)
            and all(_same_size(a, b, program) for a, b in zip(axes, theirs))
        ):
            fitting.append((abs(number - here), number, other))
    for _, _, other in sorted(fitting)[:2]:
        yield other


def _name(node: Name, context: Context) -> Iterator[Variant]:
    decl = context.program.declarations
    name = node.id
    if name in decl.options:
        option = decl.options[name]
        if option.type == "bool":
            yield "option-ignored", Bool(bool(option.default)), f"option {name} ignored (always {option.default})"
        elif option.type in ("int", "float") and option.default is not None:
            assert isinstance(option.default, int | float)
            yield "option-ignored", Num(option.default), f"option {name} ignored (always {option.default})"
        elif option.formula is not None:
            yield "option-ignored", option.formula, f"option {name} ignored (always {unparse(option.formula)})"
        for other, entry in decl.options.items():
            if other != name and entry.type == option.type and entry.nullable == option.nullable and option.nullable:
                # As when two arguments are swallowed in the wrong order; where only one is given, it is itself.
                swapped = Cond(Call("present", (Name(other),)), Name(other), node)
                yield "option-replaced", swapped, f"option {name} replaced by {other} where both are given"
    elif name in decl.sizes:
        pool = _sizes_of_tensors(context.program)
        later = [other for other in pool if other > name] + [other for other in pool if other < name]
        if later:
            yield "size-replaced", Name(later[0]), f"size {name} replaced by {later[0]}"
    elif name in decl.inputs or name in context.program.definitions:
        for other in _like(name, (), context):
            yield "tensor-replaced", Name(other), f"{name} replaced by {other}"
    elif name in context.scope and name in decl.indices and not context.in_subscript:
        for sign in ("+", "-"):
            shifted = Binary(sign, node, Num(1))
            yield "index-off-by-one", shifted, f"index `{name}` replaced by {_q(shifted)}"


def _sizes_of_tensors(program: Program) -> list[str]:
    """The sizes of the axes of what the equations define: known whatever optional inputs are given."""
    indices = program.declarations.indices
    axes = {s.id for line in program.definitions.values() for s in line.subscripts if isinstance(s, Name)}
    return sorted({size.id for axis in axes & set(indices) if isinstance(size := indices[axis], Name)})
