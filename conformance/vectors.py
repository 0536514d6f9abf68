"""Golden vectors: cases with their inputs, exact results and tolerances, for implementations in any language.

`export` writes one safetensors file per dtype and a JSON manifest (`report/vectors.schema.json`); `verify` reads them
back and evaluates the equations again. Inputs and cotangents are stored in the case's dtype, results and the standard
deviation of honest rounding errors (sigma) of each element as float64. Used by `attnspec vectors`; needs the package
safetensors, and says so where it is missing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnspec.conformance.report.files import FileError, write
from attnspec.conformance.safetensors_file import dump
from attnspec.conformance.safetensors_file import load as load_tensors
from attnspec.conformance.types import Case, CaseData
from attnspec.spec import Mechanism

SCHEMA = Path(__file__).parent / "report" / "vectors.schema.json"
FORMAT = "attnspec.vectors"
VERSION = 1
MANIFEST = "manifest.json"
AGREEMENT = 1e-11
"""Largest difference, relative to the tensor's scale, at which results that are evaluated again count as the same."""
MAX_ELEMENTS = 2**17
"""Cases with a larger tensor are left out: vectors are to be copied into other repositories."""

FLAGS = {
    "decode": "one query only (N = 1)",
    "cross": "the numbers of queries and keys differ (N != M)",
    "grouped_heads": "several query heads share a key/value head (H != Hk)",
    "no_keys": "there is no key at all (M = 0): every row is empty",
    "no_queries": "there is no query (N = 0): outputs have no elements",
    "value_size": "keys and values have different feature sizes (D != E)",
    "empty_rows": "some rows may attend to nothing: output 0, LSE -inf (with a sink: the sink's logit)",
    "non_finite_inputs": "inputs hold inf or NaN where they must not matter, or -inf as a mask",
    "gradients": "cotangents are given and gradients expected",
}


@dataclass
class Vector:
    """One case with everything that is known of it; arrays are float64, bool or int64."""

    case: Case
    data: CaseData
    results: Mapping[str, Any]
    sigma: Mapping[str, Any]
    flags: list[str] = field(default_factory=list)


