"""Test every op of a backend against float64, or compare two places on a model's graph.

pyggml parity -b numpy --quick -o relu,mul_mat
pyggml parity -b numpy --mode fuzz --seconds 60 --seed 1
pyggml parity -b numpy --case 'x=f32[8]; y=relu(x); plan(y)'   a case or graph that a report prints
pyggml parity -m FILE --a numpy --b null   all layers of a model, node by node

Without -b, it tests every backend. docs/parity.md has more examples.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pyggml import backends
from pyggml.cli import fuzz, model, options
from pyggml.cli.options import UsageError, wrong_usage
from pyggml.cli.terminal import print_json, verdict
from pyggml.errors import DeviceError, UnknownNameError
from pyggml.graph import Graph
from pyggml.parity import grid, support
from pyggml.parity.alone import contents
from pyggml.parity.case import Case, build
from pyggml.parity.cases import cases
from pyggml.parity.nodes import Walk
from pyggml.parity.oracle import ORACLE
from pyggml.parity.report import script_name, script_path
from pyggml.parity.running import Outcome, check_kernel, checked, outcomes
from pyggml.runtime import places
from pyggml.words import counted

MODES = ("test", "support", "list", "perf", "fuzz")


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--mode", choices=MODES, default="test", help="what to do with the cases (default: test)")
    add("-o", "--op", metavar="OP[,OP]", help="only these ops, or one case as a report prints it")
    add("-p", "--pattern", metavar="REGEX", type=options.regex,
        help="only cases whose text or arguments match")  # fmt: skip
    add("-b", "--backend", metavar="PLACE", type=options.place,
        help="only on this place (default: every backend)")  # fmt: skip
    add("-j", "--jobs", metavar="N", type=options.count, default=1,
        help="number of processes (default: 1)")  # fmt: skip
    add("--quick", action="store_true", help="the small grid: every op in under a minute")
    add("--kernel", metavar="FILE.py:FUNCTION", default="",
        help="test this function as the kernel of the op in -o")  # fmt: skip
    add("--case", metavar="TEXT", help="run this case or graph, as a report prints it")
    add("--ops", metavar="FILE.py", default="", help="test the ops that this file defines")
    add("--seconds", metavar="N", type=options.positive, default=60.0,
        help="with --mode fuzz: how long to run (default: 60)")  # fmt: skip
    add("--cases", metavar="N", type=options.count, help="with --mode fuzz: stop after N cases")
    add("--graphs", action="store_true", help="with --mode fuzz: whole graphs and their plans")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument(
        "--markdown", action="store_true", help="with --mode support: print docs/ops.md"
    )
    group = parser.add_argument_group("a model's graph on two places, node by node")
    add = group.add_argument
    add("-m", "--model", metavar="FILE", help="a GGUF file, or the first of its parts")
    add("--a", metavar="PLACE", type=options.place, default="numpy",
        help="the first place (default: numpy)")  # fmt: skip
    add("--b", metavar="PLACE", type=options.place, default="null",
        help="the second place (default: null)")  # fmt: skip
    add("--script", metavar="LABEL", help="write a program that runs the node with this label")
    add("--out", metavar="FILE.py", help="file for --script (default: LABEL.py)")
    model.add_options(group)
    names = {option: option.lstrip("-") for option in (*_GRID, *_MODEL, *_FUZZ)}
    defaults = {option: parser.get_default(name) for option, name in names.items()}
    parser.set_defaults(defaults=defaults)


#: Options that need a run without a model, --mode fuzz, or a model.
_GRID = ("--mode", "--op", "--pattern", "--backend", "--jobs", "--quick", "--kernel", "--markdown",
         "--case", "--ops", "--seconds", "--cases", "--graphs")  # fmt: skip
_FUZZ = ("--seconds", "--cases", "--graphs", "--seed")
_MODEL = ("--a", "--b", "--script", "--out", "-c", "-ub", "-ctk", "-ctv", "-cti",
          "-fa", "-mla", "-fmoe", "--seed")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    for option in _GRID if args.model else (*_MODEL, *_FUZZ):
        if args.mode == "fuzz" and option in _FUZZ:
            continue
        if getattr(args, option.lstrip("-")) != args.defaults[option]:
            if args.model:
                raise UsageError(f"{option} does not work with a model, -m FILE; leave one out")
            if option in _FUZZ[:3]:
                raise UsageError(f"{option} needs --mode fuzz")
            other = " or --mode fuzz" if option == "--seed" else ""
            raise UsageError(f"{option} needs a model, -m FILE{other}")
    return _of_model(args) if args.model else _of_ops(args)


def _of_model(args: argparse.Namespace) -> int:
    """Print the report of a model's graph; status 1 if the places differ."""
    with model.weighted(args.model) as file:
        graph = model.model_graph(file, args)
        outputs = Graph(graph.outputs)
        walk = Walk(outputs, (args.a, args.b), contents(outputs, *graph.values(args.seed)))
        if args.script:  # raise errors of these arguments before the long run
            walk.node(args.script)
            with wrong_usage():
                script_path(args.out or script_name(args.script))
        report = walk.report()
        if args.json:
            print_json(report.as_dict())
        else:
            print(report.table())
        if args.script:
            path = report.script(args.script, args.out or script_name(args.script))
            print(f"{path} runs {args.script}", file=sys.stderr)
        elif report.first in report.nodes and not args.json:
            label = shlex.quote(report.first.label)
            print(f"--script {label} writes the first failing node as a program")
    return 0 if report.ok else 1


