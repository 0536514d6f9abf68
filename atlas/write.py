"""Writing the atlas: `attnspec atlas --out DIR`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from attnspec.atlas.index import index
from attnspec.atlas.page import page
from attnspec.conformance.report.files import FileError, write
from attnspec.spec import load, mechanisms

STYLE = "atlas.css"


def write_atlas(
    out: str | Path, names: Iterable[str] | None = None, progress: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Write the index, the style sheet and the pages of `names` (all mechanisms by default); returns the files.

    The same mechanism files give the same bytes. The folder is made; files of other names in it are left alone.

    Raises:
        SpecError: an unknown mechanism.
        NoTorchError: PyTorch is not installed.
        FileError: the folder cannot be made or written to.
    """
    folder = Path(out)
    every = [load(name) for name in mechanisms()]
    chosen = every if names is None else [load(name) for name in names]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write {out}: {error.strerror or error}") from None
    content = {STYLE: Path(__file__).with_name(STYLE).read_text(encoding="utf-8"), "index.html": index(every)}
    for number, mechanism in enumerate(chosen):
        if progress is not None:
            progress(number, len(chosen))
        content[f"{mechanism.name}.html"] = page(mechanism, every)
    for name, text in content.items():
        write(folder / name, text)
    return [folder / name for name in content]
