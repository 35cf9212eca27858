"""Build llama-bench of llama.cpp, and run it on the file that pyggml is measured with.

    python benchmarks/peers.py SOURCE FOLDER [--cuda]

SOURCE is the source of llama.cpp, or the archive or the unpacked source of llama-cpp-python, which
carries it (`pip download --no-binary :all: --no-deps llama-cpp-python`). The build needs cmake,
ninja and a C++ compiler, and with --cuda CUDA's toolkit; 16 cores take about 5 minutes with it, 1
without. FOLDER then has llama-bench. Nothing of it is part of this project.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from pyggml.bench.runs import Test  # noqa: E402

#: What llama-bench does not need.
OFF = ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER", "BUILD_APP", "OPENSSL", "USE_PREBUILT_UI")


def build(source: Path, folder: Path, *, cuda: bool) -> Path:
    """Build llama-bench in a folder; its path. SystemExit with the end of the log if that fails."""
    if source.is_file():
        with TemporaryDirectory() as unpacked, tarfile.open(source) as archive:
            archive.extractall(unpacked, filter="data")
            return build(Path(unpacked), folder, cuda=cuda)
    vendored = sorted(source.glob("**/vendor/llama.cpp/CMakeLists.txt"))
    root = vendored[0].parent if vendored else source
    options = [f"-DLLAMA_{name}=OFF" for name in OFF] + ["-DCMAKE_BUILD_TYPE=Release"]
    if cuda:
        options += ["-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=native"]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    with log.open("w") as file:
        for command in (
            ["cmake", "-S", str(root), "-B", str(folder), "-G", "Ninja", *options],
            ["ninja", "-C", str(folder), "llama-bench"],
        ):
            if subprocess.run(command, stdout=file, stderr=file).returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return folder / "bin" / "llama-bench"


def llama_bench(
    binary: Path, file: Path, options: Sequence[str], *, repeats: int = 1
) -> tuple[dict[Test, list[float]], str]:
    """Tokens a second of each test, and the build. CalledProcessError if it fails."""
    command = [str(binary), "-m", str(file), "-r", str(repeats), "-o", "json", *options]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rates: dict[Test, list[float]] = {}
    results: list[dict[str, Any]] = json.loads(output)
    for result in results:
        test = Test(result["n_prompt"], result["n_gen"], result["n_depth"])
        rates.setdefault(test, []).extend(result["samples_ts"])
    return rates, f"llama.cpp {results[0]['build_number']} ({results[0]['build_commit']})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder or archive")
    parser.add_argument("folder", type=Path, help="where to build")
    parser.add_argument("--cuda", action="store_true", help="for this machine's GPU, too")
    args = parser.parse_args()
    print(build(args.source, args.folder, cuda=args.cuda))
    return 0


if __name__ == "__main__":
    sys.exit(main())
