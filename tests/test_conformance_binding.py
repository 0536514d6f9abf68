"""Parameters are matched by name; what cannot be matched is told, and what is not taken is never dropped in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec.conformance.binding import Binding, bind, missing
from attnspec.conformance.candidate import Candidate, CandidateError
from attnspec.conformance.returned import WrongResultError, check, unpack
from attnspec.tests.small_suite import INTERFACE

RESOLVED: dict[str, Any] = {
    "causal": False, "causal_alignment": "bottom_right", "window_left": None, "window_right": None,
    "softcap": None, "scale": 0.5, "dropout_p": 0.0,
}  # fmt: skip


def bound(function: Callable[..., Any], **stated: Any) -> Binding:
    return bind(Candidate(function=function, name="kernel", framework="numpy", **stated), INTERFACE)


def passed(binding: Binding, options: dict[str, Any] | None = None, **inputs: Any) -> dict[str, Any]:
    """The arguments of a call, by parameter name."""
    given = {"Q": np.zeros((1, 2, 3, 4)), "K": np.zeros((1, 2, 5, 4)), "V": np.zeros((1, 2, 5, 4)), **inputs}
    args, kwargs = binding.arguments(given, options or {}, {**RESOLVED, **(options or {})}, lambda mask, bias: "merged")
    assert not args
    return kwargs


def test_names_match_whatever_their_case() -> None:
    binding = bound(lambda Q, k, v, Causal=False, SCALE=None: None)
    assert binding.signature.inputs == {"Q", "K", "V"}
    assert binding.signature.options == {"causal", "scale"}


def test_a_drop_in_replacement_of_sdpa_needs_no_description() -> None:
    def kernel(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):  # type: ignore[no-untyped-def]
        return query

    binding = bound(kernel)
    assert binding.signature.inputs == {"Q", "K", "V", "mask", "bias"}
    assert binding.signature.options == {"causal", "scale"}
    assert "explicit dropout_mask" in binding.signature.not_taken["dropout_p"]
    got = passed(binding, {"causal": True}, mask="the mask")
    assert {name: got[name] for name in got if name not in ("query", "key", "value")} == {
        "attn_mask": "the mask",
        "is_causal": True,
    }
    assert passed(binding, bias="the bias")["attn_mask"] == "the bias"
    assert passed(binding, mask="m", bias="b")["attn_mask"] == "merged"
    assert passed(binding, Q=np.zeros((1, 4, 3, 4)))["enable_gqa"] is True


@pytest.mark.parametrize("name", ["sm_scale", "softmax_scale", "scaling"])
def test_the_scale_is_known_under_its_usual_names(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def kernel(q, k, v, {name}=None): return q", namespace)
    binding = bound(namespace["kernel"])
    assert passed(binding, {"scale": 0.7})[name] == 0.7
    assert name not in passed(binding)


def test_a_window_pair_is_passed_with_minus_one_for_an_open_side() -> None:
    binding = bound(lambda q, k, v, window_size=(-1, -1): None)
    assert binding.signature.options == {"window_left", "window_right"}
    assert passed(binding, {"window_left": 3})["window_size"] == (3, -1)
    assert "window_size" not in passed(binding)
    by_none = bound(lambda q, k, v, window=(None, None): None)
    assert passed(by_none, {"window_right": 0})["window"] == (None, 0)


def test_a_window_of_one_number_is_not_guessed() -> None:
    def kernel(q: Any, k: Any, v: Any, window: int = 0) -> None: ...

    binding = bound(kernel)
    assert binding.signature.options == frozenset()
    assert binding.signature.notes == ("parameter window is left at its default",)
    assert passed(bound(kernel, names={"window": "window_left"}), {"window_left": 3})["window"] == 3


def test_a_default_that_means_something_else_is_overridden() -> None:
    binding = bound(lambda q, k, v, causal=True, scale=1.0, softcap=0.0: None)
    got = passed(binding)
    assert (got["causal"], got["scale"]) == (False, 0.5)
    assert "softcap" not in got, "0 means no softcap, so the default is left to the function"


def test_a_required_option_gets_the_default_of_the_mechanism() -> None:
    got = passed(bound(lambda q, k, v, scale, causal, softcap: None))
    assert (got["scale"], got["causal"], got["softcap"]) == (0.5, False, None)


def test_positional_only_parameters_are_passed_in_order() -> None:
    def kernel(q: Any, k: Any, v: Any, bias: Any = None, /, causal: bool = False) -> None: ...

    args, kwargs = bound(kernel).arguments({"Q": "q", "K": "k", "V": "v"}, {"causal": True}, RESOLVED, None)
    assert (args, kwargs) == (["q", "k", "v", None], {"causal": True})


def test_fixed_arguments_are_passed_on_every_call() -> None:
    def kernel(q: Any, k: Any, v: Any, backend: str) -> None: ...

    assert passed(bound(kernel, fixed={"backend": "fast"}))["backend"] == "fast"


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda q, k, v, flavour, colour: None, "required parameters flavour, colour cannot be matched"),
        (lambda q, query, k, v: None, "parameters q and query both stand for Q"),
        (lambda q, k, v, mask=None, attn_mask=None: None, "parameters mask and attn_mask both stand for mask"),
        (lambda k, v: None, "takes no parameter for the required input Q (also known as query, queries)"),
        (lambda *arrays: None, "takes no parameter for the required input Q"),
        (min, "has no readable signature"),
    ],
)
def test_a_function_that_cannot_be_matched_is_one_clear_line(function: Any, told: str) -> None:
    with pytest.raises(CandidateError) as caught:
        bound(function)
    assert told in str(caught.value)
    assert str(caught.value).startswith("kernel: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({"names": {"w": "window_left"}}, "names maps 'w', which is no parameter"),
        ({"names": {"q": "queue"}}, "names maps 'q' to 'queue'; known: Q, K"),
        ({"layouts": {"LSE": "bhid"}}, "layout 'bhid' of LSE is no permutation of 'bhi'"),
        ({"outputs": ("O", "L")}, "outputs names 'L'; the mechanism's are O, LSE"),
        ({"mechanism": "linear_attention"}, "is described for linear_attention, not for softmax_attention"),
    ],
)
def test_a_description_that_does_not_fit_is_one_clear_line(stated: dict[str, Any], told: str) -> None:
    with pytest.raises(CandidateError) as caught:
        bound(lambda q, k, v: None, **stated)
    assert told in str(caught.value)


def test_what_is_not_taken_is_named_with_its_reason() -> None:
    signature = bound(lambda q, k, v: None, declares={"causal_alignment": "top_left"}).signature
    assert set(signature.not_taken) == {*INTERFACE.inputs, *INTERFACE.options} - {"Q", "K", "V"}
    assert signature.not_taken["softcap"] == "no such parameter; always None"
    assert signature.not_taken["causal_alignment"] == "fixed to 'top_left' as declared"


def test_a_case_with_an_input_or_option_that_is_not_taken_cannot_be_posed() -> None:
    signature = bound(lambda q, k, v, causal=False: None, declares={"causal_alignment": "top_left"}).signature
    plain = frozenset({"Q", "K", "V"})
    assert missing(signature, INTERFACE, plain, {"causal": True}) is None
    assert missing(signature, INTERFACE, plain | {"bias"}, {}) == "bias: no such parameter"
    assert missing(signature, INTERFACE, plain, {"softcap": 2.0}) == "softcap=2.0: no such parameter; always None"
    assert missing(signature, INTERFACE, plain, {"softcap": None}) is None, "the default needs no parameter"
    assert missing(signature, INTERFACE, plain, {"causal_alignment": "top_left"}) is None
    assert missing(signature, INTERFACE, plain, {"causal_alignment": "bottom_right"}) is not None


def test_what_a_candidate_refuses_by_name_or_value_cannot_be_posed() -> None:
    refuses = {"bias": "not implemented", "causal_alignment=top_left": "bottom_right only"}
    binding = bound(lambda q, k, v, bias=None, causal_alignment="bottom_right": None, refuses=refuses)
    plain = frozenset({"Q", "K", "V"})
    assert "bias" not in binding.signature.inputs
    assert missing(binding.signature, INTERFACE, plain | {"bias"}, {}) == "bias: not implemented"
    told = missing(binding.signature, INTERFACE, plain, {"causal_alignment": "top_left"})
    assert told == "causal_alignment=top_left: bottom_right only"


def test_a_required_optional_input_rules_out_the_cases_without_it() -> None:
    signature = bound(lambda q, k, v, bias: None).signature
    assert signature.required == {"K", "V", "bias"}
    assert missing(signature, INTERFACE, frozenset({"Q", "K", "V"}), {}) == "without bias: the function requires it"


def test_layouts_permute_the_four_axes_of_queries_keys_values_and_outputs_only() -> None:
    binding = bound(lambda q, k, v, bias=None: None, layout="bihd", layouts={"LSE": "bih"})
    assert binding.axes_order("Q") == binding.axes_order("K") == binding.axes_order("O") == (0, 2, 1, 3)
    assert binding.axes_order("bias") == (0, 1, 2, 3)
    assert binding.axes_order("LSE") == (0, 2, 1)


@pytest.mark.parametrize(
    ("stated", "names"),
    [(None, ("Q", "K", "V", "bias")), (False, ()), (("Q", "V"), ("Q", "V"))],
)
def test_gradients_are_asked_for_what_is_taken_and_stated(stated: Any, names: tuple[str, ...]) -> None:
    kernel = Candidate(function=lambda q, k, v, bias=None: None, name="kernel", differentiable=stated)
    assert bind(kernel, INTERFACE).signature.differentiable == names


def test_numpy_without_a_backward_function_has_no_gradients() -> None:
    assert bound(lambda q, k, v: None).signature.differentiable == ()
    assert bound(lambda q, k, v: None, backward=lambda dO, q, k, v: None).signature.differentiable == ("Q", "K", "V")


ARRAY = np.zeros((1, 2, 3, 4), dtype=np.float32)
KERNEL = Candidate(function=len, name="kernel", framework="numpy")
TWO = Candidate(function=len, name="kernel", framework="numpy", outputs=("O", "LSE"))


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (ARRAY, ["O"]),
        ((ARRAY, ARRAY), ["O", "LSE"]),
        ([ARRAY], ["O"]),
        ({"out": ARRAY, "softmax_lse": ARRAY}, ["O", "LSE"]),
        ({"lse": ARRAY, "o": ARRAY}, ["LSE", "O"]),
    ],
)
def test_results_are_named(result: Any, names: list[str]) -> None:
    assert list(unpack(result, ("O", "LSE"), KERNEL)) == names


def test_a_value_that_is_not_judged_is_left_out() -> None:
    three = Candidate(function=len, name="kernel", framework="numpy", outputs=("O", "_", "LSE"))
    assert list(unpack((ARRAY, "state", ARRAY), ("O", "LSE"), three)) == ["O", "LSE"]


@pytest.mark.parametrize(
    ("result", "candidate", "told"),
    [
        (None, KERNEL, "returned None for O, expected a NumPy array"),
        (3.0, KERNEL, "returned a float for O, expected a NumPy array"),
        ((ARRAY,) * 3, KERNEL, "returned 3 values, expected 2: O, LSE"),
        (ARRAY, TWO, "returned a numpy.ndarray, expected 2 values: O, LSE"),
        ((ARRAY,), TWO, "returned 1 values, expected 2: O, LSE"),
        ({"LSE": ARRAY}, KERNEL, "returned no O"),
        ({"O": ARRAY, "P": ARRAY}, KERNEL, "returned an unknown output 'P'; expected O, LSE"),
        ((), KERNEL, "returned no O"),
    ],
)
def test_a_wrong_kind_of_result_is_told(result: Any, candidate: Candidate, told: str) -> None:
    with pytest.raises(WrongResultError) as caught:
        unpack(result, ("O", "LSE"), candidate)
    assert str(caught.value) == told


@pytest.mark.parametrize(
    ("shape", "dtype", "first", "told"),
    [
        ((1, 2, 3, 4), "fp32", True, None),
        ((1, 2, 4, 3), "fp32", True, "O has shape (1, 2, 3, 4), expected (1, 2, 4, 3)"),
        ((1, 2, 3, 4), "fp16", True, "O is fp32, expected fp16"),
        ((1, 2, 3, 4), "fp16", False, None),
        ((1, 2, 3, 4), "fp64", False, "O is fp32, expected fp64 or a more precise type"),
    ],
)
def test_shape_and_dtype_of_a_result_are_checked(shape: Any, dtype: str, first: bool, told: str | None) -> None:
    def checked() -> None:
        check("O", ARRAY, shape=shape, dtype=dtype, device="cpu", candidate=KERNEL, first=first, order=(0, 1, 2, 3))

    if told is None:
        checked()
        return
    with pytest.raises(WrongResultError) as caught:
        checked()
    assert str(caught.value) == told
