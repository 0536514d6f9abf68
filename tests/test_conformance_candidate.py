"""`@candidate` describes without wrapping, and `resolve` finds a candidate or says in one line why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attnspec.conformance.candidate import Candidate, CandidateError, candidate, described, resolve
from attnspec.conformance.finding import built_in

KERNELS = '''
import attnspec
from neighbour import SCALE

@attnspec.candidate(mechanism="softmax_attention", layout="bihd", dtypes=["fp16"], declares={"empty_rows": "nan"})
def kernel(q, k, v):
    return q * SCALE

class Space:
    @staticmethod
    def inner(q, k, v):
        return q

number = 3
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("SCALE = 2\n")
    path = tmp_path / "kernels.py"
    path.write_text(KERNELS)
    return path


def test_decorating_leaves_the_function_as_it_was() -> None:
    def kernel(q: Any) -> Any:
        return q

    again = candidate(mechanism="softmax_attention", layout="bihd")(kernel)
    assert again is kernel
    found = described(kernel, "softmax_attention")
    assert found is not None and found.layout == "bihd" and found.function is kernel


def test_a_function_may_be_described_for_several_mechanisms() -> None:
    @candidate(mechanism="one", layout="bihd")
    @candidate(mechanism="two")
    def kernel(q: Any) -> Any:
        return q

    one, two = described(kernel, "one"), described(kernel, "two")
    assert one is not None and one.layout == "bihd"
    assert two is not None and two.layout == "bhid"
    assert described(kernel, "three") is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"framework": "keras"}, "framework 'keras' is unknown; expected one of torch, numpy, jax"),
        ({"layout": "bhi"}, "layout 'bhi' is no permutation of 'bhid'"),
        ({"dtypes": ["float32"]}, "dtypes names 'float32'; expected some of fp32, fp16, bf16, fp64"),
        ({"dtypes": []}, "dtypes is empty"),
        ({"devices": ["tpu"]}, "devices names 'tpu'"),
        ({"backward": 3}, "backward is a int, expected a function"),
    ],
)
def test_a_senseless_description_is_refused(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(CandidateError, match=r"^.*kernel: ") as caught:

        @candidate(**arguments)
        def kernel(q: Any) -> Any:
            return q

    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_built_in_function_cannot_be_described() -> None:
    with pytest.raises(CandidateError, match="cannot be described by @candidate"):
        candidate(mechanism="softmax_attention")(len)


def test_a_function_in_a_file_is_found_with_its_description_and_its_neighbours(file: Path) -> None:
    found = resolve(f"{file}:kernel", "softmax_attention")
    assert found.name == f"{file}:kernel"
    assert (found.layout, found.dtypes, found.declares) == ("bihd", ("fp16",), {"empty_rows": "nan"})
    assert found.function(1, 2, 3) == 2
    assert found.source().startswith(f"{file}:")


def test_a_file_with_one_described_function_needs_no_name(file: Path) -> None:
    assert resolve(str(file)).function.__name__ == "kernel"


def test_nested_attributes_are_found(file: Path) -> None:
    assert resolve(f"{file}:Space.inner").function("q", 0, 0) == "q"


def test_a_module_function_is_found_without_a_description() -> None:
    import os.path

    found = resolve("os.path:join")
    assert found.function is os.path.join
    assert (found.framework, found.layout, found.name) == ("torch", "bhid", "os.path:join")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "expected module:function, file.py:function or an adapter's name"),
        ("no-such-adapter", "or an adapter's name (adapters: "),
        ("no_such_module:f", "cannot import module 'no_such_module': No module named 'no_such_module'"),
        ("os.path:jion", "os.path has no 'jion' (there is: join"),
        ("os:path", "os:path: is a module, expected a function"),
        ("math:pi", "math:pi: is a float, expected a function"),
        ("fractions:Fraction", "fractions:Fraction: is a class, expected a function"),
        ("nowhere/kernels.py:f", "candidate 'nowhere/kernels.py': no such file"),
        ("a b:c", "'a b' is neither a module's name nor a .py file"),
    ],
)
def test_what_cannot_be_found_is_one_clear_line(text: str, told: str) -> None:
    with pytest.raises(CandidateError) as caught:
        resolve(text)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("import sys; sys.exit(4)", "it called sys.exit(4)"),
        ("def f(:", "line 1: "),
        ("import no_such_library", "No module named 'no_such_library'"),
        ("raise RuntimeError('no GPU\\nat all')", "RuntimeError: no GPU"),
        ("number = 3", "has no 'f'"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_clear_line(tmp_path: Path, body: str, told: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(body + "\n")
    with pytest.raises(CandidateError) as caught:
        resolve(f"{path}:f")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_function_described_for_another_mechanism_is_refused(file: Path) -> None:
    with pytest.raises(CandidateError, match="is described for softmax_attention, not for linear_attention"):
        resolve(f"{file}:kernel", "linear_attention")


def test_every_built_in_adapter_is_found_by_its_short_name_without_importing_its_library() -> None:
    adapters = built_in()
    assert not adapters.broken
    named = {
        "torch-sdpa", "torch-flex", "jax-dense", "jax-pallas", "jax-splash",
        "onnxruntime", "onnx-reference", "transformers-eager", "transformers-sdpa", "tinygrad",
    }  # fmt: skip
    assert named <= set(adapters.candidates)
    for name in named:
        found = resolve(name)
        assert isinstance(found, Candidate) and found.name == found.short_name == name


def test_a_library_function_finds_its_adapter_also_under_another_name() -> None:
    pytest.importorskip("torch")
    assert resolve("torch.nn.functional:scaled_dot_product_attention").short_name == "torch-sdpa"
    assert resolve("torch._C._nn:scaled_dot_product_attention").short_name == "torch-sdpa"


def test_a_version_that_cannot_be_found_out_is_told_and_not_raised() -> None:
    def version() -> str:
        raise OSError("no metadata")

    found = Candidate(function=len, name="x", version=version)
    assert found.version_text() == "unknown (OSError: no metadata)"
