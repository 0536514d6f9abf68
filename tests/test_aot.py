"""The ahead-of-time compiler: a subset compiles for every target, what does not fit is rejected, the committed table is
complete and fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from attnspec.impls.aot import SHARED_LIMIT, TARGETS, Record, markdown, parse_target
from attnspec.impls.aot_variants import variants

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter: this process may have loaded Triton for its interpreter, where nothing can be compiled.

    Without a GPU the engines switch the interpreter on, unless the variable says otherwise.
    """
    clean = dict(os.environ) | {"TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True, text=True, env=clean | environment, timeout=300, check=False,
    )  # fmt: skip


def judged(*variants: tuple[str, str]) -> list[dict[str, Any]]:
    """Records of (expression of a Variant, target), all compiled in one process."""
    program = (
        "import json, dataclasses\n"
        "from attnspec.impls.aot import judge\n"
        "from attnspec.impls.aot_variants import Variant\n"
        "from attnspec.impls.engines.softmax_configs import TileConfig\n"
        f"work = [{', '.join(f'({expression}, {target!r})' for expression, target in variants)}]\n"
        "print(json.dumps([dataclasses.asdict(judge(v, t)) for v, t in work]))\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    records: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return records


MATRIX = {"cuda:80": "HMMA", "cuda:90": "HGMMA", "cuda:100": "UTCHMMA", "hip:gfx942": "v_mfma"}


@pytest.mark.slow
def test_kernels_compile_for_every_target_with_its_matrix_instructions_and_without_spills() -> None:
    forward = 'Variant("forward", "causal", "bf16", 64, 64, TileConfig(64, 64, 4, 2))'
    keys = 'Variant("dkv", "lengths", "fp16", 32, 32, TileConfig(64, 32, 4, 1))'
    records = judged(*((forward, target) for target in TARGETS), (keys, "cuda:80"), (keys, "hip:gfx942"))
    for record in records:
        assert record["ok"], record
        assert 0 < record["registers"] <= 512 and record["shared"] > 0 and record["spills"] == 0
    for record in records[:4]:
        assert record["mix"].get(MATRIX[record["target"]], 0) > 0, record
    for record in records[:3]:
        assert record["mix"].get("LDGSTS", 0) > 0, "no asynchronous copies"


def test_a_kernel_that_spills_or_takes_too_much_shared_memory_is_rejected() -> None:
    spilling = 'Variant("dkv", "everything", "bf16", 64, 64, TileConfig(64, 64, 4, 1))'
    large = 'Variant("forward", "causal", "bf16", 128, 128, TileConfig(64, 64, 4, 4))'
    spill, shared = judged((spilling, "cuda:80"), (large, "hip:gfx942"))
    assert not spill["ok"] and "spills" in spill["problem"] and spill["spills"] > 0
    assert not shared["ok"] and "shared memory" in shared["problem"] and shared["shared"] > 65536


def test_the_command_reports_and_exits_as_documented(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    done = python(
        "-m", "attnspec.impls.aot", "--targets", "cuda:90", "--jobs", "1", "--only", "merge-plain-bf16-64x64",
        "--json", str(target), "--markdown", str(tmp_path / "out.md"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 binaries for cuda:90: 1 fit, 0 do not\n"
    (record,) = json.loads(target.read_text())["records"]
    assert record["variant"] == "merge-plain-bf16-64x64" and record["ok"]
    assert "| merge-plain-bf16-64x64 |" in (tmp_path / "out.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--targets", "cuda:70"], {}, "unknown target 'cuda:70'; known: cuda:80"),
        (["--only", "no-such-kernel"], {}, "no variant's name contains 'no-such-kernel'"),
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
    ],
    ids=["target", "only", "interpreter"],
)
def test_what_cannot_be_compiled_exits_with_2(arguments: list[str], environment: dict[str, str], message: str) -> None:
    done = python("-m", "attnspec.impls.aot", *arguments, **environment)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def table() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((ROOT / "perf/results/aot_softmax.json").read_text())
    return read


def test_the_committed_table_holds_every_documented_variant_for_every_target_and_each_fits_without_a_spill() -> None:
    committed = table()
    assert committed["limits"] == SHARED_LIMIT
    documented = [(v.name, target) for target in TARGETS for v in dict.fromkeys(variants(parse_target(target)))]
    assert len(documented) == len(set(documented)) > 0
    assert [(r["variant"], r["target"]) for r in committed["records"]] == documented
    for record in committed["records"]:
        assert record["ok"] and not record["problem"], record
        assert record["registers"] > 0 and record["mix"] and record["spills"] == record["stack"] == 0, record
        assert record["shared"] <= SHARED_LIMIT[record["target"]], record


def test_the_page_is_what_the_committed_table_renders_to() -> None:
    committed = table()
    records = [Record(**record) for record in committed["records"]]
    assert (ROOT / "docs/aot.md").read_text() == markdown(records, committed["about"])


def recorded(folder: Path, *programs: str) -> subprocess.CompletedProcess[str]:
    """A program that keeps the records of eca_channel_attention in a folder of its own."""
    start = (
        "from pathlib import Path\n"
        "from attnspec.impls import aot, aot_record\n"
        f"aot_record.RESULTS, aot_record.PAGE = Path({str(folder)!r}), Path({str(folder / 'page.md')!r})\n"
        "def run(what):\n"
        "    print('exit', aot.main([what, '--mechanism', 'eca_channel_attention', '--only', 'fp32',\n"
        "        '--targets', 'cuda:90,hip:gfx942', '--jobs', '1']))\n"
    )
    done = python("-c", start + "\n".join(programs))
    assert done.returncode == 0, done.stderr
    return done


NO_COMPILER = "def fails(*a): raise AssertionError('compiled again')\naot_record.judge_launch = fails"


def test_records_are_kept_and_what_has_one_is_not_compiled_again(tmp_path: Path) -> None:
    done = recorded(tmp_path, "run('--check'); run('--record'); run('--check')", NO_COMPILER, "run('--record')")
    lines = done.stdout.splitlines()
    assert sum(line.endswith(": not recorded") for line in lines) == 4
    assert [line for line in lines if line.startswith("exit")] == ["exit 1", "exit 0", "exit 0", "exit 0"]
    assert lines.count("4 binaries recorded: 4 fit, 0 do not") == 2
    kept = json.loads((tmp_path / "aot.eca_channel_attention.json").read_text())
    assert len(kept["binaries"]) == 4 and all(b["registers"] > 0 and len(b["inputs"]) == 16 for b in kept["binaries"])
    page = (tmp_path / "page.md").read_text()
    assert "| eca_channel_attention | cuda:90 | 2 |" in page
    assert "| eca_channel_attention | cuda:80 | 0 | | | | | | | not compiled |" in page


def test_a_changed_record_is_told_and_one_of_another_triton_is_not_mixed_in(tmp_path: Path) -> None:
    change = (
        "import json\n"
        f"path = Path({str(tmp_path / 'aot.eca_channel_attention.json')!r})\n"
        "kept = json.loads(path.read_text())\n"
        "kept['binaries'][0]['inputs'] = '0' * 16\n"
        "kept['binaries'][1]['problem'] = '8 spills, 32 bytes of stack'\n"
        "path.write_text(json.dumps(kept)); run('--check')\n"
        "path.write_text(json.dumps(kept | {'triton': '1.0'})); run('--record')\n"
    )
    done = recorded(tmp_path, "run('--record')", change)
    assert [line for line in done.stdout.splitlines() if line.startswith("exit")] == ["exit 0", "exit 1", "exit 2"]
    assert ": changed since it was recorded" in done.stdout and ": 8 spills, 32 bytes of stack" in done.stdout
    assert "is of Triton 1.0" in done.stderr


def test_a_known_exception_passes_while_it_does_not_fit_and_no_longer(tmp_path: Path) -> None:
    change = (
        "import json\n"
        f"path = Path({str(tmp_path / 'aot.eca_channel_attention.json')!r})\n"
        "kept = json.loads(path.read_text())\n"
        "first, second = kept['binaries'][:2]\n"
        "first['problem'], first['spills'] = '99 spills, 99 bytes of stack', 99\n"
        "path.write_text(json.dumps(kept)); run('--check')\n"
        "first, second = (b['target'] + ' ' + b['variant'] for b in (first, second))\n"
        "for excused in ({first: (99, 'why')}, {first: (98, 'why')}, {first: (99, 'why'), second: (1, 'why')}):\n"
        "    aot_record.known = lambda: excused; run('--check')\n"
        "kept['binaries'][0]['problem'] += '; 999999 bytes of shared memory'\n"
        "path.write_text(json.dumps(kept)); aot_record.known = lambda: {first: (99, 'why')}; run('--check')\n"
    )
    done = recorded(tmp_path, "run('--record')", change)
    exits = [line for line in done.stdout.splitlines() if line.startswith("exit")]
    assert exits == ["exit 0", "exit 1", "exit 0", "exit 1", "exit 1", "exit 1"]
    assert done.stdout.count(": 99 spills") == 3 and done.stdout.count(": fits; it is no known exception any more") == 1


MODULE = """
import triton
import triton.language as tl
SIZE = tl.constexpr({size})
@triton.jit
def helper(x):
    {comment}
    return x {sign} SIZE
@triton.jit
def kernel(X):
    {comment}
    tl.store(X, helper(tl.load(X)))
"""
MODULES: dict[str, dict[str, Any]] = {
    "plain": {}, "comment": {"comment": "'''Words.'''  # and more"}, "helper": {"sign": "-"}, "size": {"size": 2},
}  # fmt: skip


def test_a_digest_is_of_what_is_compiled_and_not_of_comments(tmp_path: Path) -> None:
    for name, change in MODULES.items():
        (tmp_path / f"{name}_kernels.py").write_text(MODULE.format(**{"size": 1, "comment": "", "sign": "+"} | change))
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import importlib, torch\n"
        "from attnspec.impls.aot_record import digest\n"
        "from attnspec.impls.engines.launch import Launch\n"
        f"for name in {list(MODULES)!r}:\n"
        "    kernel = importlib.import_module(name + '_kernels').kernel\n"
        "    kernel.fn.__module__ = kernel.fn.__globals__['helper'].fn.__module__ = 'm'\n"
        "    for dtype in (torch.float16, torch.float32):\n"
        "        print(name, dtype, digest(Launch('k', kernel, 1, {'X': torch.zeros(1, dtype=dtype)}), 'cuda:90'))\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    found = {(name, dtype): key for name, dtype, key in (line.split() for line in done.stdout.splitlines())}
    for dtype in ("torch.float16", "torch.float32"):
        assert found["plain", dtype] == found["comment", dtype]
    assert len(set(found.values())) == 6


@pytest.mark.slow
def test_every_kernel_of_every_mechanism_has_a_record_as_it_is_now_and_fits() -> None:
    done = python("-m", "attnspec.impls.aot", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_of_the_mechanisms_is_what_their_records_render_to() -> None:
    from attnspec.impls import aot_record

    assert aot_record.PAGE.read_text(encoding="utf-8") == aot_record.page(aot_record.recorded())
