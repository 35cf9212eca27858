"""docs/environment.md names every variable that is read, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLES = (ROOT / "docs" / "environment.md").read_text()
LIBRARY, REST = TABLES.split("## Tests, tools and benchmarks")
FOLDERS = ("pyggml", "ops", "backends")  # links are not followed: each file is seen once


def documented(text: str) -> set[str]:
    """The variables of the first column of a table."""
    rows = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def is_environ(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def names_read(tree: ast.Module) -> Iterator[ast.expr]:
    """What is looked up in os.environ, or given to os.getenv."""
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
    """The strings that a variable of a file can be."""
    found: set[str] = set()
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        value: ast.expr | None = None
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, (ast.For, ast.comprehension)):
            targets, value = [node.target], node.iter
        if value is not None and any(isinstance(t, ast.Name) and t.id == name for t in targets):
            found |= {
                constant.value
                for constant in ast.walk(value)
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
            }
    return found


def read_by(source: str) -> set[str]:
    tree = ast.parse(source)
    names: set[str] = set()
    for node in names_read(tree):
        if isinstance(node, ast.Constant):
            names.add(str(node.value))
            continue
        values = values_of(node.id, tree) if isinstance(node, ast.Name) else set()
        assert values, f"line {node.lineno}: which variable it reads cannot be seen"
        names |= values
    return names


def test_the_table_of_the_library_is_complete() -> None:
    read: set[str] = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            if path.relative_to(ROOT).parts[:2] not in (("pyggml", "ops"), ("pyggml", "backends")):
                read |= read_by(path.read_text())
    assert read == documented(LIBRARY)


def test_every_variable_of_ours_is_in_a_table() -> None:
    named: set[str] = set()
    for folder in (*FOLDERS, "tests", "tools", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".sh", ".cu", ".cuh") and path != Path(__file__):
                named |= set(re.findall(r"\bPYGGML_[A-Z_]+\b", path.read_text()))
    named |= set(re.findall(r"\bPYGGML_[A-Z_]+\b", (ROOT / "Makefile").read_text()))
    ours = {name for name in documented(TABLES) if name.startswith("PYGGML_")}
    assert named == ours


def test_variables_of_scripts_are_in_the_second_table() -> None:
    named: set[str] = set()
    for path in (ROOT / "tools").glob("*.sh"):
        text = path.read_text()
        named |= set(re.findall(r"\$\{([A-Z_]+):-", text))
        named |= set(re.findall(r'getenv\("(\w+)"\)', text))
    assert named == {name for name in documented(REST) if not name.startswith("PYGGML_")}


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
def test_what_reads_a_variable_is_found(source: str, names: set[str]) -> None:
    assert read_by(source) == names


def test_a_variable_that_cannot_be_seen_is_refused() -> None:
    with pytest.raises(AssertionError, match="line 1"):
        read_by("os.environ.get(prefix + name)")
