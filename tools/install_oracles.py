"""Install those packages of the extra `oracle` that this machine supports.

torch and transformers are wheels. ggml-python is built from source; without a C compiler, this
script skips it with a message, and pytest skips its tests.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["optional-dependencies"]["oracle"]
    sources = [r for r in requirements if r.startswith("ggml-python")]
    for requirement in [r for r in requirements if r not in sources]:  # one by one, torch first
        install(requirement)
    if shutil.which("cc") and shutil.which("c++"):
        install(*sources)
    else:
        print("NOT RUN: real ggml (no C compiler to build ggml-python)")
    return 0


def install(*requirements: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", *requirements]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
