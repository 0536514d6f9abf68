"""`attnspec bench`: time what conforms beside a named alternative, print the table, write JSON, Markdown and a plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from attnspec.conformance.api import CannotJudgeError
from attnspec.conformance.progress import status
from attnspec.conformance.report.files import check_writable, write

SCHEMA = "attnspec-bench-1"


def bench(arguments: argparse.Namespace) -> int:
    """Run the benchmark; the value is the exit code: 0 done, 1 a contender does not conform, 2 could not run."""
    for path in (arguments.json, arguments.markdown, arguments.plot):
        if path is not None:
            check_writable(path)
    if arguments.plot is not None:
        _matplotlib()
    try:
        import torch
    except ImportError:
        raise CannotJudgeError("a benchmark needs PyTorch, which measures the machine's peaks") from None
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise CannotJudgeError("no CUDA device is available here; use --device cpu")
    from attnspec.perf.bench import peaks
    from attnspec.spec import load

    dtypes = arguments.dtype or (("bf16",) if arguments.device == "cuda" else ("fp32",))
    mechanisms = [load(name.strip()) for name in arguments.mechanism.split(",")]
    peak = peaks(arguments.device, dtypes)
    with status("measuring") as note:
        results = [_one(mechanism, arguments, dtypes, peak, note) for mechanism in mechanisms]
    result = replace(results[0], rows=[row for one in results for row in one.rows])
    document = {"schema": SCHEMA, **asdict(result)}
    if arguments.json is not None:
        validate(document)
        write(arguments.json, json.dumps(document, indent=1) + "\n")
    lines = table(document)
    if arguments.markdown is not None:
        write(arguments.markdown, lines + "\n")
    if arguments.plot is not None:
        plot(document, Path(arguments.plot))
    print(lines)
    return 1 if result.failed else 0


def _one(
    mechanism: Any, arguments: argparse.Namespace, dtypes: Sequence[str], peak: dict[str, float], note: Any
) -> Any:
    from attnspec.perf.bench import DEFAULT_SIZES
    from attnspec.perf.bench import bench as measure
    from attnspec.perf.contenders import default_candidate

    device = arguments.device
    options, inputs = _settings(mechanism, arguments.set)
    return measure(
        mechanism.name,
        arguments.candidate or [default_candidate(mechanism.name, device)],
        arguments.against,
        sizes=[_size(mechanism, text) for text in arguments.size or DEFAULT_SIZES[device]],
        dtypes=dtypes,
        directions=arguments.direction or ("forward",),
        options=options,
        inputs=inputs,
        device=device,
        level=arguments.level,
        repeats=arguments.repeats,
        peak=peak,
        note=note,
    )


def validate(document: Mapping[str, Any]) -> None:
    """Check a document against the published schema.

    Raises:
        jsonschema.ValidationError: it departs from it.
    """
    import jsonschema

    schema = Path(__file__).parent / "report" / "bench.schema.json"
    jsonschema.Draft202012Validator(json.loads(schema.read_text(encoding="utf-8"))).validate(document)


def table(document: Mapping[str, Any]) -> str:
    """Markdown: a line per contender and case."""
    lines = [
        f"| {' | '.join(('mechanism', 'size', 'options', 'dtype', 'direction', 'contender', 'time', 'spread'))} "
        f"| times as fast as {document['against']} | of the roofline |",
        "|---|---|---|---|---|---|---:|---:|---:|---:|",
    ]
    for row in document["rows"]:
        setting = ", ".join(f"{name}={value}" for name, value in row["options"].items()) or "-"
        dtype = row["dtype"] if row["computes_in"] == row["dtype"] else f"{row['dtype']} (in {row['computes_in']})"
        first = f"| {row['mechanism']} | {row['size']} | {setting} | {dtype} | {row['direction']} | {row['contender']} "
        if row["seconds"] is None:
            lines.append(f"{first}| {row['why']} | | | |")
            continue
        ratio = "-" if row["speedup"] is None else f"{row['speedup']:.2f}"
        lines.append(
            f"{first}| {row['seconds'] * 1e3:.3f} ms | {row['spread']:.0%} | {ratio} | {row['roofline_share']:.1%} |"
        )
    peak = ", ".join(f"{name} {value / 1e12:.3g} T" for name, value in document["peaks"].items())
    machine = document["environment"].get("gpu") or document["environment"].get("cpu", "?")
    lines += ["", f"Measured peaks per second: {peak}. {machine}; judged at level {document['level']} before timing."]
    return "\n".join(lines)


def plot(document: Mapping[str, Any], path: Path) -> None:
    """A bar per timed contender and case: how many times as fast as the alternative, on a logarithmic axis."""
    pyplot = _matplotlib()
    from matplotlib import ticker
    rows = [row for row in document["rows"] if row["speedup"] is not None]
    if not rows:
        raise CannotJudgeError("nothing was timed: there is nothing to plot")
    names = list(dict.fromkeys(row["contender"] for row in rows))
    labels = [f"{row['mechanism']} {row['size']} {row['dtype']} {row['direction']}: {row['contender']}" for row in rows]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.32 * len(rows)), layout="constrained")
    colors = [f"C{names.index(row['contender']) % 10}" for row in rows]
    axes.barh(range(len(rows)), [row["speedup"] for row in rows], color=colors)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    for place, row in enumerate(rows):
        text = f" {row['speedup']:.2f}x, {row['roofline_share']:.0%} of the roofline"
        axes.annotate(text, (row["speedup"], place), va="center", fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    speeds = [row["speedup"] for row in rows]
    axes.set_xlim(min(0.5, min(speeds) / 2), max(2.0, max(speeds)) * 6)  # room for the figures beside the bars
    for formatted in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        formatted(ticker.LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel(f"times as fast as {document['against']} (logarithmic)")
    machine = document["environment"].get("gpu") or document["environment"].get("cpu", "")
    axes.set_title(f"{machine}, judged at level {document['level']} before timing", fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise CannotJudgeError(
            "--plot needs matplotlib, which is not installed: pip install 'attnspec[bench]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _size(mechanism: Any, text: str) -> str | dict[str, int]:
    """A size by name, or `queries=512,D=64` by part or by the mechanism's own names."""
    from attnspec.conformance.shapes import CLASSES

    if "=" not in text:
        return text
    sizes = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in CLASSES and name not in mechanism.sizes:
            known = ", ".join([*CLASSES, *mechanism.sizes])
            raise CannotJudgeError(f"--size names {name!r}; {mechanism.name} has {known}")
        if not value.isdigit():
            raise CannotJudgeError(f"--size {name} must be an integer of at least 0, got {value!r}")
        sizes[name] = int(value)
    return sizes


def _settings(mechanism: Any, texts: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Options (`causal=true`) and optional inputs (`+bias`) that every case has."""
    import tomllib

    options: dict[str, Any] = {}
    inputs: list[str] = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals and text.startswith("+"):
            inputs.append(text[1:])
            continue
        if name not in mechanism.options:
            known = ", ".join(mechanism.options) or "none"
            raise CannotJudgeError(f"--set names {name!r}; the options of {mechanism.name}: {known}; inputs: +NAME")
        try:
            options[name] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            options[name] = value
    return options, inputs
