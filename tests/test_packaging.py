"""The wheel, the sdist and the editable install each give a package that works, in a fresh environment."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from attnspec.tests.test_cli import KERNELS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the source checkout")

PROBE = """
import attnspec, pathlib, sys
from attnspec.spec import load
import attnspec.spec.papers, attnspec.reference.softmax_attention, attnspec.conformance.cli, attnspec.property_tests
mechanism = load("softmax_attention")
print(pathlib.Path(attnspec.__file__).resolve())
print(attnspec.__version__, len(attnspec.spec.papers.papers()), mechanism.name)
"""


def run(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=300, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def environment(folder: Path) -> Path:
    """A fresh environment whose only packages are this one's dependencies, lent by the running interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    python = folder / "bin" / "python"
    site = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *what: str) -> None:
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-build-isolation",
        "--no-index", "--force-reinstall", *what)  # fmt: skip


def works(python: Path, folder: Path) -> str:
    """Import, load and run the command line away from the checkout; returns where the package lies."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    place, facts = run(str(python), "-c", PROBE, cwd=folder, env=clean).split("\n")[:2]
    assert facts.endswith(" 321 softmax_attention")
    listed = run(str(python), "-m", "attnspec", "list", cwd=folder, env=clean)
    assert "softmax_attention" in listed
    shown = run(str(python.parent / "attnspec"), "show", "softmax_attention", "--format", "json", cwd=folder, env=clean)
    assert '"softmax_attention"' in shown
    return place


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from it."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "-q", "--no-isolation", "--outdir", str(out), str(ROOT))
    return out


def test_the_wheel_works_in_a_fresh_environment(built: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    install(python, str(next(built.glob("*.whl"))))
    assert str(tmp_path / "env") in works(python, tmp_path)


def test_a_folder_of_the_packages_name_does_not_hide_it_from_the_worker(built: Path, tmp_path: Path) -> None:
    """As in a checkout, where README's first command runs: `attnspec/` there is not the installed package."""
    python = environment(tmp_path / "env")
    install(python, str(next(built.glob("*.whl"))))
    (tmp_path / "attnspec").mkdir()
    (tmp_path / "attnspec" / "__init__.py").write_text("raise ImportError('this is not the package')\n")
    (tmp_path / "kernels.py").write_text(KERNELS)
    command = str(python.parent / "attnspec")
    told = run(command, "check", "kernels.py:right", "--level", "smoke", "--select", "*/B1.H1.*", cwd=tmp_path)
    assert "CONFORMS" in told


def test_the_sdist_works_in_a_fresh_environment(built: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    install(python, str(next(built.glob("*.tar.gz"))))
    assert str(tmp_path / "env") in works(python, tmp_path)


def test_the_editable_install_works_in_a_fresh_environment(tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    install(python, "-e", str(ROOT))
    assert str(ROOT) in works(python, tmp_path)


def test_the_wheel_holds_every_data_file(built: Path) -> None:
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    for room in ("spec", "conformance", "atlas"):
        for path in (ROOT / room).rglob("*"):
            if path.suffix in (".toml", ".json", ".txt", ".css"):
                assert f"attnspec/{room}/{path.relative_to(ROOT / room)}" in names, path
    assert "attnspec/py.typed" in names


def test_the_wheel_lists_every_package(built: Path) -> None:
    """A new folder with an __init__.py must be named in pyproject.toml, or the wheel lacks it."""
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    for room in ("attnspec", "spec", "reference", "impls", "conformance", "property_tests", "atlas", "perf", "tests"):
        for path in (ROOT / room).rglob("*.py"):
            inside = "attnspec/" + ("" if room == "attnspec" else f"{room}/") + str(path.relative_to(ROOT / room))
            assert inside in names, path
