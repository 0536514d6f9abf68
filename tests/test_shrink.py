"""Shrinking finds the smallest failing case, and only ever returns cases that were seen to fail."""

from __future__ import annotations

from collections.abc import Callable

from attnspec.conformance.shrink import reductions, shrink
from attnspec.conformance.types import Case
from attnspec.tests import fakes


def named(case: Case) -> Case:
    """An id that tells cases apart; what `case_id.renamed` does for real ones."""
    from dataclasses import replace

    return replace(case, id=f"{dict(case.sizes)}{dict(case.options)}{case.inputs}{case.values}{case.layout}")


BIG = fakes.case(
    sizes={"B": 2, "H": 8, "Hk": 4, "N": 131, "M": 300, "D": 64, "E": 64},
    options={"causal": True, "window_left": 40, "softcap": 5.0},
    inputs=("bias", "mask"),
    values="large",
    layout="strided",
)


def smallest(fails: Callable[[Case], bool], case: Case = BIG, **keywords: object) -> Case:
    seen: list[Case] = []

    def still_fails(candidate: Case) -> bool:
        seen.append(candidate)
        return fails(candidate)

    found = shrink(case, still_fails, 5.0, rename=named, **keywords)  # type: ignore[arg-type]
    assert found is case or (found in seen and fails(found))
    return found


def test_a_failure_everywhere_shrinks_to_the_smallest_plainest_case() -> None:
    found = smallest(lambda case: True)
    assert set(found.sizes.values()) == {1}
    assert (found.options, found.inputs, found.values, found.layout) == ({}, (), "normal", "contiguous")


def test_a_tile_edge_is_found_exactly() -> None:
    found = smallest(lambda case: case.sizes["M"] > 64)
    assert found.sizes["M"] == 65
    assert {name: size for name, size in found.sizes.items() if name != "M"} == dict.fromkeys(
        ("B", "H", "Hk", "N", "D", "E"), 1
    )


def test_an_odd_threshold_is_found_exactly() -> None:
    assert smallest(lambda case: case.sizes["N"] >= 37).sizes["N"] == 37


def test_sizes_that_hang_together_shrink_together() -> None:
    found = smallest(lambda case: case.sizes["H"] == 2 * case.sizes["Hk"] and case.sizes["D"] == case.sizes["E"])
    assert (found.sizes["H"], found.sizes["Hk"], found.sizes["D"]) == (2, 1, 1)


def test_what_the_failure_needs_is_kept() -> None:
    found = smallest(lambda case: "window_left" in case.options and "mask" in case.inputs and case.values == "large")
    assert found.options == {"window_left": 1}
    assert (found.inputs, found.values, found.layout) == (("mask",), "large", "contiguous")


def test_shrinking_is_deterministic() -> None:
    def fails(case: Case) -> bool:
        return case.sizes["N"] * case.sizes["M"] > 500 and "causal" in case.options

    assert smallest(fails) == smallest(fails)


def test_a_case_that_cannot_shrink_comes_back_as_it_is() -> None:
    assert smallest(lambda case: False) is BIG


def test_a_change_without_a_case_is_not_tried() -> None:
    tried: list[Case] = []

    def still_fails(case: Case) -> bool:
        tried.append(case)
        return True

    found = shrink(BIG, still_fails, 5.0, rename=lambda case: named(case) if case.sizes["B"] == 2 else None)
    assert found.sizes["B"] == 2 and all(case.sizes["B"] == 2 for case in tried)


def test_no_attempt_starts_after_the_budget() -> None:
    now = [0.0]
    attempts = []

    def still_fails(case: Case) -> bool:
        attempts.append(case)
        now[0] += 2.0
        return True

    shrink(BIG, still_fails, 5.0, rename=named, clock=lambda: now[0])
    assert len(attempts) == 3


def test_sampled_rows_are_given_up_when_the_sizes_change() -> None:
    case = fakes.case(rows={"i": (0, 4)})
    smaller = [entry for entry in reductions(case) if entry.sizes != case.sizes]
    assert smaller and all(entry.rows is None for entry in smaller)
    assert all(entry.rows == case.rows for entry in reductions(case) if entry.sizes == case.sizes)