def _of_ops(args: argparse.Namespace) -> int:
    if args.markdown and args.mode != "support":
        raise UsageError("--markdown needs --mode support")
    if args.graphs and (args.op or args.kernel):
        raise UsageError("--graphs draws from all ops; use it without -o and --kernel")
    place_name = args.backend or ("numpy" if args.kernel else "")
    names = [place_name] if place_name else list(backends.available())
    for name in names:
        place = places.parse(name)
        if place.size is not None:
            raise UsageError(
                f"{place} is a description of a device, for planning only; leave out the size"
            )
    selection: list[Case] = []
    with wrong_usage():
        if args.case:
            checked(args.case, args.ops)
        elif args.mode != "fuzz" and not args.ops:
            selection = select(args.op, args.pattern, args.quick, perf=args.mode == "perf")
        if args.kernel and not args.ops:
            texts = [args.case] if args.case else list(map(str, selection))
            check_kernel(args.kernel, names[0], fuzz.ops_of(args, texts))
    if args.mode == "fuzz":
        return fuzz.run(args, [name for name in names if place_name or _usable(name, args.mode)])
    if args.case or args.ops:
        usable = [name for name in names if place_name or _usable(name, args.mode)]
        return fuzz.run_texts(args, usable)
    if args.mode == "list":
        texts = list(map(str, selection))
        if args.json:
            print_json({"mode": "list", "cases": texts})
        else:
            print("\n".join(texts))
        return 0
    if not place_name and args.mode in ("test", "perf"):
        names = [name for name in names if _usable(name, args.mode)]
    jobs = 1 if args.mode == "perf" else args.jobs
    results = {name: outcomes(selection, name, args.mode, jobs, args.kernel) for name in names}
    if args.json:
        return _as_json(args.mode, results)
    if args.markdown:
        print(support.table(selection, {name: list(rows) for name, rows in results.items()}))
        return 0
    return _as_text(args, results)


def _usable(name: str, mode: str) -> bool:
    """Whether the backend's device exists and, for --mode perf, is real; prints why not."""
    if mode == "perf" and name in backends.STAND_INS:
        print(f"Skipping {name}: it is a stand-in for a device (use -b {name} to measure it)",
              file=sys.stderr)  # fmt: skip
        return False
    try:
        backends.get(name).alloc(0)
    except DeviceError as error:
        print(f"Skipping {name}: {error}", file=sys.stderr)
        return False
    return True


