"""A reader for the DOT text that pyggml writes, and Graphviz's drawing of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field

import pytest

_TOKEN = re.compile(
    r"""\s+|(?P<text>"(?:[^"\\]|\\.)*")|(?P<word>[A-Za-z_]\w*|-?\d+(?:\.\d+)?)|(?P<mark>->|[{}\[\];,=])"""
)
_KEYWORDS = {"node", "edge", "graph", "digraph", "subgraph", "strict"}


@dataclass
class Drawing:
    """The contents of a DOT text.

    boxes   title of a cluster -> the nodes declared in it
    loose   nodes declared outside all clusters
    """

    name: str = ""
    nodes: dict[str, dict[str, str]] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)
    boxes: dict[str, list[str]] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)


class DotReader:
    """A parser of one digraph. AssertionError for what `dot` would call a syntax error."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        at = 0
        while at < len(text):
            token = _TOKEN.match(text, at)
            assert token, f"not a DOT token: {text[at : at + 30]!r}"
            if token.lastgroup:
                self.tokens.append(token[0])
            at = token.end()
        self.drawing = Drawing()

    def read(self) -> Drawing:
        self.take("digraph")
        self.drawing.name = self.identifier()
        self.statements(None)
        assert not self.tokens, f"text after the end: {self.tokens[:5]}"
        return self.drawing

    def take(self, token: str) -> None:
        assert self.tokens and self.tokens[0] == token, f"expected {token!r}: {self.tokens[:5]}"
        self.tokens.pop(0)

    def identifier(self) -> str:
        token = self.tokens.pop(0)
        assert token[0] == '"' or re.match(r"[\w-]", token), f"expected an identifier: {token!r}"
        assert token.lower() not in _KEYWORDS, f"{token!r} is a keyword"
        return token

    def attributes(self) -> dict[str, str]:
        values: dict[str, str] = {}
        self.take("[")
        while self.tokens[0] != "]":
            key = self.identifier()
            self.take("=")
            values[key] = self.identifier()
            if self.tokens[0] == ",":
                self.take(",")
        self.take("]")
        return values

    def statements(self, box: str | None) -> None:
        self.take("{")
        while self.tokens[0] != "}":
            box = self.statement(box)
        self.take("}")

    def statement(self, box: str | None) -> str | None:
        """Read one statement inside `box`. Return the box's title, which a `label=` changes."""
        first = self.tokens[0]
        if first == "subgraph":
            self.take("subgraph")
            assert self.identifier().startswith("cluster")
            self.statements("")
            return box
        if first in ("graph", "node", "edge"):
            self.take(first)
            self.attributes()
        else:
            name = self.identifier()
            if self.tokens[0] == "=":
                self.take("=")
                title = self.identifier()
                assert name == "label" and box is not None
                self.drawing.boxes[title] = []
                box = title
            elif self.tokens[0] == "->":
                self.take("->")
                self.drawing.edges.append((name, self.identifier()))
                if self.tokens[0] == "[":
                    self.attributes()
            else:
                assert name not in self.drawing.nodes, f"{name} is declared twice"
                self.drawing.nodes[name] = self.attributes()
                (self.drawing.loose if box is None else self.drawing.boxes[box]).append(name)
        self.take(";")
        return box


def read(text: str) -> Drawing:
    """The drawing of a DOT text; fails if it is not valid DOT or an edge has no node."""
    drawing = DotReader(text).read()
    ends = {end for edge in drawing.edges for end in edge}
    assert ends <= set(drawing.nodes), f"no such nodes: {ends - set(drawing.nodes)}"
    return drawing


def drawn_by_dot(text: str) -> str:
    """Graphviz's SVG of the text. Skips the test if `dot` is not installed."""
    if shutil.which("dot") is None:
        pytest.skip("Graphviz is not installed (no `dot` on PATH)")
    dot = subprocess.run(["dot", "-Tsvg"], input=text, capture_output=True, text=True, check=False)
    assert dot.returncode == 0 and not dot.stderr, dot.stderr
    return dot.stdout
