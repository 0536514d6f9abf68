"""Writing files so that a reader never sees half of one.

Every report, manifest and vector file goes through `write`. It refuses a path whose folder is missing or not writable
with one line, and leaves an existing file as it was when anything fails.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class FileError(ValueError):
    """A file cannot be read or written. One line: which file, and why."""


def write(path: str | Path, content: str | bytes) -> None:
    """Replace the file's content in one step: a temporary file beside it, then a rename.

    Raises:
        FileError: the folder does not exist or cannot be written to.
    """
    target = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(_mode(target))
        Path(name).replace(target)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FileError(f"cannot write {path}: {error.strerror or error}") from None
        raise


def check_writable(path: str | Path) -> None:
    """Refuse an output path before minutes of work are spent on its content.

    Raises:
        FileError: the folder is missing or closed to us, or the path is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise FileError(f"cannot write {path}: it is a folder")
    if not target.parent.is_dir():
        raise FileError(f"cannot write {path}: there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise FileError(f"cannot write {path}: the folder {target.parent} is not writable")


def _mode(target: Path) -> int:
    """Permissions of the file that is replaced, or those that a plain `open` would have given a new one."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
