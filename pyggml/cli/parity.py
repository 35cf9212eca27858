"""Compares every op of a backend with its float64 statement, or two places on a model's graph.

pyggml parity                                     every case on every backend
pyggml parity -b numpy -j 2 --quick               at most a minute
pyggml parity -o mul_mat -p 'type_a=q4_K.*ne_b=\\[256,1'
pyggml parity -o 'relu(f32[64,5]@wide)'           this case, in the grid or not
pyggml parity --mode support                      which cases a backend runs, and why not
pyggml parity --mode perf -o mul_mat              time, GFLOPS and GB/s
pyggml parity --mode fuzz -b numpy --seconds 60 --seed 1            random cases
pyggml parity --mode fuzz -b numpy --seconds 60 --seed 1 --graphs   random graphs
pyggml parity -b numpy --case 'x=f32[8]; y=relu(x); plan(y)'        this case or graph
pyggml parity --ops my_ops.py                     ops of your own, against their meanings
pyggml parity --kernel my.py:mul_mat_iq4 -o mul_mat -p type_a=iq4_nl
pyggml parity -m FILE --a numpy --b null          a model's graph (attention of every layer)
pyggml parity -m FILE --script kq-0 --out kq.py   ... and one node of it as a program
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import isfinite

from pyggml import backends
from pyggml.cli import fuzz, model
from pyggml.errors import DeviceError, GraphError, UnknownNameError
from pyggml.graph import Graph
from pyggml.parity import grid, support
from pyggml.parity.alone import contents
from pyggml.parity.case import Case, build
from pyggml.parity.cases import cases
from pyggml.parity.nodes import Walk
from pyggml.parity.oracle import ORACLE
from pyggml.parity.report import script_name, script_path
from pyggml.parity.running import Outcome, outcomes
from pyggml.runtime import places

MODES = ("test", "support", "list", "perf", "fuzz")


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--mode", choices=MODES, default="test", help="what to do with the cases (default: test)")
    add("-o", "--op", metavar="OP[,OP]", help="only these ops, or one case as it is printed")
    add("-p", "--pattern", metavar="REGEX", help="only cases whose text or arguments match")
    add("-b", "--backend", metavar="PLACE", help="only on this place (default: every backend)")
    add("-j", "--jobs", metavar="N", type=model.count, default=1, help="processes (default: 1)")
    add("--quick", action="store_true", help="the small grid: every op in under a minute")
    add("--kernel", metavar="FILE.py:FUNCTION", default="",
        help="use this function as the kernel of the one op that -o names")  # fmt: skip
    add("--case", metavar="TEXT", help="run this case or graph, as a report prints it")
    add("--ops", metavar="FILE.py", default="", help="test the ops that this file defines")
    add("--seconds", metavar="N", type=float, default=60.0, help="of --mode fuzz (default: 60)")
    add("--cases", metavar="N", type=model.count, help="of --mode fuzz: stop after so many")
    add("--graphs", action="store_true", help="of --mode fuzz: whole graphs and their plans")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument(
        "--markdown", action="store_true", help="with --mode support: print docs/ops.md"
    )
    group = parser.add_argument_group("a model's graph on two places, node by node")
    add = group.add_argument
    add("-m", "--model", metavar="FILE", help="a GGUF file, or the first of its parts")
    add("--a", metavar="PLACE", default="numpy", help="the first place (default: numpy)")
    add("--b", metavar="PLACE", default="null", help="the second place (default: null)")
    add("--script", metavar="LABEL", help="write a program that runs only the node with that label")
    add("--out", metavar="FILE.py", help="where --script writes it (default: LABEL.py)")
    model.add_options(group)
    own = {option: option.lstrip("-") for option in (*_GRID, *_MODEL, *_FUZZ)}
    parser.set_defaults(usual={option: parser.get_default(name) for option, name in own.items()})


#: What belongs to the grid alone, and to a model alone.
_GRID = ("--mode", "--op", "--pattern", "--backend", "--jobs", "--quick", "--kernel", "--markdown",
         "--case", "--ops", "--seconds", "--cases", "--graphs")  # fmt: skip
_FUZZ = ("--seconds", "--cases", "--graphs", "--seed")
_MODEL = ("--a", "--b", "--script", "--out", "-c", "-ub", "-ctk", "-fa", "-mla",
          "-fmoe", "--seed")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    for option in _GRID if args.model else (*_MODEL, *_FUZZ):
        if args.mode == "fuzz" and option in _FUZZ:
            continue
        if getattr(args, option.lstrip("-")) != args.usual[option]:
            goes = "does not go" if args.model else "goes only"
            other = " or --mode fuzz" if option == "--seed" and not args.model else ""
            if option in _FUZZ[:3] and not args.model:
                raise GraphError(f"{option} goes only with --mode fuzz")
            raise GraphError(f"{option} {goes} with a model, -m FILE{other}")
    return _of_model(args) if args.model else _of_ops(args)


def _of_model(args: argparse.Namespace) -> int:
    """The report of a model's graph; status 1 where it is not ok."""
    with model.weighted(args.model) as file:
        graph = model.model_graph(file, args)
        outputs = Graph(graph.outputs)
        walk = Walk(outputs, (args.a, args.b), contents(outputs, graph.inputs, graph.states))
        if args.script:  # what is wrong with these is said before everything runs
            walk.node(args.script)
            script_path(args.out or script_name(args.script))
        report = walk.report()
        if args.json:
            print(json.dumps(report.as_dict()))
        else:
            print(report.table())
        if args.script:
            path = report.script(args.script, args.out or script_name(args.script))
            print(f"{path} runs {args.script}", file=sys.stderr)
        elif report.first in report.nodes and not args.json:
            print(f"--script {shlex.quote(report.first.label)} writes the first as a program")
    return 0 if report.ok else 1