def export(
    mechanism: Mechanism,
    vectors: Iterable[Vector],
    out: str | Path,
    *,
    level: str,
    seed: int,
    tolerance: Mapping[str, Any],
) -> Path:
    """Write vectors into a folder, which is made if need be; the manifest comes last.

    Args:
        tolerance: how sigma is to be used: the rounding model and the limits, for the manifest.

    Returns:
        The manifest's path.

    Raises:
        FileError: the folder cannot be written, or no vector was given.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder {out}: {error.strerror or error}") from None
    by_dtype: dict[str, list[Vector]] = {}
    for vector in vectors:
        if _size(vector) <= MAX_ELEMENTS:
            by_dtype.setdefault(vector.case.dtype, []).append(vector)
    if not by_dtype:
        raise FileError("no case to export")
    files, entries, notes = [], [], {}
    for dtype, members in by_dtype.items():
        tensors: dict[str, tuple[NDArray[Any], str]] = {}
        name = f"{mechanism.name}.{dtype}.safetensors"
        for vector in members:
            entry, told = _entry(mechanism, vector, name, tensors)
            entries.append(entry)
            notes.update(told)
        content = dump(tensors, {"format": FORMAT, "mechanism": mechanism.name})
        write(folder / name, content)
        digest = hashlib.sha256(content).hexdigest()
        files.append({"path": name, "dtype": dtype, "sha256": digest, "bytes": len(content)})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "attnspec": _version(),
        "mechanism": mechanism.name,
        "summary": mechanism.summary,
        "paper": dict(mechanism.paper),
        "equations": mechanism.program.text,
        "level": level,
        "seed": seed,
        "tolerance": _plain(tolerance),
        "files": files,
        "flags": notes,
        "cases": entries,
    }
    validate(manifest)
    path = folder / MANIFEST
    write(path, json.dumps(manifest, indent=1, allow_nan=False) + "\n")
    return path


def flags_of(mechanism: Mechanism, vector: Vector) -> dict[str, str]:
    """What is special about a case, each with a note that a reader in another language understands."""
    case, sizes = vector.case, vector.case.sizes
    names = []
    conditions = {
        "decode": sizes.get("N") == 1,
        "cross": "N" in sizes and "M" in sizes and sizes["N"] != sizes["M"],
        "grouped_heads": "H" in sizes and "Hk" in sizes and sizes["H"] != sizes["Hk"],
        "no_keys": sizes.get("M") == 0,
        "no_queries": sizes.get("N") == 0,
        "value_size": "D" in sizes and "E" in sizes and sizes["D"] != sizes["E"],
        "empty_rows": "LSE" in vector.results and bool(np.isneginf(vector.results["LSE"]).any()),
        "non_finite_inputs": any(
            array.dtype.kind == "f" and not np.isfinite(array).all()
            for array in map(np.asarray, vector.data.inputs.values())
        ),
        "gradients": bool(vector.data.cotangents),
    }
    names += [name for name, holds in conditions.items() if holds]
    told = {name: FLAGS[name] for name in names}
    for name in case.options:
        told[f"option:{name}"] = mechanism.options[name].doc or name
    for name in case.inputs:
        if mechanism.inputs[name].optional:
            told[f"input:{name}"] = mechanism.inputs[name].doc or name
    if case.values != "normal":
        told[f"values:{case.values}"] = f"input values follow the pattern {case.values!r}, no plain normal distribution"
    return told


def verify(out: str | Path, load: Callable[[str], Mechanism]) -> list[str]:
    """Check exported vectors: hashes, shapes, and every result evaluated again from the stored inputs.

    Returns:
        What is wrong, one line each; an empty list where everything holds.

    Raises:
        FileError: there is no readable manifest.
    """
    manifest = read_manifest(out)
    folder = Path(out)
    problems: list[str] = []
    tensors: dict[str, dict[str, NDArray[Any]]] = {}
    for file in manifest["files"]:
        path = folder / file["path"]
        if not path.is_file():
            problems.append(f"{file['path']}: missing")
            continue
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != file["sha256"]:
            problems.append(f"{file['path']}: its content is not the one that the manifest states (sha256)")
            continue
        tensors[file["path"]] = load_tensors(content)
    mechanism = load(manifest["mechanism"])
    used: set[tuple[str, str]] = set()
    for entry in manifest["cases"]:
        if entry["file"] in tensors:
            problems += _verify_case(mechanism, entry, tensors[entry["file"]], used)
    stray = sorted({(file, name) for file, found in tensors.items() for name in found} - used)
    problems += [f"{file}: {name}: no case mentions this tensor" for file, name in stray]
    return problems


def read_manifest(out: str | Path) -> dict[str, Any]:
    """The manifest of a folder of vectors.

    Raises:
        FileError: missing, not JSON, or not following the schema.
    """
    path = Path(out) / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except json.JSONDecodeError as error:
        raise FileError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    try:
        validate(manifest)
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    return manifest


@functools.cache
def _validator() -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def validate(manifest: Any) -> None:
    """Check a manifest against the published schema.

    Raises:
        FileError: names the place of the first departure.
    """
    errors = sorted(_validator().iter_errors(manifest), key=lambda error: [str(part) for part in error.absolute_path])
    if errors:
        place = ".".join(str(part) for part in errors[0].absolute_path) or "top level"
        raise FileError(f"{place}: {errors[0].message}")


def _entry(
    mechanism: Mechanism, vector: Vector, file: str, tensors: dict[str, tuple[NDArray[Any], str]]
) -> tuple[dict[str, Any], dict[str, str]]:
    case = vector.case
    told = flags_of(mechanism, vector)

    def store(part: str, name: str, array: Any, dtype: str) -> str:
        values = np.asarray(array)
        if values.dtype.kind != "f":
            dtype = "bool" if values.dtype.kind == "b" else "int64"
        key = f"{case.id}/{part}/{name}"
        tensors[key] = (values, dtype)
        return key

    return {
        "id": case.id,
        "file": file,
        "flags": list(told),
        "dtype": case.dtype,
        "sizes": dict(case.sizes),
        "options": _plain(vector.data.options),
        "rows": None if case.rows is None else {index: list(values) for index, values in case.rows.items()},
        "inputs": {name: store("inputs", name, array, case.dtype) for name, array in vector.data.inputs.items()},
        "cotangents": {
            name: store("cotangents", name, array, case.dtype) for name, array in vector.data.cotangents.items()
        },
        "results": {
            name: {
                "value": store("results", name, array, "fp64"),
                "sigma": store("sigma", name, np.asarray(vector.sigma[name], dtype=np.float64), "fp64"),
            }
            for name, array in vector.results.items()
        },
    }, told


def _verify_case(
    mechanism: Mechanism, entry: Mapping[str, Any], tensors: Mapping[str, Any], used: set[tuple[str, str]]
) -> list[str]:
    keys = [*entry["inputs"].values(), *entry["cotangents"].values()]
    keys += [key for result in entry["results"].values() for key in (result["value"], result["sigma"])]
    used.update((entry["file"], key) for key in keys)
    missing = [key for key in keys if key not in tensors]
    if missing:
        return [f"{entry['id']}: tensor {missing[0]} is missing in {entry['file']}"]
    inputs = {name: tensors[key] for name, key in entry["inputs"].items()}
    cotangents = {name: tensors[key] for name, key in entry["cotangents"].items()}
    data = CaseData(inputs, dict(entry["options"]), cotangents)
    found = compute(mechanism, data, list(entry["results"]), entry["rows"])
    problems = []
    for name, result in entry["results"].items():
        want, sigma = tensors[result["value"]], tensors[result["sigma"]]
        if want.shape != sigma.shape or want.shape != np.shape(found[name]):
            problems.append(f"{entry['id']}: {name}: shapes of value, sigma and equations differ")
        elif not _agree(found[name], want):
            problems.append(f"{entry['id']}: {name}: the equations give other values than those stored")
        elif not (sigma >= 0).all():
            problems.append(f"{entry['id']}: {name}: sigma holds a negative number or NaN")
    return problems


def compute(
    mechanism: Mechanism, data: CaseData, names: Sequence[str], rows: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any]:
    """Results by the equations; gradients are named `dQ` for input `Q`."""
    outputs = [name for name in names if name in mechanism.outputs]
    found: dict[str, Any] = {}
    if outputs:
        found.update(mechanism.evaluate(data.inputs, data.options, outputs=outputs, rows=rows))
    wanted = {name.removeprefix("d"): name for name in names if name not in mechanism.outputs}
    if wanted:
        gradients = mechanism.gradients(data.inputs, data.options, data.cotangents, wrt=list(wanted))
        found.update({wanted[name]: value for name, value in gradients.items()})
    return found


def _agree(first: Any, second: Any) -> bool:
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    finite = two[np.isfinite(two)]
    scale = float(np.abs(finite).max()) if finite.size else 0.0
    with np.errstate(invalid="ignore"):
        near = np.abs(one - two) <= AGREEMENT * max(scale, math.ulp(1.0))
    return bool((near | (one == two) | (np.isnan(one) & np.isnan(two))).all())


def _size(vector: Vector) -> int:
    arrays = [*vector.data.inputs.values(), *vector.results.values()]
    return max((int(np.size(array)) for array in arrays), default=0)


def _plain(value: Any) -> Any:
    from attnspec.conformance.report.json_report import plain

    return plain(value)


def _version() -> str:
    from attnspec import __version__

    return __version__
