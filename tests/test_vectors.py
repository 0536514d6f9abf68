"""Golden vectors read back as they were written, by us and by the safetensors package, and agree with the equations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnspec.conformance import safetensors_file, vectors
from attnspec.conformance.report.files import FileError
from attnspec.conformance.types import CaseData
from attnspec.spec import load
from attnspec.spec.language.formats import round_to
from attnspec.tests import fakes

TOLERANCE = {"rule": "for a test"}


def vector(dtype: str = "fp32", *, backward: bool = False, **options: Any) -> vectors.Vector:
    """A small causal case whose first rows see nothing."""
    rng = np.random.default_rng(0)
    mechanism = load("softmax_attention")
    inputs = {
        "Q": round_to(rng.standard_normal((1, 2, 5, 4)), dtype),
        "K": round_to(rng.standard_normal((1, 1, 3, 4)), dtype),
        "V": round_to(rng.standard_normal((1, 1, 3, 2)), dtype),
        "mask": np.ones((1, 1, 5, 3), dtype=bool),
    }
    data = CaseData(inputs, {"causal": True, **options})
    case = fakes.case(
        f"m/{dtype}/{'backward' if backward else 'forward'}", dtype=dtype, options=dict(data.options),
        sizes={"B": 1, "H": 2, "Hk": 1, "N": 5, "M": 3, "D": 4, "E": 2}, inputs=("K", "V", "mask"),
        direction="backward" if backward else "forward",
    )  # fmt: skip
    names = ["O", "LSE"]
    if backward:
        data.cotangents = {"O": round_to(rng.standard_normal((1, 2, 5, 2)), dtype)}
        names = ["dQ", "dK", "dV"]
    results = vectors.compute(mechanism, data, names)
    sigma = {name: np.full(np.shape(value), 1e-7) for name, value in results.items()}
    return vectors.Vector(case, data, results, sigma)


def exported(folder: Path, *members: vectors.Vector) -> Path:
    chosen = members or (vector(), vector("bf16"), vector("fp16"), vector(backward=True))
    return vectors.export(
        load("softmax_attention"), chosen, folder, level="smoke", seed=0, tolerance=TOLERANCE
    )  # fmt: skip


def test_exported_vectors_agree_with_the_equations(tmp_path: Path) -> None:
    exported(tmp_path / "new")
    assert vectors.verify(tmp_path / "new", load) == []
    assert sorted(entry.name for entry in (tmp_path / "new").iterdir()) == [
        "manifest.json",
        "softmax_attention.bf16.safetensors",
        "softmax_attention.fp16.safetensors",
        "softmax_attention.fp32.safetensors",
    ]


def test_the_manifest_explains_each_case_and_each_flag(tmp_path: Path) -> None:
    manifest = json.loads(exported(tmp_path).read_text())
    flags = {flag for entry in manifest["cases"] for flag in entry["flags"]}
    assert {"cross", "grouped_heads", "value_size", "empty_rows", "gradients", "option:causal", "input:mask"} <= flags
    assert flags == set(manifest["flags"])
    assert manifest["equations"] == load("softmax_attention").program.text


def test_the_safetensors_package_reads_the_files(tmp_path: Path) -> None:
    numpy_reader = pytest.importorskip("safetensors.numpy")
    exported(tmp_path)
    ours = safetensors_file.load((tmp_path / "softmax_attention.fp32.safetensors").read_bytes())
    theirs = numpy_reader.load_file(tmp_path / "softmax_attention.fp32.safetensors")
    assert set(ours) == set(theirs)
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)


def test_bfloat16_is_what_torch_calls_bfloat16(tmp_path: Path) -> None:
    torch_reader = pytest.importorskip("safetensors.torch")
    exported(tmp_path)
    ours = safetensors_file.load((tmp_path / "softmax_attention.bf16.safetensors").read_bytes())
    theirs = torch_reader.load_file(tmp_path / "softmax_attention.bf16.safetensors")
    names = [name for name in ours if name.endswith("/inputs/Q")]
    assert names
    for name in names:
        assert str(theirs[name].dtype) == "torch.bfloat16"
        np.testing.assert_array_equal(ours[name], theirs[name].double().numpy())


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "fp16", "bf16"])
def test_special_values_survive(dtype: str) -> None:
    array = round_to(np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.5, 6e-8]), dtype)
    back = safetensors_file.load(safetensors_file.dump({"a": (array, dtype)}, {}))["a"]
    np.testing.assert_array_equal(back, array)
    assert np.signbit(back[1])


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1, 1)])
def test_empty_and_scalar_tensors_survive(shape: tuple[int, ...]) -> None:
    tensors = {"a": (np.ones(shape), "fp32"), "b": (np.ones(shape, bool), "bool"), "c": (np.ones(shape, int), "int64")}
    back = safetensors_file.load(safetensors_file.dump(tensors, {"x": "y"}))
    assert {name: array.shape for name, array in back.items()} == dict.fromkeys("abc", shape)


def test_a_value_that_the_dtype_cannot_hold_is_refused() -> None:
    for dtype in ("fp32", "fp16", "bf16"):
        with pytest.raises(FileError, match=f"tensor a holds values that are no {dtype} numbers"):
            safetensors_file.dump({"a": (np.array([0.1]), dtype)}, {})


@pytest.mark.parametrize("content", [b"", b"\x05\0\0\0\0\0\0\0{}", b"\xff" * 40])
def test_a_file_that_is_no_safetensors_file_is_refused(content: bytes) -> None:
    with pytest.raises(FileError, match="not a safetensors file"):
        safetensors_file.load(content)


def changed(path: Path, edit: Any) -> None:
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def test_verifying_notices_a_changed_file(tmp_path: Path) -> None:
    exported(tmp_path)
    path = tmp_path / "softmax_attention.fp32.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert any("sha256" in problem for problem in vectors.verify(tmp_path, load))
    path.unlink()
    assert any("missing" in problem for problem in vectors.verify(tmp_path, load))


def test_verifying_notices_a_wrong_result(tmp_path: Path) -> None:
    wrong = vector()
    wrong.results = {**wrong.results, "O": np.asarray(wrong.results["O"]) + 1e-9}
    exported(tmp_path, wrong)
    assert vectors.verify(tmp_path, load) == ["m/fp32/forward: O: the equations give other values than those stored"]


def test_verifying_notices_other_options_and_stray_tensors(tmp_path: Path) -> None:
    path = exported(tmp_path, vector())
    changed(path, lambda manifest: manifest["cases"][0]["options"].update(causal=False))
    assert any("other values" in problem for problem in vectors.verify(tmp_path, load))
    changed(path, lambda manifest: manifest["cases"][0]["results"].pop("LSE"))
    assert any("no case mentions" in problem for problem in vectors.verify(tmp_path, load))


def test_a_manifest_that_departs_from_its_schema_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path, vector())
    changed(path, lambda manifest: manifest.pop("tolerance"))
    with pytest.raises(FileError, match=r"manifest\.json: top level: 'tolerance' is a required property"):
        vectors.verify(tmp_path, load)
    with pytest.raises(FileError, match="No such file"):
        vectors.verify(tmp_path / "gone", load)


def test_nothing_to_export_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no case to export"):
        vectors.export(load("softmax_attention"), [], tmp_path, level="smoke", seed=0, tolerance=TOLERANCE)