def select(op: str | None, pattern: str | None, quick: bool, perf: bool = False) -> list[Case]:
    """The cases that the options select; a PyggmlError if there are none."""
    if op and "(" in op:
        case = Case.parse(op)
        if case.op not in ORACLE:
            raise UnknownNameError(f"there is no op {case.op!r}")
        build(case, values=False)  # raises if the case is not valid
        return [case]
    table = grid.perf_cases() if perf else cases() if quick else grid.all_cases()
    ops = op.split(",") if op else sorted({case.op for case in table})
    unknown = [name for name in ops if name not in {case.op for case in table}]
    if unknown:
        known = ", ".join(sorted({case.op for case in table}))
        raise UnknownNameError(f"no cases of {', '.join(unknown)}; there are cases of: {known}")
    search = re.compile(pattern or "").search
    selection = [c for c in table if c.op in ops and (search(str(c)) or search(c.vars))]
    if not selection:
        raise UnknownNameError(f"-p {pattern!r} matches no case of {', '.join(ops)}")
    return selection


def _as_json(mode: str, results: dict[str, Iterator[Outcome]]) -> int:
    reports: list[dict[str, Any]] = [
        {"backend": name, "cases": [asdict(row) for row in rows]} for name, rows in results.items()
    ]
    print_json({"mode": mode, "backends": reports})
    return int(any(row["status"] == "fail" for report in reports for row in report["cases"]))


def _as_text(args: argparse.Namespace, results: dict[str, Iterator[Outcome]]) -> int:
    """Print the results in the format of llama.cpp's test-backend-ops."""
    print(f"Testing {counted(len(results), 'device')}\n")
    good = 0
    for number, (name, result) in enumerate(results.items(), 1):
        print(f"Backend {number}/{len(results)}: {name}")
        rows = []
        for row in result:
            print(f"  {row.case}: {_LINES[args.mode](row, name)}")
            rows.append(row)
        if args.mode == "test":
            good += _summary(rows, name, args.kernel)
    if args.mode != "test":
        return 0
    print(f"{good}/{len(results)} backends passed")
    print(verdict(good == len(results)))
    return 0 if good == len(results) else 1


def _summary(rows: Sequence[Outcome], name: str, kernel: str) -> bool:
    option = f" --kernel {shlex.quote(kernel)}" if kernel else ""
    run = [row for row in rows if row.status != "unsupported"]
    failed = [row for row in run if row.status == "fail"]
    print(f"  {len(run) - len(failed)}/{len(run)} tests passed", end="")
    print(f", {len(rows) - len(run)} not supported" if len(rows) > len(run) else "")
    if failed:
        print("\nFailing tests:")
        for row in failed:
            print(f"  pyggml parity -b {name}{option} -o {shlex.quote(row.case)}")
    print(f"  Backend {name}: {verdict(not failed)}\n")
    return not failed


def _test_line(row: Outcome, name: str) -> str:
    if row.status == "unsupported":
        return f"not supported [{name}]: {row.why}"
    op = row.case.partition("(")[0]
    return verdict(True) if row.status == "ok" else f"[{op}] {row.why} {verdict(False)}"


def _support_line(row: Outcome, name: str) -> str:
    return f"NOT SUPPORTED ({row.why})" if row.status == "unsupported" else "SUPPORTED"


def _perf_line(row: Outcome, name: str) -> str:
    if row.status == "unsupported":
        return _test_line(row, name)
    seconds = row.us / 1e6
    return (
        f"{row.runs} runs - {row.us:.2f} us/run - {row.flops / 1e9:.3f} GFLOP/run - "
        f"{row.flops / seconds / 1e9:.2f} GFLOPS - {row.nbytes / 1024:.0f} kB/run - "
        f"{row.nbytes / seconds / 2**30:.2f} GB/s"
    )


_LINES = {"test": _test_line, "support": _support_line, "perf": _perf_line}
