"""attnspec: the equations of attention mechanisms as data, and the suite that judges kernels against them.

    attnspec.load("softmax_attention")      a mechanism: evaluate it, its gradients, read its equations
    attnspec.mechanisms()                   the names of all mechanisms
    @attnspec.candidate(...)                describe a kernel of one's own
    attnspec.check("my_module:my_kernel", mechanism="softmax_attention")    judge one; gives a Report
    raise attnspec.Unsupported(...)         what a kernel does with a case that it cannot compute

The names below are loaded on first use: importing this package imports nothing else, not even NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnspec.conformance.api import CannotJudgeError, check
    from attnspec.conformance.candidate import CandidateError, candidate
    from attnspec.conformance.types import Case, CaseResult, Report, Unsupported
    from attnspec.spec import EvaluationError, Mechanism, SpecError, load, mechanisms

    __version__: str

_HOME = {
    "CandidateError": "attnspec.conformance.candidate",
    "CannotJudgeError": "attnspec.conformance.api",
    "Case": "attnspec.conformance.types",
    "CaseResult": "attnspec.conformance.types",
    "EvaluationError": "attnspec.spec",
    "Mechanism": "attnspec.spec",
    "Report": "attnspec.conformance.types",
    "SpecError": "attnspec.spec",
    "Unsupported": "attnspec.conformance.types",
    "candidate": "attnspec.conformance.candidate",
    "check": "attnspec.conformance.api",
    "load": "attnspec.spec",
    "mechanisms": "attnspec.spec",
}

__all__ = [
    "CandidateError",
    "CannotJudgeError",
    "Case",
    "CaseResult",
    "EvaluationError",
    "Mechanism",
    "Report",
    "SpecError",
    "Unsupported",
    "__version__",
    "candidate",
    "check",
    "load",
    "mechanisms",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("attnspec")
        except PackageNotFoundError:
            value = "0+unknown"
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public: {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
