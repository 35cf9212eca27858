"""Install those packages of the extra `oracle` that this machine supports.

    python tools/install_oracles.py [--llama]

torch and transformers are wheels. ggml-python is built from source, which takes minutes. Building
llama-cpp-python takes about 20 minutes on two cores, so only --llama does it. What is not installed
is named in a message, and pytest skips its tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["optional-dependencies"]["oracle"]
    sources = [r for r in requirements if r.startswith(("ggml-python", "llama-cpp-python"))]
    for requirement in [r for r in requirements if r not in sources]:  # one by one, torch first
        install(requirement)
    if not (shutil.which("cc") and shutil.which("c++")):
        print("NOT RUN: real ggml and llama.cpp (no C compiler to build them)")
        return 0
    if "--llama" not in sys.argv[1:]:
        sources = [r for r in sources if r.startswith("ggml-python")]
        print("NOT RUN: llama.cpp (install_oracles.py --llama builds it, in about 20 minutes)")
    install(*sources)
    return 0


def install(*requirements: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", *requirements]
    # The tests of llama-cpp-python need no image models.
    subprocess.run(command, check=True, env={"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"} | os.environ)


if __name__ == "__main__":
    sys.exit(main())
