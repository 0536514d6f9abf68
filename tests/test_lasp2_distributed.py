"""LASP-2 over two processes that hold half of the sequence each equals the whole sequence in one process.

What the processes exchange is counted: one all-gather of states in a linear layer, of keys and of values in a
softmax layer.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported anywhere

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

RANKS = 2
OTHERS = (
    "all_gather_into_tensor", "all_reduce", "all_to_all", "all_to_all_single", "batch_isend_irecv", "broadcast",
    "gather", "irecv", "isend", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip
"""Collectives that no rank calls."""
CASES: dict[str, dict[str, Any]] = {
    "decay": {"feature_map": "silu"},
    "all": {"causal": False},
    "softmax": {"layer": "softmax"},
    "softmax_all": {"layer": "softmax", "causal": False},
}
SENT = {"decay": [24], "all": [24], "softmax": [48, 36], "softmax_all": [48, 36]}
"""Numbers that a rank sends, one entry a call: 2 heads times 4 x 3 of a state, or times its 6 keys, then 6 values."""
TIMEOUT = 300.0
"""Seconds; two processes import PyTorch, which takes most of the time."""


def inputs(case: str) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    Q, K, V = (torch.randn(1, 2, 12, width, generator=g) for width in (4, 4, 3))
    return [Q, K, V, torch.tensor([0.1, 0.7]) if case == "decay" else None]


def counted(collective: Callable[..., Any], sent: list[int]) -> Callable[..., Any]:
    """An all-gather that notes the numbers which this rank sends."""

    def call(found: Any, own: Any, **options: Any) -> Any:
        sent.append(own.numel())
        return collective(found, own, **options)

    return call


def refused(*_: Any, **__: Any) -> None:
    raise AssertionError("LASP-2 needs all-gathers alone")


def rank_part(rank: int, folder: Path) -> None:
    """What one process does: its half of the tokens, with a file as the meeting place instead of a port."""
    import datetime

    import torch.distributed as dist

    from attnspec.impls.lasp import lasp2_rank

    sent: list[int] = []
    dist.all_gather = counted(dist.all_gather, sent)
    for other in OTHERS:
        setattr(dist, other, refused)

    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    found = {}
    for case, options in CASES.items():
        Q, K, V, s = inputs(case)
        Q, K, V = (x.tensor_split(RANKS, 2)[rank] for x in (Q, K, V))
        sent.clear()
        found[case] = (*lasp2_rank(Q, K, V, s, **options), list(sent))
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
        assert [part[case][2] for part in parts] == [SENT[case]] * RANKS, case
        # One process alone knows only its half: the exchange is seen.
        Q, K, V, s = inputs(case)
        alone, _ = lasp2(Q[:, :, 6:], K[:, :, 6:], V[:, :, 6:], s, **options)
        assert not torch.allclose(got[:, :, 6:], alone, atol=1e-2), case


if __name__ == "__main__":
    rank_part(int(sys.argv[1]), Path(sys.argv[2]))
