"""Layers: imports go one way, from element types to commands; short files; a light import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
LAYERS = (  # a module may import from its own layer and from earlier ones
    "pyggml.errors pyggml.extras pyggml.where pyggml.renamed pyggml.words pyggml.writes",
    "pyggml.dtypes pyggml.quants pyggml.spec pyggml.traits pyggml.attributes",
    "pyggml.arithmetic pyggml.node pyggml.interning pyggml.arguments pyggml.operation",
    "pyggml.graph pyggml.loop pyggml.transfer pyggml.joint",
    "pyggml.ops",
    "pyggml.backends",
    "pyggml.passes",
    "pyggml.runtime pyggml.page",
    "pyggml.gguf pyggml.generate pyggml.models pyggml.parity",
    "pyggml.bench pyggml.viz pyggml.cli pyggml.__main__ pyggml pyggml.define",
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
#: Modules that backends may use, next to SHARED.
CONCRETE = {
    "node", "operation", "loop", "transfer", "joint", "ops",
    "dtypes", "quants", "errors", "extras", "spec", "traits",
}  # fmt: skip
#: Modules of backends/ that every backend may use.
SHARED = {
    "base", "step", "pieces", "table", "host", "host_memory", "host_runner", "host_tiles",
    "code_cache", "processors", "timing",
}  # fmt: skip
FILES = [f for d in ("pyggml", "ops", "backends") for f in sorted((TOP / d).rglob("*.py"))]
MODULES = {f.relative_to(TOP): f for f in FILES if not f.match("pyggml/ops/**")}


def rank_of(module: str) -> int:
    """The rank of the module or of the innermost package around it that has one."""
    while module not in RANK:
        module = module.rpartition(".")[0]
    return RANK[module]


def backend_of(module: str) -> str:
    """The backend that a module belongs to, or ""."""
    parts = module.split(".")
    inside = parts[1:2] == ["backends"] and len(parts) > 2
    return parts[2] if inside and (TOP / "backends" / parts[2]).is_dir() else ""


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports(path: Path) -> None:
    text = MODULES[path].read_text()
    assert text.count("\n") <= 500
    parts = [p for p in path.with_suffix("").parts if p != "__init__"]
    here = ".".join(parts if parts[0] == "pyggml" else ["pyggml", *parts])
    for node in ast.walk(ast.parse(text)):
        assert not (isinstance(node, ast.ImportFrom) and node.level), "relative import"
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            assert name.split(".")[0] not in ("ops", "backends"), name
            if name.split(".")[0] != "pyggml":
                continue
            assert rank_of(name) <= rank_of(here), f"{here} imports {name}"
            assert backend_of(name) in ("", backend_of(here)), f"{here} imports {name}"
            if backend_of(here) and not backend_of(name):
                top, *inner = name.split(".")[1:]
                allowed = top in CONCRETE or (top == "backends" and bool(SHARED & set(inner[:1])))
                allowed |= name == "pyggml.backends"  # a backend may look up another by name
                assert allowed, f"{here} imports {name}"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True)


def test_import_loads_numpy_only() -> None:
    result = python(
        "import sys; import pyggml\n"
        "print({m.split('.')[0] for m in sys.modules} & "
        "{'gguf', 'torch', 'matplotlib', 'yaml', 'cupy', 'numba', 'transformers'})\n"
        "print([m for m in sys.modules if m.startswith('pyggml.backends.numpy')])"
    )
    assert result.stdout.split("\n")[:2] == ["set()", "[]"], result.stdout + result.stderr


@pytest.mark.parametrize("folder", ["ops", "backends"])
def test_the_top_level_folders_are_imported_through_pyggml(folder: str) -> None:
    result = python(f"import {folder}")
    assert result.returncode and f"import pyggml.{folder}, not the top-level" in result.stderr
