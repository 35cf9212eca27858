"""docs/environment.md lists every variable that the code reads, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLES = (ROOT / "docs" / "environment.md").read_text()
LIBRARY, OTHERS = TABLES.split("## Tests, tools and benchmarks")
FOLDERS = ("pyggml", "ops", "backends")  # pyggml's links to the others are not followed


def documented(text: str) -> set[str]:
    """The variables in the first column of a table."""
    rows = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def is_environ(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def names_read(tree: ast.Module) -> Iterator[ast.expr]:
    """Expressions that are looked up in os.environ or passed to os.getenv."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_environ(node.value):
            yield node.slice
        if isinstance(node, ast.Compare) and any(map(is_environ, node.comparators)):
            yield node.left
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        if is_environ(node.func.value) or node.func.attr == "getenv":
            yield node.args[0]


def values_of(name: str, tree: ast.Module) -> set[str]:
    """The strings that the Python variable `name` can be."""
    strings: set[str] = set()
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        value: ast.expr | None = None
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, (ast.For, ast.comprehension)):
            targets, value = [node.target], node.iter
        if value is not None and any(isinstance(t, ast.Name) and t.id == name for t in targets):
            strings |= {
                constant.value
                for constant in ast.walk(value)
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
            }
    return strings


def read_by(source: str) -> set[str]:
    tree = ast.parse(source)
    names: set[str] = set()
    for node in names_read(tree):
        if isinstance(node, ast.Constant):
            names.add(str(node.value))
            continue
        values = values_of(node.id, tree) if isinstance(node, ast.Name) else set()
        assert values, f"line {node.lineno}: cannot determine which variable it reads"
        names |= values
    return names


def test_the_table_of_the_library_is_complete() -> None:
    read: set[str] = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            if path.relative_to(ROOT).parts[:2] not in (("pyggml", "ops"), ("pyggml", "backends")):
                read |= read_by(path.read_text())
    assert read == documented(LIBRARY)


def test_every_pyggml_variable_is_in_a_table() -> None:
    names: set[str] = set()
    for folder in (*FOLDERS, "tests", "tools", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".sh", ".cu", ".cuh") and path != Path(__file__):
                names |= set(re.findall(r"\bPYGGML_[A-Z_]+\b", path.read_text()))
    names |= set(re.findall(r"\bPYGGML_[A-Z_]+\b", (ROOT / "Makefile").read_text()))
    assert names == {name for name in documented(TABLES) if name.startswith("PYGGML_")}


def test_variables_of_scripts_are_in_the_second_table() -> None:
    names: set[str] = set()
    for path in (ROOT / "tools").glob("*.sh"):
        text = path.read_text()
        names |= set(re.findall(r"\$\{([A-Z_]+):-", text))
        names |= set(re.findall(r'getenv\("(\w+)"\)', text))
    assert names == {name for name in documented(OTHERS) if not name.startswith("PYGGML_")}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("os.environ['A']; os.environ.get('B', ''); os.getenv('C')", {"A", "B", "C"}),
        ("NAME = 'A'\nos.environ.get(NAME)", {"A"}),
        ("for n in ('A', 'B'):\n    os.environ.setdefault(n, '1')", {"A", "B"}),
        ("x = 'A' in os.environ", {"A"}),
        ("environ['A']", set()),
    ],
)
def test_reads_of_variables_are_found(source: str, names: set[str]) -> None:
    assert read_by(source) == names


def test_a_computed_name_is_refused() -> None:
    with pytest.raises(AssertionError, match="line 1"):
        read_by("os.environ.get(prefix + name)")
