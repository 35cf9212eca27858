"""Compile every kernel of the CUDA backend for some architectures; needs NVRTC and no GPU.

    python tools/compile_kernels.py                    all files for 90a and 80
    python tools/compile_kernels.py -a 90a norm.cu     one file
    python tools/compile_kernels.py -a 89,100a,120a

Which instances are compiled stands in the kernels' sources, a line for each:

    // @kernel [hot] [ARCH ..] EXPRESSION      `{a|b}`: once with each; `$n`: the n-th choice again;
                                               EVERY: all block types; BLOCKS: those of them whose
                                               weights do not lie like another's in tiles; SOME:
                                               one for each way in which codes are read

A name on a second line is the same instance; `hot ARCH` there forbids spills on that one.

Prints registers, shared memory, stack and spills of each instance, and the core-seconds that an
architecture took, with a word where they are more than --limit. The status is 1 where an instance
does not compile, or a `hot` one spills on 9.0 or 8.0. On others, which are compiled and not run, a
spill of theirs is told: whether it costs more than fewer threads would, only a run can say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import thread_time

from pyggml.backends.cuda.device import compiler
from pyggml.backends.cuda.weights.formats import FORMATS
from pyggml.errors import DeviceError

_LINE = re.compile(r"^//\s*@kernel\s+(?P<flags>(?:(?:hot|\d+a?)\s+)*)(?P<name>.+)$", re.M)
#: Where registers are budgeted so that hot kernels do not spill.
BUDGETED = ("90a", "80")
#: Block types that in tiles are others with other levels: iq2_xs and tq2_0.
_ALIKE = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_s", "iq3_xxs", "iq3_s", "tq1_0"}
#: A word for several.
_WORDS = {
    "EVERY": "|".join(FORMATS),
    "BLOCKS": "|".join(k for k in FORMATS if k not in _ALIKE),
    "SOME": "q8_0|q3_K|q6_K|iq4_nl",
}


@dataclass(frozen=True, slots=True)
class Instance:
    """A line of a source, one choice of its braces.

    archs  that it is compiled for; all where there are none
    hot    where it must not spill: architectures, or "" for all
    """

    file: str
    name: str
    archs: tuple[str, ...]
    hot: tuple[str, ...]

    def is_hot(self, arch: str) -> bool:
        return "" in self.hot or arch in self.hot


def expand(text: str, chosen: tuple[str, ...] = ()) -> Iterator[str]:
    """Each way to choose words in braces; `$n` is the word chosen in the n-th."""
    found = re.search(r"\{([^{}]*)\}", text)
    if found is None:
        yield re.sub(r"\$(\d)", lambda m: chosen[int(m[1]) - 1], text)
        return
    for word in found[1].split("|"):
        yield from expand(text[: found.start()] + word + text[found.end() :], (*chosen, word))


def instances(files: list[Path]) -> Iterator[Instance]:
    """What the sources declare. SystemExit where one declares nothing."""
    for path in files:
        lines = list(_LINE.finditer(path.read_text()))
        if not lines:
            raise SystemExit(f"{path}: no line says // @kernel: nothing of it would be compiled")
        found: dict[str, Instance] = {}
        for line in lines:
            flags = line["flags"].split()
            text = re.sub(r"\b[A-Z]+\b", lambda m: _WORDS.get(m[0], m[0]), line["name"].strip())
            archs = tuple(flag for flag in flags if flag != "hot")
            hot = (archs or ("",)) if "hot" in flags else ()
            for name in expand(text):
                first = found.get(name)
                found[name] = (
                    Instance(path.name, name, archs, hot)
                    if first is None
                    else replace(first, hot=first.hot + hot)
                )
        yield from found.values()


@dataclass(frozen=True, slots=True)
class Result:
    instance: Instance
    seconds: float
    made: compiler.Cubin | None = None
    error: str = ""

    @property
    def fault(self) -> str:
        """What is wrong with it, or an empty string."""
        if self.made is None:
            return "does not compile"
        hot = self.instance.is_hot(self.made.arch)
        return "SPILLS" if hot and self.made.spilled else ""


def _compile(instance: Instance, arch: str) -> Result:
    start = thread_time()
    try:
        made = compiler.compile_instance(instance.file, instance.name, arch)
    except DeviceError as error:
        return Result(instance, thread_time() - start, error=str(error))
    return Result(instance, thread_time() - start, made)


def _report(arch: str, results: list[Result], quiet: bool) -> float:
    """Print the table of an architecture; its core-seconds."""
    width = max(len(r.instance.name) for r in results)
    print(f"sm_{arch}{'':{width - 3}} {'regs':>5} {'smem':>7} {'stack':>6} {'spill':>6} {'s':>6}")
    for r in results:
        numbers = (0, 0, 0, 0)
        if r.made is not None:
            numbers = (r.made.registers, r.made.shared, r.made.stack, r.made.spilled)
        hot = "hot " * r.instance.is_hot(arch)
        if r.fault or not quiet:
            told = " ".join(f"{n:>{w}}" for n, w in zip(numbers, (5, 7, 6, 6)))
            print(f"{r.instance.name:{width}} {told} {r.seconds:6.2f} {hot}{r.fault}")
        if r.error:
            print(r.error, file=sys.stderr)
    total = sum(r.seconds for r in results)
    spills = sum(bool(r.made and r.made.spilled) for r in results)
    print(f"sm_{arch}: {len(results)} instances, {spills} spill, {total:.1f} core-seconds\n")
    return total


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="sources in backends/cuda/kernels; all by default")
    parser.add_argument("-a", "--arch", default="90a,80", help="with commas; default %(default)s")
    parser.add_argument("-j", "--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=200.0, help="core-seconds an architecture")
    parser.add_argument("-q", "--quiet", action="store_true", help="only what is wrong, and sums")
    args = parser.parse_args()
    paths = [compiler.KERNELS / name for name in args.files]
    wanted = list(instances(paths or sorted(compiler.KERNELS.glob("*.cu"))))
    status = 0
    for arch in args.arch.split(","):
        mine = [i for i in wanted if not i.archs or arch in i.archs]
        if not mine:
            continue
        with ThreadPoolExecutor(args.jobs) as pool:
            results = list(pool.map(partial(_compile, arch=arch), mine))
        spent = _report(arch, results, args.quiet)
        if spent > args.limit:  # a machine's speed is no fault of the kernels
            print(f"sm_{arch}: more than the {args.limit:g} core-seconds that it should take")
        if any(r.made is None or (r.fault and arch in BUDGETED) for r in results):
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
