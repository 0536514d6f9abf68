"""`attnspec list`, `attnspec show` and `attnspec atlas`: what the suite knows, as text, LaTeX, JSON or pages."""

from __future__ import annotations

import argparse
import json
from typing import Any

from attnspec.conformance.api import CannotJudgeError
from attnspec.spec import Mechanism, load, mechanisms


def list_mechanisms(arguments: argparse.Namespace) -> int:
    """Print the mechanisms, one a line, or as a JSON array."""
    found = [load(name) for name in mechanisms()]
    if arguments.family is not None:
        families = sorted({mechanism.family for mechanism in found})
        found = [mechanism for mechanism in found if mechanism.family == arguments.family]
        if not found:
            raise CannotJudgeError(f"unknown family {arguments.family!r}; known: {', '.join(families)}")
    if arguments.json:
        print(json.dumps([_entry(mechanism) for mechanism in found], indent=1))
        return 0
    name_width = max(len(mechanism.name) for mechanism in found)
    family_width = max(len(mechanism.family) for mechanism in found)
    for mechanism in found:
        print(f"{mechanism.name:<{name_width}}  {mechanism.family:<{family_width}}  {mechanism.summary}")
    return 0


def _entry(mechanism: Mechanism) -> dict[str, Any]:
    return {
        "name": mechanism.name,
        "family": mechanism.family,
        "summary": mechanism.summary,
        "paper": dict(mechanism.paper),
        "inputs": list(mechanism.inputs),
        "options": list(mechanism.options),
        "outputs": list(mechanism.outputs),
        "gradients": list(mechanism.differentiable) if mechanism.gradient is not None else [],
    }


def show(arguments: argparse.Namespace) -> int:
    """Print one mechanism's equations, with its other forms and its rounding models."""
    mechanism = load(arguments.name)
    if arguments.format == "json":
        from attnspec.spec.language import to_json

        tree: dict[str, Any] = {"name": mechanism.name, "program": to_json(mechanism.program)}
        if mechanism.gradient is not None:
            tree["gradient"] = to_json(mechanism.gradient)
        tree["forms"] = {name: to_json(program) for name, program in mechanism.forms.items()}
        tree["form_gradients"] = {name: to_json(program) for name, program in mechanism.form_gradients.items()}
        print(json.dumps(tree, indent=1))
    elif arguments.format == "latex":
        print(_latex(mechanism))
    else:
        print(_text(mechanism))
    return 0


def atlas(arguments: argparse.Namespace) -> int:
    """Write the atlas's pages."""
    from attnspec.atlas.pattern import NoTorchError
    from attnspec.atlas.write import write_atlas
    from attnspec.conformance.progress import steps

    names = None if arguments.mechanism is None else [arguments.mechanism]
    try:
        with steps("atlas") as step:
            files = write_atlas(arguments.out, names, step)
    except NoTorchError as error:
        raise CannotJudgeError(str(error)) from None
    size = sum(path.stat().st_size for path in files) / 1e6
    print(f"{len(files)} files, {size:.1f} MB: {arguments.out}")
    return 0


def _latex(mechanism: Mechanism) -> str:
    """The equations as they can be pasted into a document; a comment names the packages that it must load."""
    from attnspec.spec.language import latex_block
    from attnspec.spec.language.latex_layout import PACKAGES

    lines = [f"% {mechanism.name}, forward; the document needs \\usepackage{{{PACKAGES}}}"]
    lines.append(latex_block(mechanism.program))
    if mechanism.gradient is not None:
        lines += ["", "% backward", latex_block(mechanism.gradient, mechanism.program.definitions)]
    for name, program in mechanism.forms.items():
        lines += ["", f"% the form {name}", latex_block(program)]
    return "\n".join(lines)


def _text(mechanism: Mechanism) -> str:
    paper = mechanism.paper
    source = ", ".join(str(paper[key]) for key in ("title", "year") if paper.get(key))
    lines = [f"{mechanism.name} ({mechanism.family})", f"  {mechanism.summary}", f"  {source}"]
    if paper.get("arxiv"):
        lines[-1] += f", arXiv:{paper['arxiv']}"
    lines += ["", "Inputs"]
    for name, decl in mechanism.inputs.items():
        shape = ",".join((*decl.batch, *decl.axes))
        kind = "" if decl.kind == "real" else f" {decl.kind}"
        optional = " optional" if decl.optional else ""
        lines.append(_item(f"{name}[{shape}]", f"{decl.doc}{_aside(kind + optional)}"))
    if mechanism.options:
        lines += ["", "Options"]
        for name, option in mechanism.options.items():
            lines.append(_item(f"{name} = {_default(option)}", option.doc))
    lines += ["", "Outputs"]
    for name, output in mechanism.outputs.items():
        shape = ",".join((*mechanism.batch, *output.axes))
        lines.append(_item(f"{name}[{shape}]", output.doc))
    lines += ["", "Equations", *_indented(mechanism.program.text)]
    if mechanism.gradient is not None:
        forward = mechanism.program.text.rstrip("\n") + "\n"
        lines += ["", "Backward", *_indented(mechanism.gradient.text.removeprefix(forward))]
    for name, program in mechanism.forms.items():
        lines += ["", f"Form {name}: {mechanism.form_docs[name]}", *_indented(program.text)]
        if name in mechanism.form_gradient_texts:
            lines += ["", f"Backward of the form {name}, where it differs"]
            lines += _indented(mechanism.form_gradient_texts[name])
    lines += ["", "Rounding models"]
    for name, model in mechanism.roundings.items():
        stored = sorted(model.stored | model.gradient_stored)
        default = " (default)" if name == mechanism.default_rounding else ""
        rounded = f"may round {', '.join(stored)}" if stored else "rounds results alone"
        lines.append(_item(name + default, f"{rounded}; {model.doc}"))
    return "\n".join(line.rstrip() for line in lines)


def _default(option: Any) -> str:
    if option.formula is not None:
        from attnspec.spec.language import unparse

        return str(unparse(option.formula))
    return "none" if option.default is None else str(option.default)


def _item(head: str, doc: str) -> str:
    return f"  {head:<28} {doc}"


def _aside(text: str) -> str:
    return f" ({', '.join(text.split())})" if text.strip() else ""


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.strip().splitlines()]
