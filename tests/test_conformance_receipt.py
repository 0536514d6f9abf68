"""The receipt knows whether the candidate's own function ran, and whether the oracle was asked instead."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
import types
from typing import Any

import numpy as np
import pytest

from attnspec.conformance import receipt
from attnspec.conformance.receipt import Watch, instrument, oracle_name


def kernel(times: int = 1) -> int:
    return sum(helper() for _ in range(times))


def helper() -> int:
    return 1


def fixture() -> dict[str, Any]:
    Q = np.array([[[[1.0, 0.0]]]])
    return {"Q": Q, "K": np.array([[[[1.0, 0.0], [0.0, 1.0]]]]), "V": np.array([[[[1.0], [2.0]]]])}


def by_the_spec() -> Any:
    from attnspec.spec import load

    return load("softmax_attention").evaluate(fixture())


def by_the_reference() -> Any:
    from attnspec.reference.softmax_attention import softmax_attention

    return softmax_attention(*fixture().values())


def test_the_entries_of_the_function_are_counted() -> None:
    with Watch(kernel) as watch:
        kernel()
    assert (watch.entered, watch.oracle_calls, watch.complete) == (1, [], True)
    with Watch(kernel) as watch:
        helper()
    assert watch.entered == 0, "another function ran instead"


def test_a_function_without_python_code_has_no_entries_to_count() -> None:
    with Watch(len) as watch:
        len("abc")
    assert watch.entered is None


@pytest.mark.parametrize(
    ("asks", "told"),
    [
        (by_the_spec, "attnspec.spec.mechanism.Mechanism.evaluate"),
        (by_the_reference, "attnspec.reference.softmax_attention.softmax_attention"),
    ],
)
def test_asking_the_oracle_is_seen(asks: Any, told: str) -> None:
    with Watch(asks, budget=None) as watch:
        asks()
    assert told in watch.oracle_calls


def test_asking_the_oracle_in_a_thread_is_seen() -> None:
    def threaded() -> None:
        thread = threading.Thread(target=by_the_reference)
        thread.start()
        thread.join()

    with Watch(threaded, budget=None) as watch:
        threaded()
    assert any("reference" in name for name in watch.oracle_calls)


def test_importing_the_oracle_is_not_asking_it() -> None:
    def imports() -> Any:
        return importlib.reload(importlib.import_module("attnspec.spec.language.formats"))

    with Watch(imports) as watch:
        imports()
    assert watch.oracle_calls == []


def test_code_of_other_rooms_is_no_oracle() -> None:
    from attnspec.conformance import bridges

    assert oracle_name(bridges.narrow.__code__) is None
    assert oracle_name(kernel.__code__) is None


def test_a_budget_ends_the_watching_where_watching_is_slow_and_this_is_told() -> None:
    monitored = sys.version_info >= (3, 12)
    with Watch(kernel, budget=10) as watch:
        kernel(1000)
        by_the_reference()
    assert watch.complete == monitored and bool(watch.oracle_calls) == monitored
    with Watch(kernel, budget=None) as watch:
        kernel(1000)
        by_the_reference()
    assert watch.complete and watch.oracle_calls


def test_a_profiler_that_was_there_before_is_put_back() -> None:
    def profiler(*_: Any) -> None: ...

    sys.setprofile(profiler)
    try:
        with Watch(kernel):
            kernel()
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)


def test_instrumented_functions_report_from_threads_that_were_there_before() -> None:
    source = importlib.import_module("attnspec.reference.softmax_attention")
    module = types.ModuleType(source.__name__)
    module.softmax_attention = types.FunctionType(  # type: ignore[attr-defined]
        source.softmax_attention.__code__, vars(source), "softmax_attention",
        source.softmax_attention.__defaults__, source.softmax_attention.__closure__,
    )  # fmt: skip
    module.softmax_attention.__kwdefaults__ = source.softmax_attention.__kwdefaults__
    instrument(module)
    ready, go = threading.Event(), threading.Event()

    def wait_and_ask() -> None:
        ready.set()
        go.wait(10)
        module.softmax_attention(*fixture().values())

    thread = threading.Thread(target=wait_and_ask)
    thread.start()
    ready.wait(10)
    with Watch(kernel) as watch:
        go.set()
        thread.join()
    assert watch.oracle_calls == ["attnspec.reference.softmax_attention.softmax_attention"]


def test_guarded_imports_wrap_the_oracle_before_anyone_can_alias_it() -> None:
    script = (
        "from attnspec.conformance import receipt\n"
        "receipt.guard_imports(); receipt.guard_imports()\n"
        "from attnspec.spec.mechanism import Mechanism\n"
        "from attnspec.spec.language import evaluate\n"
        "from attnspec.reference.softmax_attention import softmax_attention\n"
        "import sys\n"
        "print(*(hasattr(f, '__wrapped__') for f in (Mechanism.evaluate, evaluate, softmax_attention)))\n"
        "print(sum(type(f).__name__ == '_Finder' for f in sys.meta_path))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["True", "True", "True", "1"]


def test_nothing_is_watched_after_the_call() -> None:
    with Watch(kernel):
        kernel()
    by_the_reference()
    assert not receipt._current
