"""Write the API pages: one page a public module, made from its docstrings by pdoc.

    python tools/api_pages.py build/docs

The status is 1 where pdoc warns, or where a public name has no docstring.
"""

from __future__ import annotations

import html
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
#: `pyggml.define` is a name of `pyggml`, so it gets its page with it.
MODULES = (
    "pyggml", "pyggml.backends.base", "pyggml.backends.numpy", "pyggml.gguf",
    "pyggml.models.deepseek2", "pyggml.models.feed_forward", "pyggml.parity.tolerance",
    "pyggml.quants", "pyggml.viz",
)  # fmt: skip


def main(folder: Path) -> int:
    sys.path.insert(0, str(ROOT))
    modules = [import_module(name) for name in MODULES]
    problems = [f"{name} has no docstring" for module in modules for name in undocumented(module)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write(folder)
    problems += [str(warning.message) for warning in caught]
    for problem in problems:
        print("api_pages:", problem, file=sys.stderr)
    if not problems:
        print(f"{folder}/index.html")
    return int(bool(problems))


def write(folder: Path) -> None:
    """The pages, by pdoc with the template of docs/api."""
    import pdoc

    from pyggml.node import Op

    package = import_module("pyggml")
    for name in package.__all__:
        value = getattr(package, name)
        setattr(package, name, value)  # some are imported when first used: pdoc looks in vars()
        if isinstance(value, Op):
            vars(value).pop("__wrapped__")  # pdoc would show the shape rule, which returns a Spec
    pdoc.render.configure(
        template_directory=ROOT / "docs" / "api", show_source=False, footer_text="pyggml"
    )
    pdoc.render.env.filters["docs"] = as_html
    pdoc.pdoc(*MODULES, output_directory=folder)


def as_html(text: str) -> str:
    """A docstring as HTML: as it stands, with `names` set as code."""
    return re.sub(r"`([^`\n]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def undocumented(module: ModuleType) -> Iterator[str]:
    """Public functions and classes of a module that have no docstring of their own."""
    if not module.__doc__:
        yield module.__name__
    for name in getattr(module, "__all__", [n for n in vars(module) if n[0] != "_"]):
        value = getattr(module, name)
        ours = getattr(value, "__module__", "").startswith("pyggml")
        if ours and (inspect.isroutine(value) or inspect.isclass(value)):
            generated = f"{name}("  # what a dataclass without a docstring is given
            if not value.__doc__ or value.__doc__.startswith(generated):
                yield f"{module.__name__}.{name}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs")))