def _of_ops(args: argparse.Namespace) -> int:
    if args.markdown and args.mode != "support":
        raise GraphError("--markdown belongs to --mode support")
    one = args.backend or ("numpy" if args.kernel else "")
    names = [one] if one else list(backends.available())
    for name in names:
        place = places.parse(name)  # one that does not exist is named before anything runs
        if place.size is not None:
            raise DeviceError(f"{place} is a description of a device: give it without a size")
    if args.mode == "fuzz":
        return fuzz.run(args, [name for name in names if one or _is_here(name, args.mode)])
    if args.case or args.ops:
        return fuzz.run_texts(args, [name for name in names if one or _is_here(name, args.mode)])
    chosen = select(args.op, args.pattern, args.quick, perf=args.mode == "perf")
    if args.mode == "list":
        print(json.dumps([str(c) for c in chosen]) if args.json else "\n".join(map(str, chosen)))
        return 0
    if not one and args.mode in ("test", "perf"):
        names = [name for name in names if _is_here(name, args.mode)]
    jobs = 1 if args.mode == "perf" else args.jobs
    found = {name: outcomes(chosen, name, args.mode, jobs, args.kernel) for name in names}
    if args.json:
        return _as_json(args.mode, found)
    if args.markdown:
        print(support.table(chosen, {name: list(some) for name, some in found.items()}))
        return 0
    return _as_text(args, found)


def _is_here(name: str, mode: str) -> bool:
    """Whether the backend's device can be used, and measured; says why not."""
    if mode == "perf" and name in backends.STAND_INS:
        print(f"Skipping {name}: its times say nothing about a device (-b {name} measures it)",
              file=sys.stderr)  # fmt: skip
        return False
    try:
        backends.get(name).alloc(0)
    except DeviceError as error:
        print(f"Skipping {name}: {error}", file=sys.stderr)
        return False
    return True


def select(op: str | None, pattern: str | None, quick: bool, perf: bool = False) -> list[Case]:
    """The cases that the options leave; UnknownNameError or GraphError where that is none."""
    if op and "(" in op:
        case = Case.parse(op)
        if case.op not in ORACLE:
            raise UnknownNameError(f"there is no op {case.op!r}")
        build(case, values=False)  # an error of its own, before anything runs
        return [case]
    table = grid.perf_cases() if perf else cases() if quick else grid.all_cases()
    wanted = op.split(",") if op else sorted({case.op for case in table})
    unknown = [name for name in wanted if name not in {case.op for case in table}]
    if unknown:
        known = ", ".join(sorted({case.op for case in table}))
        raise UnknownNameError(f"no cases of {', '.join(unknown)}; there are cases of: {known}")
    try:
        seek = re.compile(pattern or "").search
    except re.error as error:
        raise GraphError(f"-p {pattern!r} is no regular expression: {error}") from None
    chosen = [c for c in table if c.op in wanted and (seek(str(c)) or seek(c.vars))]
    if not chosen:
        raise UnknownNameError(f"-p {pattern!r} matches no case of {', '.join(wanted)}")
    return chosen


def _as_json(mode: str, found: dict[str, Iterator[Outcome]]) -> int:
    told, failed = [], False
    for name, some in found.items():
        rows = [
            {k: v if not isinstance(v, float) or isfinite(v) else str(v) for k, v in row.items()}
            for row in map(asdict, some)
        ]
        failed |= any(row["status"] == "fail" for row in rows)
        told.append({"backend": name, "cases": rows})
    print(json.dumps({"mode": mode, "backends": told}))
    return int(failed)


def _as_text(args: argparse.Namespace, found: dict[str, Iterator[Outcome]]) -> int:
    """test-backend-ops' lines."""
    print(f"Testing {len(found)} devices\n")
    good = 0
    for number, (name, some) in enumerate(found.items(), 1):
        print(f"Backend {number}/{len(found)}: {name}")
        rows = []
        for row in some:
            print(f"  {row.case}: {_LINES[args.mode](row, name)}")
            rows.append(row)
        if args.mode == "test":
            good += _summary(rows, name, args.kernel)
    if args.mode != "test":
        return 0
    print(f"{good}/{len(found)} backends passed")
    print("OK" if good == len(found) else "FAIL")
    return 0 if good == len(found) else 1


def _summary(rows: Sequence[Outcome], name: str, kernel: str) -> bool:
    own = f" --kernel {shlex.quote(kernel)}" if kernel else ""
    run = [row for row in rows if row.status != "unsupported"]
    failed = [row for row in run if row.status == "fail"]
    print(f"  {len(run) - len(failed)}/{len(run)} tests passed", end="")
    print(f", {len(rows) - len(run)} not supported" if len(rows) > len(run) else "")
    if failed:
        print("\nFailing tests:")
        for row in failed:
            print(f"  pyggml parity -b {name}{own} -o {shlex.quote(row.case)}")
    print(f"  Backend {name}: {'FAIL' if failed else 'OK'}\n")
    return not failed


def _test_line(row: Outcome, name: str) -> str:
    if row.status == "unsupported":
        return f"not supported [{name}]: {row.why}"
    op = row.case.partition("(")[0]
    return "OK" if row.status == "ok" else f"[{op}] {row.why} FAIL"


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
