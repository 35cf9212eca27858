"""The stand-in for pycuda, by which tests without a GPU run, has no name that pycuda lacks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

STAND_IN = Path(__file__).parent.parent / "cuda" / "fake_pycuda" / "pycuda" / "driver.py"


def names() -> Iterator[str]:
    """Public functions and classes of the stand-in, and what these classes define."""
    for node in ast.parse(STAND_IN.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
            yield node.name
        for part in node.body if isinstance(node, ast.ClassDef) else ():
            own = [part.name] if isinstance(part, ast.FunctionDef) else []
            if isinstance(part, ast.Assign):
                own = [target.id for target in part.targets if isinstance(target, ast.Name)]
            yield from (f"{node.name}.{name}" for name in own if name[0] != "_")


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(names()))
def test_pycuda_has_every_name_of_its_stand_in(name: str) -> None:
    driver = pytest.importorskip("pycuda.driver")
    place = driver
    for part in name.split("."):
        assert hasattr(place, part), f"pycuda.driver has no {name}"
        place = getattr(place, part)
