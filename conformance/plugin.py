"""The pytest plugin: `pytest --attnspec my_kernels.py` judges each case as an item."""

from __future__ import annotations
