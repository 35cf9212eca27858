"""Write the API pages: one page for each public module, generated from docstrings by pdoc.

    python tools/api_pages.py build/docs

The status is 1 if pdoc warns or a public name has no docstring.
"""

from __future__ import annotations

import html
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
#: pdoc writes a page for `pyggml.define` too, because it is a public name of `pyggml`.
MODULES = (
    "pyggml", "pyggml.backends.base", "pyggml.backends.numpy", "pyggml.backends.step",
    "pyggml.generate.chat", "pyggml.generate.loop", "pyggml.generate.sample",
    "pyggml.generate.session", "pyggml.generate.text", "pyggml.generate.tokenizer", "pyggml.gguf",
    "pyggml.models.base", "pyggml.models.batch", "pyggml.models.cache",
    "pyggml.models.deepseek2", "pyggml.models.deepseek32", "pyggml.models.glm4moe",
    "pyggml.models.glm_dsa", "pyggml.models.gpt_oss", "pyggml.models.gqa",
    "pyggml.models.indexer", "pyggml.models.keys", "pyggml.models.known",
    "pyggml.models.latent", "pyggml.models.layers", "pyggml.models.llama", "pyggml.models.mla",
    "pyggml.models.model", "pyggml.models.moe", "pyggml.models.presets", "pyggml.models.qwen3",
    "pyggml.models.synth", "pyggml.models.weights",
    "pyggml.backends.timing", "pyggml.parity.tolerance", "pyggml.quants", "pyggml.runtime.profile",
    "pyggml.viz",
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
    """Write the pages with pdoc and the template in docs/api."""
    import pdoc

    from pyggml.operation import Op

    package = import_module("pyggml")
    for name in package.__all__:
        value = getattr(package, name)
        setattr(package, name, value)  # some are imported lazily, and pdoc only looks in vars()
        if isinstance(value, Op):
            vars(value).pop("__wrapped__")  # or pdoc would show the shape rule's signature
    for module in map(import_module, MODULES):
        for cls in [value for value in vars(module).values() if inspect.isclass(value)]:
            define_inherited_types(cls)
    pdoc.render.configure(
        template_directory=ROOT / "docs" / "api", show_source=False, footer_text="pyggml"
    )
    pdoc.render.env.filters["docs"] = as_html
    pdoc.pdoc(*MODULES, output_directory=folder)


def define_inherited_types(cls: type) -> None:
    """Define the types of a dataclass's inherited fields in its own module, where pdoc looks for
    those of `__init__`.
    """
    own = vars(sys.modules[cls.__module__])
    for base in cls.__mro__ if is_dataclass(cls) else ():
        names = vars(sys.modules[base.__module__])
        for text in map(str, vars(base).get("__annotations__", {}).values()):
            for name in re.findall(r"\w+", text):
                if name in names:
                    own.setdefault(name, names[name])


def as_html(text: str) -> str:
    """A docstring as HTML: the same text, with `names` as code."""
    return re.sub(r"`([^`\n]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def undocumented(module: ModuleType) -> Iterator[str]:
    """The public functions and classes of a module that have no docstring."""
    if not module.__doc__:
        yield module.__name__
    for name in getattr(module, "__all__", [n for n in vars(module) if n[0] != "_"]):
        value = getattr(module, name)
        ours = getattr(value, "__module__", "").startswith("pyggml")
        if ours and (inspect.isroutine(value) or inspect.isclass(value)):
            generated = f"{name}("  # the start of a dataclass's default docstring
            if not value.__doc__ or value.__doc__.startswith(generated):
                yield f"{module.__name__}.{name}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs")))
