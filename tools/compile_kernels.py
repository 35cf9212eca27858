"""Compile every kernel of the CUDA backend for some architectures. Needs NVRTC but no GPU.

    python tools/compile_kernels.py                    all files for 90a and 80
    python tools/compile_kernels.py -a 90a norm.cu     one file
    python tools/compile_kernels.py -a 89,100a,120a

Comments in the kernels' sources declare the instances:

    // @kernel [hot] [ARCH ..] EXPRESSION

    {a|b}   one instance with each word
    $n      the word chosen in the n-th braces
    EVERY   all block types
    BLOCKS  the block types whose weights have a layout of their own in tiles
    LENT    the block types that the cpu backend keeps in tiles
    SOME    one block type for each way to read codes
    UNARY   the functors of elementwise.cu that the macro UNARY defines; likewise BINARY
    hot     spills are an error
    ARCH    only for this architecture

A second line with the same name is the same instance; `hot ARCH` there forbids spills on ARCH.

Prints registers, shared memory, stack and spills of each instance, and the core-seconds for each
architecture, with a remark if they exceed --limit. The status is 1 if an instance does not compile,
or if a `hot` one spills on 9.0 or 8.0. Other architectures are compiled but never run here, and
without a run nobody knows whether a spill costs more than fewer threads would. So a spill there
prints SPILLS but does not change the status.
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
from pyggml.backends.cuda.elementwise import BINARY_FUNCTORS, UNARY_FUNCTORS
from pyggml.backends.cuda.weights.formats import FORMATS
from pyggml.backends.host_tiles import FORMS
from pyggml.errors import DeviceError

_LINE = re.compile(r"^//\s*@kernel\s+(?P<flags>(?:(?:hot|\d+a?)\s+)*)(?P<name>.+)$", re.M)
#: Architectures on which a spill of a hot kernel is an error.
BUDGETED = ("90a", "80")
#: Block types that are decoded like iq2_xs, iq3_xxs or tq2_0, with other bits of indices or levels.
_ALIKE = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_s", "iq3_s", "tq1_0"}
#: Names of lists of block types and functors.
_WORDS = {
    "EVERY": "|".join(FORMATS),
    "BLOCKS": "|".join(k for k in FORMATS if k not in _ALIKE),
    "LENT": "|".join(FORMS),
    "SOME": "q8_0|q3_K|q6_K|iq4_nl|q1_0|iq3_xxs",
    "UNARY": "|".join(UNARY_FUNCTORS.values()),
    "BINARY": "|".join(BINARY_FUNCTORS.values()),
}


@dataclass(frozen=True, slots=True)
class Instance:
    """A kernel instance: a declaration in a source with one choice of its braces.

    archs  architectures to compile it for; empty for all
    hot    architectures on which it must not spill; "" for all
    """

    file: str
    name: str
    archs: tuple[str, ...]
    hot: tuple[str, ...]

    def is_hot(self, arch: str) -> bool:
        return "" in self.hot or arch in self.hot


def expand(text: str, words: tuple[str, ...] = ()) -> Iterator[str]:
    """The text with every choice of words in its braces; `$n` is the word of the n-th braces."""
    braces = re.search(r"\{([^{}]*)\}", text)
    if braces is None:
        yield re.sub(r"\$(\d)", lambda m: words[int(m[1]) - 1], text)
        return
    for word in braces[1].split("|"):
        yield from expand(text[: braces.start()] + word + text[braces.end() :], (*words, word))


def instances(files: list[Path]) -> Iterator[Instance]:
    """The instances that the sources declare. SystemExit if a source declares none."""
    for path in files:
        lines = list(_LINE.finditer(path.read_text()))
        if not lines:
            raise SystemExit(f"{path}: declares no instance; add a line `// @kernel EXPRESSION`")
        by_name: dict[str, Instance] = {}
        for line in lines:
            flags = line["flags"].split()
            text = re.sub(r"\b[A-Z]+\b", lambda m: _WORDS.get(m[0], m[0]), line["name"].strip())
            archs = tuple(flag for flag in flags if flag != "hot")
            hot = (archs or ("",)) if "hot" in flags else ()
            for name in expand(text):
                first = by_name.get(name)
                by_name[name] = (
                    Instance(path.name, name, archs, hot)
                    if first is None
                    else replace(first, hot=first.hot + hot)
                )
        yield from by_name.values()


@dataclass(frozen=True, slots=True)
class Result:
    instance: Instance
    seconds: float
    cubin: compiler.Cubin | None = None
    error: str = ""

    @property
    def fault(self) -> str:
        """The problem of the instance, or "" if there is none."""
        if self.cubin is None:
            return "does not compile"
        hot = self.instance.is_hot(self.cubin.arch)
        return "SPILLS" if hot and self.cubin.spilled else ""


def _compile(instance: Instance, arch: str) -> Result:
    start = thread_time()
    try:
        cubin = compiler.compile_instance(instance.file, instance.name, arch)
    except DeviceError as error:
        return Result(instance, thread_time() - start, error=str(error))
    return Result(instance, thread_time() - start, cubin)


def _report(arch: str, results: list[Result], quiet: bool) -> float:
    """Print the table of an architecture and return its core-seconds."""
    width = max(len(r.instance.name) for r in results)
    print(f"sm_{arch}{'':{width - 3}} {'regs':>5} {'smem':>7} {'stack':>6} {'spill':>6} {'s':>6}")
    for r in results:
        numbers = (0, 0, 0, 0)
        if r.cubin is not None:
            numbers = (r.cubin.registers, r.cubin.shared, r.cubin.stack, r.cubin.spilled)
        hot = "hot " * r.instance.is_hot(arch)
        if r.fault or not quiet:
            columns = " ".join(f"{n:>{w}}" for n, w in zip(numbers, (5, 7, 6, 6)))
            print(f"{r.instance.name:{width}} {columns} {r.seconds:6.2f} {hot}{r.fault}")
        if r.error:
            print(r.error, file=sys.stderr)
    total = sum(r.seconds for r in results)
    spills = sum(bool(r.cubin and r.cubin.spilled) for r in results)
    print(f"sm_{arch}: {len(results)} instances, {spills} spill, {total:.1f} core-seconds\n")
    return total


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="sources in backends/cuda/kernels (default: all)")
    parser.add_argument("-a", "--arch", default="90a,80",
                        help="architectures with commas (default: %(default)s)")  # fmt: skip
    parser.add_argument("-j", "--jobs", type=int, default=2, help="number of threads (default: 2)")
    parser.add_argument("--limit", type=float, default=200.0,
                        help="core-seconds for an architecture (default: %(default)g)")  # fmt: skip
    parser.add_argument("-q", "--quiet", action="store_true", help="print only faults and totals")
    args = parser.parse_args()
    paths = [compiler.KERNELS / name for name in args.files]
    declared = list(instances(paths or sorted(compiler.KERNELS.glob("*.cu"))))
    status = 0
    for arch in args.arch.split(","):
        selection = [i for i in declared if not i.archs or arch in i.archs]
        if not selection:
            continue
        with ThreadPoolExecutor(args.jobs) as pool:
            results = list(pool.map(partial(_compile, arch=arch), selection))
        seconds = _report(arch, results, args.quiet)
        if seconds > args.limit:  # only a remark, because it depends on the machine
            print(f"sm_{arch}: more than the limit of {args.limit:g} core-seconds")
        if any(r.cubin is None or (r.fault and arch in BUDGETED) for r in results):
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
