"""Lists the functions of a file that @attnspec.candidate describes: `python -m attnspec.conformance.described FILE`.

Runs in a process of its own, because importing a stranger's file can do anything. Prints a JSON array of names; a file
that cannot be imported ends it with one line on standard error. Used by the pytest plugin.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from attnspec.conformance.candidate import CandidateError, described

SECONDS = 300.0


def names_in(path: str | Path) -> list[str]:
    """The described functions of a file, in its order, found in another process.

    Raises:
        CandidateError: no such file, not importable, or importing it does not end.
    """
    if not Path(path).is_file():
        raise CandidateError(f"{path}: no such file")
    command = [sys.executable, "-P", "-m", "attnspec.conformance.described", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise CandidateError(f"{path}: importing it did not end within {SECONDS:g} s") from None
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode or not last.startswith("["):
        told = (done.stderr.strip().splitlines() or [f"importing it ended with exit code {done.returncode}"])[-1]
        raise CandidateError(told if str(path) in told else f"{path}: {told}")
    found: list[str] = json.loads(last)
    return found


def main(path: str) -> int:
    """Import the file and print the names."""
    from attnspec.conformance.finding import load_file

    try:
        module = load_file(path)
    except CandidateError as error:
        print(error, file=sys.stderr)
        return 1
    own = [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__ and described(value) is not None
    ]
    print(json.dumps(own), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
