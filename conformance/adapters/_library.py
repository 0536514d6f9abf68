"""What all adapters share: loading a library late, naming its version, and telling a refusal from a failure.

Used by the other modules of this package. A library that is not installed is a `CandidateError` (exit code 2), not a
failing case.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from attnspec.conformance.candidate import CandidateError
from attnspec.conformance.types import Unsupported

MECHANISM = "softmax_attention"


def library(module: str, extra: str) -> Any:
    """Import a module of an optional library.

    Args:
        module: dotted name.
        extra: the extra of this distribution that installs it.

    Raises:
        CandidateError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise CandidateError(
            f"this adapter needs {missing}, which is not installed: pip install 'attnspec[{extra}]'"
        ) from error


def versions(*distributions: str) -> Callable[[], str]:
    """A function that names the installed versions, as `torch 2.13.0, triton 3.9.0`."""

    def text() -> str:
        found = []
        for name in distributions:
            try:
                found.append(f"{name} {importlib.metadata.version(name)}")
            except importlib.metadata.PackageNotFoundError:
                found.append(f"{name} not installed")
        return ", ".join(found)

    return text


@contextmanager
def refusals(texts: Mapping[type[Exception], tuple[str, ...]]) -> Iterator[None]:
    """Turn the library's own refusals into `Unsupported`; every other exception passes through as it is.

    Args:
        texts: by exception type, the pieces of text by which the library's message is known to be a refusal.
    """
    try:
        yield
    except tuple(texts) as error:
        message = str(error)
        for kind, pieces in texts.items():
            known = [piece for piece in pieces if piece in message]
            if isinstance(error, kind) and known:
                raise Unsupported(_sentence(message, known[0])) from error
        raise


def _sentence(message: str, piece: str) -> str:
    """The sentence of a library's message that says why."""
    sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.:])\s|\n", message)]
    return next((part for part in sentences if piece in part), " ".join(message.split()))


def one_of(what: str, **given: Any) -> None:
    """Refuse a case that fills the library's single slot twice: `one_of("attn_mask", bias=bias, mask=mask)`."""
    present = [name for name, value in given.items() if value is not None and value is not False]
    if len(present) > 1:
        raise Unsupported(f"the library has one {what}: it takes no {' together with '.join(present)}")
