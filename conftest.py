"""Before any test module is imported: Triton decides at its import whether it interprets, and others import it too."""

from __future__ import annotations

import importlib.util
import os


def _accelerator() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


if not _accelerator():
    os.environ.setdefault("TRITON_INTERPRET", "1")
