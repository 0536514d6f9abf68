"""LASP-2 over two processes that hold half of the sequence each equals the whole sequence in one process."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

RANKS = 2
CASES: dict[str, dict[str, Any]] = {
    "decay": {"feature_map": "silu"},
    "all": {"causal": False},
    "softmax": {"layer": "softmax"},
    "softmax_all": {"layer": "softmax", "causal": False},
}
TIMEOUT = 300.0
"""Seconds; two processes import PyTorch, which takes most of the time."""


def inputs(case: str) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    Q, K, V = (torch.randn(1, 2, 8, width, generator=g) for width in (4, 4, 3))
    return [Q, K, V, torch.tensor([0.1, 0.7]) if case == "decay" else None]


def rank_part(rank: int, folder: Path) -> None:
    """What one process does: its half of the tokens, with a file as the meeting place instead of a port."""
    import datetime

    import torch.distributed as dist

    from attnspec.impls.lasp import lasp2_rank

    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    found = {}
    for case, options in CASES.items():
        Q, K, V, s = inputs(case)
        Q, K, V = (x.tensor_split(RANKS, 2)[rank] for x in (Q, K, V))
        found[case] = lasp2_rank(Q, K, V, s, **options)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    from attnspec.impls.lasp import lasp2

    command = [sys.executable, "-m", "attnspec.tests.test_lasp2_distributed"]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(RANKS)
    ]
    try:
        said = [rank.communicate(timeout=TIMEOUT)[0].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * RANKS, said
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for case, options in CASES.items():
        want, states = lasp2(*inputs(case), devices=RANKS, **options)
        got = torch.cat([part[case][0] for part in parts], 2)
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-6), case
        own = torch.stack([part[case][1] for part in parts], 1)
        assert torch.allclose(own, states, rtol=1e-6, atol=1e-6), case
        # One process alone knows only its half: the exchange is seen.
        Q, K, V, s = inputs(case)
        alone, _ = lasp2(Q[:, :, 4:], K[:, :, 4:], V[:, :, 4:], s, **options)
        assert not torch.allclose(got[:, :, 4:], alone, atol=1e-2), case


if __name__ == "__main__":
    rank_part(int(sys.argv[1]), Path(sys.argv[2]))
