"""Puts a page's data, style and script together into one HTML file."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from pathlib import Path
from string import Template

from pyggml.page.document import Document

#: In the order in which they run.
SCRIPTS = (
    "base.js", "plan.js", "memory.js", "arena.js", "devices.js", "cost.js", "rails.js", "graph.js",
    "main.js",
)  # fmt: skip


def text_of(document: Document) -> str:
    """The page as HTML. It loads nothing, and its policy forbids that it does."""
    script = '"use strict";\n' + "".join(asset(name) for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return Template(asset("page.html")).substitute(
        policy=policy,
        title=html.escape(document.title),
        style=asset("page.css"),
        data=_json(document),
        script=script,
    )


def write(path: Path, document: Document) -> None:
    """Write the page; an interrupt leaves no half of it."""
    text = text_of(document)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def asset(name: str) -> str:
    return (files("pyggml.page") / "assets" / name).read_text(encoding="utf-8")


def _json(document: Document) -> str:
    """JSON in which nothing can end the script element that it is in."""
    text = json.dumps(document.data(), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
