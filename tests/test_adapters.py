"""The adapters to other libraries: found, right on small cases by a formula written here, honest in what they declare.

The formula is plain NumPy and shares nothing with the specification. A library that is not installed skips its cases by
its name; a continuous integration run installs all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from attnspec.conformance.binding import bind
from attnspec.conformance.candidate import Candidate, CandidateError
from attnspec.conformance.finding import built_in, resolve
from attnspec.conformance.interface import Interface
from attnspec.conformance.judging import conclude
from attnspec.conformance.types import Case, Observation, Unsupported
from attnspec.spec.mechanism import load

REQUIRED = (
    "torch-sdpa", "torch-flex", "jax-dense", "jax-pallas", "jax-splash", "onnxruntime", "onnx-reference",
    "transformers-eager", "transformers-sdpa", "tinygrad",
)  # fmt: skip
ON_THE_CPU = (
    *REQUIRED, "torch-sdpa-math", "torch-sdpa-flash", "torch-sdpa-lower-right",
)  # fmt: skip
LIBRARY = {
    "torch": "torch", "jax": "jax", "onnxruntime": "onnxruntime", "onnx": "onnx", "transformers": "transformers",
    "tinygrad": "tinygrad",
}  # fmt: skip
UNIT = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}


def adapter(name: str) -> Candidate:
    """The adapter; skips the test where its library is not installed."""
    prefix = name.partition("-")[0]
    pytest.importorskip(LIBRARY[prefix])
    if prefix == "transformers":
        pytest.importorskip("torch")
    if name == "tinygrad" and shutil.which("clang") is None:
        pytest.fail("tinygrad's CPU backend needs clang: apt-get install clang")
    return built_in().candidates[name]


def formula(
    Q: Any,
    K: Any,
    V: Any,
    *,
    keep: Any = None,
    bias: Any = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Any, Any]:
    """Softmax attention of [b,h,i,d] arrays in float64: the output and the natural LSE; empty rows are zeros."""
    group = Q.shape[1] // K.shape[1]
    K, V = np.repeat(K, group, axis=1), np.repeat(V, group, axis=1)
    logits = np.einsum("bhid,bhjd->bhij", Q, K) * (Q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    logits = logits + bias
    if keep is not None:
        logits = np.where(keep, logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True)
    top = np.where(np.isneginf(top), 0.0, top)
    weights = np.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return weights / np.where(total > 0, total, 1.0) @ V, lse


@dataclass
class Given:
    """A case: float64 arrays that float32 and bfloat16 hold exactly, options, and the rule that the formula applies."""

    arrays: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)


def draw(N: int = 24, M: int = 32, H: int = 4, Hk: int = 4, D: int = 16) -> dict[str, Any]:
    rng = np.random.default_rng([N, M, H, Hk, D])
    shapes = {"Q": (2, H, N, D), "K": (2, Hk, M, D), "V": (2, Hk, M, D)}
    return {name: np.round(rng.standard_normal(shape) * 16) / 16 for name, shape in shapes.items()}


def plain() -> Given:
    return Given(draw())


def causal() -> Given:
    return Given(draw(N=32, M=32), {"causal": True}, {"keep": np.tri(32, dtype=bool)})


def masked() -> Given:
    mask = np.random.default_rng(5).random((1, 1, 24, 32)) > 0.3
    mask[..., 0] = True
    given = Given(draw(), rule={"keep": mask})
    given.arrays["mask"] = mask
    return given


def biased() -> Given:
    bias = np.round(np.random.default_rng(6).standard_normal((2, 4, 24, 32)) * 8) / 8
    given = Given(draw(), rule={"bias": bias})
    given.arrays["bias"] = bias
    return given


def grouped() -> Given:
    return Given(draw(Hk=2), {"scale": 0.5}, {"scale": 0.5})


def capped() -> Given:
    return Given(draw(), {"softcap": 2.0}, {"softcap": 2.0})


CASES: dict[str, Callable[[], Given]] = {
    "plain": plain, "causal": causal, "masked": masked, "biased": biased, "grouped": grouped, "capped": capped,
}  # fmt: skip


def converted(array: Any, candidate: Candidate, name: str, dtype: str) -> Any:
    real = array.dtype.kind == "f"
    if candidate.framework == "torch":
        import torch

        narrow_types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        tensor = torch.from_numpy(array)
        return tensor.to(narrow_types[dtype]) if real else tensor
    if dtype == "bf16":
        narrow: Any = pytest.importorskip("ml_dtypes").bfloat16
    else:
        narrow = {"fp32": np.float32, "fp16": np.float16}[candidate.input_dtypes.get(name, dtype)]
    plain_array = array.astype(narrow) if real else array
    if candidate.framework == "jax":
        import jax.numpy as jnp

        return jnp.asarray(plain_array)
    return plain_array


def wide(value: Any) -> Any:
    if hasattr(value, "detach"):
        value = value.detach().to("cpu").double().numpy()
    return np.asarray(value).astype(np.float64)


def run(candidate: Candidate, arrays: dict[str, Any], options: dict[str, Any], dtype: str = "fp32") -> list[Any]:
    """What the adapter returns, as float64 arrays."""
    result = candidate.function(
        **{name: converted(array, candidate, name, dtype) for name, array in arrays.items()}, **options
    )
    return [wide(value) for value in (result if isinstance(result, (tuple, list)) else (result,))]


def takes(candidate: Candidate, given: Given) -> bool:
    parameters = inspect.signature(candidate.function).parameters
    return all(name in parameters for name in (*given.arrays, *given.options))


def test_the_ten_adapters_are_found_and_every_adapter_module_can_be_read() -> None:
    found = built_in()
    assert not found.broken
    assert set(REQUIRED) <= set(found.candidates)
    assert {found.candidates[name].mechanism for name in REQUIRED} == {"softmax_attention"}


def test_every_adapter_of_softmax_attention_on_the_cpu_is_listed_here() -> None:
    ours = {name: one for name, one in built_in().candidates.items() if one.mechanism == "softmax_attention"}
    listed = {name for name, candidate in ours.items() if "cpu" in candidate.devices}
    assert listed - set(ON_THE_CPU) == {"torch-flex-compiled", "triton-softmax"}


@pytest.mark.parametrize("name", ON_THE_CPU)
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_agrees_with_the_formula(name: str, case: str) -> None:
    candidate = adapter(name)
    given = CASES[case]()
    if not takes(candidate, given):
        assert case in ("masked", "biased", "grouped", "capped")
        return
    out, *rest = run(candidate, given.arrays, given.options)
    want, lse = formula(given.arrays["Q"], given.arrays["K"], given.arrays["V"], **given.rule)
    assert np.abs(out - want).max() < 40 * UNIT["fp32"]
    if rest:
        base = np.log(2.0) if candidate.declares.get("lse_base") == "2" else 1.0
        assert np.abs(rest[0] * base - lse).max() < 200 * UNIT["fp32"]


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_an_adapter_keeps_the_narrow_dtypes_that_it_states(name: str) -> None:
    candidate = adapter(name)
    given = plain()
    want, _ = formula(given.arrays["Q"], given.arrays["K"], given.arrays["V"])
    for dtype in ("fp16", "bf16"):
        if dtype not in candidate.dtypes:
            assert (name, dtype) == ("onnxruntime", "bf16")
            continue
        try:
            out = run(candidate, given.arrays, given.options, dtype)[0]
        except Unsupported as error:
            assert name == "tinygrad" and "__bf16" in str(error)
            continue
        error_in_units = np.abs(out - want).max() / UNIT[dtype]
        assert 0.05 < error_in_units < 12


# Declared differences: each is shown to exist ------------------------------------------------------


def top_left(candidate: Candidate) -> bool:
    arrays = draw(N=8, M=16)
    out = run(candidate, arrays, {"causal": True})[0]
    want = {
        offset: formula(arrays["Q"], arrays["K"], arrays["V"], keep=np.tri(8, 16, offset, dtype=bool))[0]
        for offset in (0, 8)
    }
    return bool(np.abs(out - want[0]).max() < 1e-5 < np.abs(out - want[8]).max())


def empty_row(candidate: Candidate) -> tuple[Any, Any]:
    """The output of a row whose mask is all False, and the mean of all values."""
    arrays = draw(N=8, M=16)
    arrays["mask"] = np.ones((1, 1, 8, 16), dtype=bool)
    arrays["mask"][..., 3, :] = False
    return run(candidate, arrays, {})[0][:, :, 3], arrays["V"].mean(axis=2)


def empty_is_mean(candidate: Candidate) -> bool:
    row, mean = empty_row(candidate)
    return bool(np.abs(row - mean).max() < 1e-5)


def empty_is_nan(candidate: Candidate) -> bool:
    return bool(np.isnan(empty_row(candidate)[0]).all())


def empty_depends_on_the_logits(candidate: Candidate) -> bool:
    """In float16 the mask value -65504 leaves multiples of 32 of a large logit, so that the row is no mean."""
    arrays = draw(N=8, M=16)
    arrays["Q"] = arrays["Q"] * 16.0
    arrays["mask"] = np.zeros((1, 1, 8, 16), dtype=bool)
    out = run(candidate, arrays, {}, "fp16")[0]
    return empty_is_mean(candidate) and bool(np.abs(out - arrays["V"].mean(axis=2)[:, :, None]).max() > 0.1)


def lse_of_empty_row_is_finite(candidate: Candidate) -> bool:
    arrays = draw(N=8, M=16)
    arrays["mask"] = np.zeros((1, 1, 8, 16), dtype=bool)
    lse = run(candidate, arrays, {})[1]
    return bool(np.isfinite(lse).all() and (lse < -1e38).all())


def base_two(candidate: Candidate) -> bool:
    given = plain()
    lse = run(candidate, given.arrays, {})[1]
    want = formula(given.arrays["Q"], given.arrays["K"], given.arrays["V"])[1]
    return bool(np.abs(lse - want / np.log(2.0)).max() < 1e-4 < np.abs(lse - want).max())


def unseen_values_spread(candidate: Candidate) -> bool:
    """A NaN in the value of a key that the causal mask hides reaches a row that may not see it."""
    arrays = draw(N=16, M=16)
    arrays["V"][:, :, -1] = np.nan
    return bool(np.isnan(run(candidate, arrays, {"causal": True})[0][:, :, :-1]).any())


def unequal_lengths_pass(candidate: Candidate) -> bool:
    arrays = draw(N=8, M=16)
    arrays["V"] = arrays["V"][:, :, :-1]
    return bool(run(candidate, arrays, {})[0].shape == (2, 4, 8, 16))


EVIDENCE: dict[tuple[str, str], Callable[[Candidate], bool]] = {
    ("causal_alignment", "top_left"): top_left,
    ("empty_rows", "mean"): empty_is_mean,
    ("empty_rows", "nan"): empty_is_nan,
    ("empty_rows", "undefined"): empty_depends_on_the_logits,
    ("lse_empty", "undefined"): lse_of_empty_row_is_finite,
    ("lse_base", "2"): base_two,
    ("unseen_values", "multiplied"): unseen_values_spread,
    ("kv_lengths", "unchecked"): unequal_lengths_pass,
}
DECLARED = [
    (name, semantic, value)
    for name in ON_THE_CPU
    for semantic, value in sorted(built_in().candidates[name].declares.items())
]


@pytest.mark.parametrize(("name", "semantic", "value"), DECLARED)
def test_a_declared_difference_exists(name: str, semantic: str, value: str) -> None:
    assert EVIDENCE[semantic, value](adapter(name))


@pytest.mark.parametrize("name", [name for name in ON_THE_CPU if name not in ("jax-splash", "jax-pallas")])
def test_an_adapter_that_declares_nothing_about_empty_rows_returns_zeros(name: str) -> None:
    candidate = adapter(name)
    if "empty_rows" not in candidate.declares:
        assert not empty_row(candidate)[0].any()


def test_unequal_lengths_are_refused_by_the_math_backend() -> None:
    with pytest.raises(RuntimeError, match="batch2 tensor"):
        unequal_lengths_pass(adapter("torch-sdpa-math"))


@pytest.mark.parametrize(
    ("declares", "values", "status"),
    [
        ({}, "bad_keys", "fail"),
        ({"kv_lengths": "unchecked"}, "bad_keys", "not_supported"),
        ({"kv_lengths": "unchecked"}, "bad_features", "fail"),
    ],
)
def test_unchecked_lengths_excuse_nothing_but_themselves(declares: dict[str, str], values: str, status: str) -> None:
    candidate = dataclasses.replace(built_in().candidates["torch-sdpa-math"], declares=declares)
    signature = bind(candidate, Interface.of(load("softmax_attention"))).signature
    case = Case(
        id="", mechanism="softmax_attention", group="refusals", level="standard", sizes={}, options={}, inputs=(),
        values=values, layout="contiguous", dtype="fp32", direction="forward", check="refusal", seed=0,
    )  # fmt: skip
    suite: Any = None
    assert conclude(suite, case, None, Observation(status="returned"), signature).status == status


# Refusals ------------------------------------------------------------------------------------------


def test_sdpa_has_one_slot_for_masks() -> None:
    given = masked()
    given.arrays["bias"] = np.zeros((1, 1, 24, 32))
    with pytest.raises(Unsupported, match="takes no bias together with mask"):
        run(adapter("torch-sdpa"), given.arrays, {})


def test_splash_refuses_a_query_that_may_attend_to_nothing() -> None:
    with pytest.raises(Unsupported, match="may attend to nothing"):
        empty_row(adapter("jax-splash"))


def test_splash_refuses_lengths_that_padding_would_hide() -> None:
    with pytest.raises(Unsupported, match="do not fit together"):
        unequal_lengths_pass(adapter("jax-splash"))


def test_pallas_reads_past_the_keys_when_causal_has_more_queries_and_the_adapter_refuses_it() -> None:
    candidate = adapter("jax-pallas")
    arrays = draw(N=32, M=16)
    with pytest.raises(Unsupported, match="past the last key"):
        run(candidate, arrays, {"causal": True})
    kernel = importlib.import_module("jax.experimental.pallas.ops.gpu.attention")
    inputs = [converted(array.swapaxes(1, 2).copy(), candidate, name, "fp32") for name, array in arrays.items()]
    out = kernel.mha(*inputs, None, 0.25, True, kernel.BlockSizes(16, 16), interpret=True)
    assert np.isnan(np.asarray(out)).any()


def test_flex_has_no_gradient_on_the_cpu() -> None:
    candidate = adapter("torch-flex")
    tensors = {name: converted(array, candidate, name, "fp32") for name, array in draw().items()}
    tensors["Q"].requires_grad_(True)
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        candidate.function(**tensors)


def test_jax_refuses_the_gradient_of_its_lse() -> None:
    candidate = adapter("jax-dense")
    import jax
    import jax.numpy as jnp

    inputs = {name: converted(array, candidate, name, "fp32") for name, array in draw().items()}
    (out, LSE), pull = jax.vjp(lambda Q: candidate.function(Q, inputs["K"], inputs["V"]), inputs["Q"])
    pull((jnp.ones_like(out), jnp.zeros_like(LSE)))
    with pytest.raises(Unsupported, match="LSE is not differentiable"):
        pull((jnp.ones_like(out), jnp.ones_like(LSE)))


def test_jit_refuses_bfloat16_single_numbers_and_the_adapter_runs_them_one_operation_at_a_time() -> None:
    candidate = adapter("jax-dense")
    import jax

    arrays = {name: array[:1] for name, array in draw(N=1, M=1, H=1, Hk=1, D=1).items()}
    inputs = [converted(array.swapaxes(1, 2).copy(), candidate, name, "bf16") for name, array in arrays.items()]
    with pytest.raises(jax.errors.JaxRuntimeError, match="Algorithm not supported"):
        jax.jit(jax.nn.dot_product_attention)(*inputs)
    assert (run(candidate, arrays, {}, "bf16")[0] == arrays["V"]).all()


def test_the_reference_evaluator_sums_weights_in_bfloat16_unless_told_otherwise() -> None:
    candidate = adapter("onnx-reference")
    module = importlib.import_module("attnspec.conformance.adapters.onnx_attention")
    evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator
    arrays = {name: np.zeros_like(array) for name, array in draw(N=1, M=512).items()}
    arrays["V"] += 1.0
    assert (run(candidate, arrays, {}, "bf16")[0] == 1.0).all()
    inputs = {name: converted(array, candidate, name, "bf16") for name, array in arrays.items()}
    (out,) = evaluator(module._model(inputs, {}, 23)).run(None, inputs)
    assert (wide(out) == 2.0).all()


def test_eager_refuses_float16_logits_that_overflow_before_they_are_scaled() -> None:
    arrays = draw()
    arrays["Q"] = np.full_like(arrays["Q"], 80.0)
    arrays["K"] = np.full_like(arrays["K"], 64.0)
    candidate = adapter("transformers-eager")
    with pytest.raises(Unsupported, match="does not fit"):
        run(candidate, arrays, {}, "fp16")
    assert np.isfinite(run(candidate, arrays, {}, "bf16")[0]).all()


def test_tinygrad_brings_its_gradients() -> None:
    candidate = adapter("tinygrad")
    arrays = draw(N=4, M=6, H=2, Hk=1, D=4)
    inputs = {name: converted(array, candidate, name, "fp32") for name, array in arrays.items()}
    assert candidate.backward is not None
    dO = np.random.default_rng(1).standard_normal((2, 2, 4, 4)).astype(np.float32)
    grads = candidate.backward(dO, **inputs)
    for name, array in arrays.items():
        index = tuple(size // 2 for size in array.shape)
        step = np.zeros_like(array)
        step[index] = 1e-5
        values = [formula(**{**arrays, name: array + sign * step})[0] for sign in (1, -1)]
        slope = float(((values[0] - values[1]) * dO).sum() / 2e-5)
        assert abs(float(grads[f"d{name}"][index]) - slope) < 1e-4 * max(1.0, abs(slope))


# One program for many cases -----------------------------------------------------------------------


def test_splash_masks_and_lengths_within_a_tile_share_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = adapter("jax-splash")
    module = importlib.import_module("attnspec.conformance.adapters.jax_splash")
    made: list[Any] = []

    @functools.cache
    def program(options: Any) -> Any:
        made.append(original.__wrapped__(options))
        return made[-1]

    original = module._program
    monkeypatch.setattr(module, "_program", program)
    module._kernel.cache_clear()
    for given in (masked(), Given(draw(N=8, M=30)), Given(draw(N=20, M=40), {"window_right": 3}), grouped()):
        out = run(candidate, given.arrays, given.options)[0]
        assert np.isfinite(out).all()
    module._kernel.cache_clear()
    assert [program._cache_size() for program in made] == [2]  # grouped heads have keys of another shape


def test_flex_rules_share_a_program() -> None:
    adapter("torch-flex")
    import torch

    module = importlib.import_module("attnspec.conformance.adapters.torch_flex")
    free = {"causal": False, "window_left": None, "window_right": None, "chunk": None, "sink_tokens": 0}
    nobody = dict.fromkeys(("q_segment", "kv_segment", "q_length", "kv_length", "left_pad"))
    ids = torch.tensor([[0, 0, 1], [0, 1, 1]])
    programs = set()
    for given in ({}, {"q_segment": ids, "kv_segment": ids}, {"left_pad": torch.tensor([1, 0])}):
        places = module._places(2, 3, 3, torch.device("cpu"), top_left=False, **{**nobody, **given})
        for options in ({}, {"causal": True}, {"window_left": 1, "sink_tokens": 1}, {"chunk": 2}):
            programs.add(module._rules(places, **{**free, **options}).mask_mod(None).__code__)
    assert len(programs) == 1


# Without the library -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("torch-sdpa", "torch", "torch"),
        ("torch-flex", "torch", "torch"),
        ("jax-dense", "jax", "jax"),
        ("jax-pallas", "jax", "jax"),
        ("jax-splash", "jax", "jax"),
        ("onnxruntime", "onnxruntime", "onnx"),
        ("onnx-reference", "onnx.reference", "onnx"),
        ("transformers-eager", "torch", "torch"),
        ("transformers-sdpa", "torch", "torch"),
        ("tinygrad", "tinygrad", "adapters"),
    ],
)
def test_a_missing_library_is_one_clear_line(
    name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    candidate = built_in().candidates[name]
    arrays = {key: array.astype(np.float32) for key, array in draw(N=8, M=8).items()}
    with pytest.raises(CandidateError, match=rf"not installed: pip install 'attnspec\[{extra}\]'"):
        candidate.function(**arrays)


def test_reading_the_adapters_imports_no_library() -> None:
    code = (
        "import sys; from attnspec.conformance.finding import built_in; built_in(); "
        "print(sorted({'torch', 'jax', 'onnx', 'onnxruntime', 'transformers', 'tinygrad', 'fla'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_a_bare_library_function_finds_its_adapter() -> None:
    pytest.importorskip("torch")
    assert resolve("torch.nn.functional:scaled_dot_product_attention").short_name == "torch-sdpa"
    assert resolve("jax.nn:dot_product_attention").short_name == "jax-dense"
