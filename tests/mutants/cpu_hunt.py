"""Mutants of compiled kernels: the source of a module of backends/cpu with one place changed.

NumPy's mutants wrap a kernel; here there is no Python function to wrap when a plan runs. So the
modules of `MODULES` are executed again, one of them changed, in place of the right ones. Then the
kernels are compiled without the cache of object code, and cases and checks run until one fails.

    python -m tests.mutants.cpu_hunt [MODULE ...]      hunts all of them, in five minutes
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pyggml
from pyggml.backends.cpu.rows import WRITABLE
from pyggml.parity.case import Case
from pyggml.parity.cases import cases
from pyggml.parity.running import restored, tested
from tests.cpu import test_cpu_caches as caches
from tests.mutants.cpu_mutant import CpuMutant
from tests.mutants.cpu_mutants import MUTANTS
from tests.mutants.hunt import Fate

PACKAGE = "pyggml.backends.cpu"
FOLDER = Path(pyggml.__file__).parent / "backends" / "cpu"
#: In the order in which they import each other.
MODULES = (
    "row_loops", "decode", "encode", "attention_blocks", "convert", "attention", "reduce", "copy",
    "strided", "sort", "top_k", "moe", "gate", "elementwise", "norm", "merge", "indexer_blocks",
    "indexer", "hyper_connections",
)  # fmt: skip


#: What the grid cannot show: the bytes of encoders, and ops that only loops make.
CHECKS = {
    "encode": [partial(caches.test_rows_are_written_as_numpy_writes_them, t) for t in WRITABLE],
    "merge": [partial(caches.test_merging_is_that_of_numpy, 16, lse) for lse in (False, True)],
}


def changed(mutant: CpuMutant) -> str:
    """The source with the mistake; ValueError if the place is not there, or more than once."""
    source = (FOLDER / f"{mutant.module}.py").read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.module}.py has {source.count(mutant.old)} times {mutant.old!r}")
    return source.replace(mutant.old, mutant.new)


@contextmanager
def installed(mutant: CpuMutant) -> Iterator[None]:
    """Inside the context, the kernels of `MODULES` are those of the changed source."""
    wrong = changed(mutant)
    package = importlib.import_module(PACKAGE)
    names = [f"{PACKAGE}.{name}" for name in MODULES]
    before = {name: importlib.import_module(name) for name in names}
    with (
        restored("cpu"),
        patch(f"{PACKAGE}.native.objects.read", lambda key: None),
        patch(f"{PACKAGE}.native.objects.write", lambda key, code: None),
    ):
        try:
            for name in MODULES:
                path = FOLDER / f"{name}.py"
                text = wrong if name == mutant.module else path.read_text()
                _execute(package, name, path, text)
            yield
        finally:
            for name, module in before.items():
                sys.modules[name] = module
                setattr(package, name.rpartition(".")[2], module)


def _execute(package: ModuleType, name: str, path: Path, text: str) -> None:
    module = ModuleType(f"{PACKAGE}.{name}")
    module.__file__, module.__package__ = str(path), PACKAGE
    sys.modules[module.__name__] = module
    setattr(package, name, module)
    exec(compile(text, str(path), "exec"), module.__dict__)


def cases_of(mutant: CpuMutant) -> list[Case]:
    """The cases of the small grid that may notice; those that share kernels follow one another."""

    def types(case: Case) -> list[str]:
        return [source.type for source in case.sources if source is not None]

    def rank(case: Case) -> tuple[bool, bool, list[str]]:
        names = set(types(case))
        return not names <= {"f32", "i32"}, not names <= {"f32", "f16", "i32"}, types(case)

    own = (case for case in cases() if case.op in mutant.ops)
    return sorted((c for c in own if not mutant.type or mutant.type in types(c)), key=rank)


def hunt(mutants: Iterable[CpuMutant] = MUTANTS) -> Iterator[Fate]:
    """Run each mutant until one of its cases, or a check of its module, fails."""
    for mutant in mutants:
        with installed(mutant):
            killed, why = _killed(mutant)
        yield Fate(mutant.module, mutant.what, killed, why)


def _killed(mutant: CpuMutant) -> tuple[str, str]:
    """The case or check that failed, and why; empty if none did."""
    for case in cases_of(mutant):
        outcome = tested(case, "cpu")
        if outcome.status == "fail":
            return outcome.case, outcome.why
    for check in CHECKS.get(mutant.module, ()):
        try:
            check()
        except AssertionError as error:
            return f"{check.func.__name__}{check.args}", str(error)
    return "", ""


def main(modules: list[str]) -> None:
    chosen = [m for m in MUTANTS if not modules or m.module in modules]
    alive = 0
    for fate in hunt(chosen):
        alive += not fate.killed
        print(f"{fate.op}: {fate.what}: {fate.killed or 'ALIVE'}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} killed")


if __name__ == "__main__":
    main(sys.argv[1:])
