"""The command line: what it prints where, its exit codes, and one clear line for each kind of bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from attnspec.conformance import cli, outcome
from attnspec.conformance.report import json_report
from attnspec.spec import mechanisms

KERNELS = '''
"""Kernels for the tests of the command line; NumPy, so that the worker starts quickly."""
import numpy as np
import attnspec


def attend(q, k, v, scale, keep):
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1).astype("f8"), np.repeat(v, group, 1).astype("f8")
    s = np.where(keep, scale * (q.astype("f8") @ np.swapaxes(k, -1, -2)), -np.inf)
    top = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(np.isneginf(top), 0, top))
    total = p.sum(-1, keepdims=True)
    p = np.divide(p, total, out=np.zeros_like(p), where=total > 0)
    return (p[..., None] * np.where(keep[..., None], v[:, :, None], 0)).sum(-2).astype(q.dtype)


def visible(q, k, causal, shift):
    n, m = q.shape[2], k.shape[2]
    i, j = np.arange(n)[:, None], np.arange(m)[None]
    return np.broadcast_to((j <= i + m - n + shift) | (not causal), (*q.shape[:3], m))


def told(**more):
    return attnspec.candidate(mechanism="softmax_attention", framework="numpy", dtypes=("fp32",), **more)


@told()
def right(q, k, v, causal=False, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attend(q, k, v, scale, visible(q, k, causal, 0))


@told()
def strict(q, k, v, causal=False, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attend(q, k, v, scale, visible(q, k, causal, -1))


@told()
def refusing(q, k, v):
    raise attnspec.Unsupported("nothing is supported")


def undescribed(q, k, v):
    return q
'''
SMOKE = ("--mechanism", "softmax_attention", "--level", "smoke", "--dtype", "fp32", "--direction", "forward")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("kernels")
    (made / "kernels.py").write_text(KERNELS)
    return made


def run(*arguments: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, in a process of its own, its output in pipes."""
    return subprocess.run(
        [sys.executable, "-m", "attnspec", *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


# -- list and show ----------------------------------------------------------------------------------------------------


def test_list_prints_a_line_for_each_mechanism(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == mechanisms()


def test_list_as_json_names_inputs_options_and_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--family", "softmax", "--json"]) == 0
    entry = next(e for e in json.loads(capsys.readouterr().out) if e["name"] == "softmax_attention")
    assert {"Q", "K", "V"} <= set(entry["inputs"]) and "causal" in entry["options"]
    assert entry["outputs"] == ["O", "LSE"] and "Q" in entry["gradients"]


@pytest.mark.parametrize(
    ("form", "part"),
    [
        ("text", "O[h,i,e] = sum[j : keep[h,i,j]]"),
        ("text", "scale = D ** -0.5"),
        ("text", "\nBackward\n  dP"),
        ("text", "\n  fused (default)              may round "),
        ("latex", "\\sum"),
        ("json", '"program"'),
    ],
)
def test_show_prints_the_equations(capsys: pytest.CaptureFixture[str], form: str, part: str) -> None:
    assert cli.main(["show", "softmax_attention", "--format", form]) == 0
    assert part in capsys.readouterr().out


def test_show_as_json_gives_trees_that_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    from attnspec.spec import load
    from attnspec.spec.language import from_json, to_json

    cli.main(["show", "softmax_attention", "--format", "json"])
    shown = json.loads(capsys.readouterr().out)
    assert to_json(from_json(shown["program"])) == shown["program"] == to_json(load("softmax_attention").program)
    assert "gradient" in shown


def test_show_has_the_forms_and_the_gradients_that_they_state(capsys: pytest.CaptureFixture[str]) -> None:
    from attnspec.spec import load
    from attnspec.spec.language import from_json, latex_block, to_json

    mechanism = load("gated_delta_rule")
    cli.main(["show", "gated_delta_rule"])
    shown = capsys.readouterr().out
    for name, program in mechanism.forms.items():
        assert f"Form {name}: {mechanism.form_docs[name]}\n  {program.text.strip().splitlines()[0]}" in shown
        assert f"Backward of the form {name}, where it differs" in shown
    cli.main(["show", "gated_delta_rule", "--format", "latex"])
    shown = capsys.readouterr().out
    assert all(latex_block(program) in shown for program in mechanism.forms.values())
    cli.main(["show", "gated_delta_rule", "--format", "json"])
    trees = json.loads(capsys.readouterr().out)
    for part, programs in (("forms", mechanism.forms), ("form_gradients", mechanism.form_gradients)):
        assert {name: to_json(from_json(tree)) for name, tree in trees[part].items()} == {
            name: to_json(program) for name, program in programs.items()
        }


# -- check ------------------------------------------------------------------------------------------------------------


def test_a_right_kernel_conforms_and_pipes_stay_clean(folder: Path) -> None:
    done = run("check", "kernels.py:right", *SMOKE, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("CONFORMS: ")
    assert done.stderr == "" and "\x1b" not in done.stdout


def test_a_wrong_kernel_fails_with_its_explanation_and_every_report(folder: Path) -> None:
    files = {kind: str(folder / f"report.{kind}") for kind in ("json", "junit", "markdown")}
    flags = [word for kind, path in files.items() for word in (f"--{kind}", path)]
    done = run("check", "kernels.py:strict", *SMOKE, *flags, cwd=folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("DOES NOT CONFORM: ")
    for part in ("on the diagonal j = i", "equals the spec with", "times the tolerance", "attnspec repro softmax_att"):
        assert part in done.stdout, part
    report = json_report.read_json(files["json"])
    assert report.exit_code == 1 and report.candidate == "kernels.py:strict"
    assert int(ET.parse(files["junit"]).getroot().get("failures", "0")) == len(outcome.failures(report))
    assert "does not conform" in Path(files["markdown"]).read_text()

    told = next(line for line in done.stdout.splitlines() if line.strip().startswith("repeat"))
    words = told.split()[1:]
    assert words[:2] == ["attnspec", "repro"]
    again = run(*words[1:], cwd=folder)
    assert again.returncode == 1, again.stdout + again.stderr
    assert words[2] in again.stdout


def test_a_case_that_passes_is_reproduced_with_exit_code_zero(folder: Path) -> None:
    listed = run("check", "kernels.py:right", *SMOKE, "--list-cases", cwd=folder)
    assert listed.returncode == 0
    case = listed.stdout.splitlines()[0]
    assert case.startswith("softmax_attention/")
    done = run("repro", case, "--candidate", "kernels.py:right", cwd=folder)
    assert done.returncode == 0 and "1 cases judged" in done.stdout, done.stdout + done.stderr


def test_a_kernel_that_refuses_everything_was_not_judged(folder: Path) -> None:
    done = run("check", "kernels.py:refusing", *SMOKE, cwd=folder)
    assert done.returncode == 2 and done.stdout.startswith("COULD NOT JUDGE"), done.stdout + done.stderr


def test_the_mechanism_may_come_from_the_decorator(folder: Path) -> None:
    done = run("check", "kernels.py:right", "--level", "smoke", "--select", "*/shapes/*", "--quiet", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_expectation_lists_decide_over_the_exit_code(folder: Path) -> None:
    path = folder / "expect.toml"
    path.write_text('[[xfail]]\ncase = "*/causal=true*"\nreason = "off by one"\n')
    select = ("--select", "*/options/causal=true/*", "--expect", str(path), "--no-explain")
    done = run("check", "kernels.py:strict", *SMOKE, *select, cwd=folder)
    assert done.returncode == 0 and "expected to fail" in done.stdout, done.stdout + done.stderr
    done = run("check", "kernels.py:right", *SMOKE, *select, cwd=folder)
    assert done.returncode == 1 and "XPASS" in done.stdout, done.stdout + done.stderr
    path.write_text('[[xfail]]\ncase = "*/no_such_group/*"\nreason = "stale"\n')
    done = run("check", "kernels.py:right", *SMOKE, *select, cwd=folder)
    assert done.returncode == 1 and "matches no case" in done.stdout, done.stdout + done.stderr


# -- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "no command": ([], "the following arguments are required: COMMAND"),
    "unknown command": (["judge"], "invalid choice: 'judge'"),
    "unknown family": (["list", "--family", "nope"], "unknown family 'nope'; known: "),
    "unknown mechanism to show": (["show", "nope"], "unknown mechanism; known: "),
    "missing mechanism file": (["show", "gone.toml"], "no such file"),
    "malformed mechanism file": (["show", "broken.toml"], "not a readable TOML file"),
    "incomplete mechanism file": (["show", "empty.toml"], "required property"),
    "unknown mechanism to check": (["check", "kernels.py:right", "--mechanism", "nope"], "unknown mechanism"),
    "no mechanism": (["check", "kernels.py:undescribed"], "does not say what it implements"),
    "no such file": (["check", "gone.py:f", *SMOKE], "no such file"),
    "no such module": (["check", "no_such_module:f", *SMOKE], "cannot import module 'no_such_module'"),
    "no such function": (["check", "kernels.py:rihgt", *SMOKE], "has no 'rihgt' (there is: right"),
    "not a function": (["check", "kernels.py:KERNEL", *SMOKE], "has no 'KERNEL'"),
    "unimportable file": (["check", "broken.py:f", *SMOKE], "cannot import file"),
    "neither": (["check", "nonsense", *SMOKE], "expected module:function"),
    "unknown dtype": (["check", "kernels.py:right", "--dtype", "fp8"], "dtype 'fp8' is unknown"),
    "unknown level": (["check", "kernels.py:right", "--level", "full"], "invalid choice: 'full'"),
    "unknown direction": (["check", "kernels.py:right", "--direction", "sideways"], "direction 'sideways' is unknown"),
    "bad seed": (["check", "kernels.py:right", "--seed", "-1"], "is no seed"),
    "bad timeout": (["check", "kernels.py:right", "--timeout", "0"], "is no number of seconds"),
    "missing list": (["check", "kernels.py:right", "--expect", "gone.toml"], "cannot read gone.toml"),
    "unwritable report": (["check", "kernels.py:right", "--json", "no/folder/r.json"], "there is no folder"),
    "unknown case": (["repro", "nonsense", "--candidate", "kernels.py:right"], "is no case id"),
    "repro without candidate": (["repro", "x"], "--candidate"),
    "unknown mechanism of vectors": (["vectors", "export", "--mechanism", "nope", "--out", "x"], "unknown mechanism"),
    "no vectors": (["vectors", "verify", "."], "cannot read manifest.json"),
    "unknown mechanism of mutants": (["mutants", "--mechanism", "nope"], "unknown mechanism"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_input_is_one_clear_line_and_exit_code_two(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "broken.toml").write_text("[[")
    (folder / "empty.toml").write_text("")
    arguments, told = BAD[name]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert told in captured.err and captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("attnspec")


def test_a_missing_device_is_one_clear_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (folder / "torch_kernel.py").write_text("def f(q, k, v):\n    return q\n")
    done = run("check", "torch_kernel.py:f", *SMOKE, "--device", "cuda", cwd=folder)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cuda" in done.stderr.lower(), done.stderr


def test_a_defect_of_ours_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_down(_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("attnspec.conformance.cli_show.list_mechanisms", break_down)
    assert cli.main(["list"]) == 2
    assert "defect of attnspec" in capsys.readouterr().err


def test_a_closed_pipe_ends_quietly(folder: Path) -> None:
    command = f"{sys.executable} -m attnspec show softmax_attention --format json | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.stderr == ""


# -- the other commands -----------------------------------------------------------------------------------------------


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    import attnspec

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"attnspec {attnspec.__version__}\n"


def test_coverage_prints_the_table_and_its_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["coverage"]) == 0
    table = capsys.readouterr().out
    assert cli.main(["coverage", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert all(f"| {row['name']} |" in table for row in document["mechanisms"])


@pytest.mark.parametrize(("problems", "code"), [([], 0), (["a mutant does not run"], 1)])
def test_mutants_prints_the_result_and_fails_on_a_problem(
    problems: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnspec.conformance import mutation

    def run_nothing(name: str, **_: object) -> mutation.MutationReport:
        return mutation.MutationReport(name, problems=problems)

    monkeypatch.setattr(mutation, "run", run_nothing)
    path = tmp_path / "mutants.json"
    assert cli.main(["mutants", "--mechanism", "softmax_attention", "--json", str(path)]) == code
    assert "mechanical mutants killed" in capsys.readouterr().out
    assert json.loads(path.read_text())["problems"] == problems


def test_exported_vectors_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "vectors")
    export = ["vectors", "export", "--mechanism", "softmax_attention", "--out", out, "--dtype", "fp32,bf16"]
    assert cli.main(export) == 0
    assert "manifest.json" in capsys.readouterr().out
    assert cli.main(["vectors", "verify", out]) == 0
    assert "agree with the equations" in capsys.readouterr().out
    path = next((tmp_path / "vectors").glob("*.bf16.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    assert cli.main(["vectors", "verify", out]) == 1
    assert "sha256" in capsys.readouterr().out


def test_a_request_to_terminate_stops_the_worker_and_reports_what_was_judged(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel.py"
    kernel.write_text(
        "import os, time\nfrom pathlib import Path\nimport attnspec\n\n"
        "@attnspec.candidate(mechanism='softmax_attention', framework='numpy', dtypes=('fp32',))\n"
        "def slow(q, k, v):\n"
        f"    Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "    while True:\n        sum(range(1000))\n"
    )
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "attnspec", "check", f"{kernel}:slow", "--level", "smoke", "--json", str(report)]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        pid = tmp_path / "pid"
        end = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        worker = Path("/proc") / pid.read_text() / "stat"
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 2
        assert "interrupted: 0 cases were judged" in json.loads(report.read_text())["problems"][0]
        end = time.monotonic() + 10
        while worker.exists() and worker.read_text().split()[2] != "Z" and time.monotonic() < end:
            time.sleep(0.05)
        assert not worker.exists() or worker.read_text().split()[2] == "Z"
    finally:
        run.kill()
