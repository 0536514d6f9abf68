"""`python -m attnspec`, and the console script `attnspec`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line on `sys.argv`; the value is the process's exit code."""
    from attnspec.conformance.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
