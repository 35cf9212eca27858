"""The documents are correct: their Python runs, and their tables match the records."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if blocks(path)], ids=lambda path: path.name
)
def test_python_runs(
    path: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of a document run one after another as one module, in an empty folder.

    `print(..)  # x` prints x.
    """
    monkeypatch.chdir(tmp_path)
    module = ModuleType("document")
    monkeypatch.setitem(sys.modules, "document", module)
    for block in blocks(path):
        exec(compile(block, str(path), "exec", dont_inherit=True), module.__dict__)
        printed = capsys.readouterr().out.splitlines()
        outputs = re.findall(r"^print\(.*?\)  # ([\[(].*)$", block, re.MULTILINE)
        for text in outputs:
            assert any(text.startswith(line) for line in printed if line.strip()), (text, printed)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_have_targets(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_tables_match_the_records() -> None:
    result = subprocess.run([sys.executable, ROOT / "tools" / "tables.py", "--check"])
    assert result.returncode == 0


def test_the_page_on_quant_types_quotes_the_code() -> None:
    page = (ROOT / "docs/adding-a-quant-type.md").read_text()
    quotes = re.findall(r"^```(?:py|text)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    code = [(ROOT / f"pyggml/{name}.py").read_text() for name in ("dtypes", "quants/decoders")]
    assert len(quotes) == 2
    for quote, text in zip(quotes, code, strict=True):
        assert quote.strip() in text
    for path in re.findall(r"`([\w/]+\.(?:py|cuh|cu))`", page):
        assert (ROOT / path).exists() or list((ROOT / "tests").rglob(path)), path


def test_the_map_of_models_names_files() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    section = page.partition("## Models")[2].partition("\n    file ")[0]
    folder, paths = "", []
    for line in filter(None, map(str.strip, section.splitlines())):
        first, *columns = re.split(r" {2,}", line)
        if first.endswith("/"):
            folder, (first, *_) = first, columns
        paths += [ROOT / "pyggml" / folder / f"{name}.py" for name in first.split()]
    assert len(paths) > 25
    assert [str(path) for path in paths if not path.exists()] == []


def test_every_dependency_has_a_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    needs = [*project["dependencies"], *(need for extra in extras for need in extra)]
    names = {re.split(r"[^\w-]", need)[0] for need in needs} - {"pyggml"}
    table = (ROOT / "docs/architecture.md").read_text().partition("## Dependencies")[2]
    table = table.replace(
        "nvidia-cuda-nvrtc, -runtime, -crt, -cccl",
        "nvidia-cuda-nvrtc, nvidia-cuda-runtime, nvidia-cuda-crt, nvidia-cuda-cccl",
    )
    assert [name for name in sorted(names) if name not in table] == []
