"""Names in prose exist: files and modules that documents, docstrings and comments mention."""

from __future__ import annotations

import ast
import importlib
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("pyggml", "ops", "backends", "tests", "tools", "benchmarks", "examples")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
#: Pages that also name what is gone.
HISTORY = {"CHANGELOG.md"}
#: Files of the repository: with a folder, or of kernels. Other names may be users' own files.
FILE = re.compile(
    r"(?<![\w./*{}-])(?:\.?\w[\w-]*/)+\w[\w-]*\.(?:py|cuh?|md|sh|toml|npz)\b"
    r"|(?<![\w./*{}-])\w+\.cuh?\b"
)
FOLDER = re.compile(rf"(?<![\w./-])(?:{'|'.join((*FOLDERS, 'docs'))})(?:/[\w-]+)*/(?![\w*{{])")
MODULE = re.compile(r"(?<!/)\bpyggml(?:\.[A-Za-z_]\w*)+\b(?![\w./*-]*\()")


@cache
def files() -> frozenset[str]:
    """Every file of the repository by its path, and by every end of that path."""
    paths = [*ROOT.glob("*.*"), *(ROOT / "docs").rglob("*.*")]
    paths += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
    parts = [path.relative_to(ROOT).parts for path in paths]
    return frozenset("/".join(each[i:]) for each in parts for i in range(len(each)))


def missing(text: str) -> list[str]:
    """Files, folders and modules in a text that do not exist. Words in capitals are patterns."""
    names = [name for name in FILE.findall(text) if not _is_pattern(name)]
    absent = [name for name in names if name not in files()]
    folders = [name for name in FOLDER.findall(text) if not _is_pattern(name)]
    absent += [name for name in folders if not (ROOT / name).is_dir()]
    return absent + [name for name in MODULE.findall(text) if not _imports(name)]


def _is_pattern(name: str) -> bool:
    return any(part.isupper() for part in Path(name).with_suffix("").parts)


@cache
def _imports(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[count:]:
                value = getattr(value, part)
        except AttributeError:
            return parts[-1] == "NAME"
        return True
    return False


def prose(path: Path) -> Iterator[str]:
    """The docstrings and comments of a source file."""
    text = path.read_text()
    if path.suffix != ".py":
        yield from re.findall(r"//.*|/\*.*?\*/", text)
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""
    with path.open("rb") as file:
        tokens = tokenize.tokenize(file.readline)
        yield from (token.string for token in tokens if token.type == tokenize.COMMENT)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_name_what_exists(path: Path) -> None:
    text = path.read_text()
    if path.name in HISTORY:
        text = text.partition("### Renamed")[0]
    assert not missing(text)


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_and_comments_name_what_exists(folder: str) -> None:
    absent = {}
    for suffix in ("py", "cu", "cuh", "cpp", "hpp"):
        for path in sorted((ROOT / folder).rglob(f"*.{suffix}")):
            if names := missing("\n".join(prose(path))):
                absent[str(path.relative_to(ROOT))] = names
    assert not absent


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("see `pyggml/graph.py` and tests/gpu/", []),
        ("`include/overlap.cuh`, overlap.cuh, backends/NAME/table.py, a/b/*.cu", []),
        ("`pyggml.node.Node` and pyggml.ops", []),
        ("see pyggml/dag.py", ["pyggml/dag.py"]),
        ("values.cuh has them", ["values.cuh"]),
        ("the scripts of tests/tpu/", ["tests/tpu/"]),
        ("`pyggml.node.Edge`", ["pyggml.node.Edge"]),
        ("pyggml.dag.Graph", ["pyggml.dag.Graph"]),
    ],
)
def test_missing_names_are_found(text: str, names: list[str]) -> None:
    assert missing(text) == names
