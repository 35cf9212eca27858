"""Versions and pins are in one place; CI runs every check of the project."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import pyggml
from pyggml.backends.cuda.device import install

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]


def test_the_version_is_in_the_package() -> None:
    assert "version" in PROJECT["project"]["dynamic"] and "version" not in PROJECT["project"]
    path = ROOT / PROJECT["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{pyggml.__version__}"\n' in path.read_text()


def test_each_package_is_pinned_once() -> None:
    names = [
        re.split(r"[<>=\[]", r)[0] for extra in EXTRAS.values() for r in extra if "pyggml[" not in r
    ]
    assert len(names) == len(set(names))
    assert "pyggml[kernels]" in EXTRAS["cuda"]
    pin = re.compile(r"(nvidia-[a-z-]+|cupy-cuda13x|pycuda|cuda-bindings|torch)[\"']?(==|>=)\d")
    files = [
        f for d in ("pyggml", "backends", "ops", "tools", "docs") for f in (ROOT / d).rglob("*")
    ]
    for path in [ROOT / "README.md", *files]:
        if path.is_file() and path.suffix in (".py", ".md", ".sh"):
            assert not pin.search(path.read_text()), path


def test_mypy_gives_the_same_result_without_the_extras() -> None:
    """`make lint` runs before torch and the like are installed, and not only where they are."""
    settings = PROJECT["tool"]["mypy"]
    (skipped,) = [o["module"] for o in settings["overrides"] if o["ignore_missing_imports"]]
    known = {name.removesuffix(".*") for name in skipped}
    known |= sys.stdlib_module_names | {"numpy", "pytest"}  # installed with the project
    known |= {p.name for p in ROOT.iterdir()} | {"pyggml"}
    for path in (p for folder in settings["files"] for p in (ROOT / folder).rglob("*.py")):
        names = {
            name.partition(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in _imports(node)
        }
        assert names <= known, path


def _imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [node.module or ""]
    return []


def test_pycuda_is_built_with_the_headers_of_the_kernels() -> None:
    script = (ROOT / "tools" / "build_pycuda.sh").read_text()
    default = re.search(r"CUDA_HEADERS_VERSION:-([\d.*]+)", script)
    assert default and {r.partition("==")[2] for r in EXTRAS["kernels"]} == {default[1]}


def test_the_wheel_contains_the_script_that_doctor_names() -> None:
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert wheel["tools/build_pycuda.sh"] == "pyggml/tools/build_pycuda.sh"
    missing = [source for source in wheel if not (ROOT / source).exists()]
    assert not missing
    # In the wheel, `install.py` is two folders below pyggml/backends; here, below backends/.
    assert install._TOP == ROOT and install.from_clone()


# -- CI ---------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with .ci/run and fake commands that log their calls."""
    (tmp_path / "bin").mkdir()
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    for name in ("make", "python3", ".venv/bin/python", ".venv/bin/mpiexec"):
        path = tmp_path / ("bin/" + name if "/" not in name else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/log\n'
            f'case "{name} $*" in\n"$FAILS") exit 1;;\n'
            '"python3 tools/readme_commands.py") echo "make demo  ";;\nesac\n'
        )
        path.chmod(0o755)
    return tmp_path


def ci(machine: Path, fails: str = "") -> tuple[int, list[str]]:
    """The status of .ci/run, and the commands it called. `fails` is a command that fails."""
    env = {"PATH": f"{machine}/bin:{os.environ['PATH']}", "FAILS": fails}
    run = subprocess.run(["bash", ".ci/run"], cwd=machine, env=env, capture_output=True, text=True)
    return run.returncode, (machine / "log").read_text().splitlines()


STEPS = (
    "python3 tools/readme_commands.py",
    "make demo",  # from the fake README
    "make lint",
    "make docs",
    "make kernels ARCHS=90a,80",
    "python3 tools/kernel_record.py",
    "make test-oracle",
)


def test_ci_runs_every_check(machine: Path) -> None:
    status, calls = ci(machine)
    assert status == 0 and [call for call in calls if call in STEPS] == list(STEPS)
    together = [
        call for call in calls if call.startswith(".venv/bin/mpiexec -n 2 .venv/bin/python")
    ]
    assert [call.split(" --backend ")[1] for call in together] == ["null", "numpy"]


@pytest.mark.parametrize("step", STEPS)
def test_ci_fails_if_a_check_fails(machine: Path, step: str) -> None:
    status, calls = ci(machine, fails=step)
    assert status != 0 and calls[-1] == step


def test_the_workflow_runs_ci_on_the_oldest_and_newest_python() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.search(r"^ +- run: bash \.ci/run$", text, re.MULTILINE)
    classifiers = "\n".join(PROJECT["project"]["classifiers"])
    supported = re.findall(r":: (3\.\d+)$", classifiers, re.MULTILINE)
    tested = re.search(r'python: \["([\d.]+)", "([\d.]+)"\]', text)
    assert tested and tested.groups() == (supported[0], supported[-1])
