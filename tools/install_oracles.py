"""Install the packages of the extra `oracle` that this machine can have.

torch and transformers come as wheels. ggml-python is built from source: where no compiler is found
its tests do not run, and this script says so.
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
    wanted = project["optional-dependencies"]["oracle"]
    built = [r for r in wanted if r.startswith("ggml-python")]
    for requirement in [r for r in wanted if r not in built]:  # torch first: it decides its build
        install(requirement)
    if shutil.which("cc") and shutil.which("c++"):
        install(*built)
    else:
        print("NOT RUN: real ggml (no C compiler here to build ggml-python with)")
    return 0


def install(*requirements: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", *requirements]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
