"""The fuzzer: seeds, coverage, wrong kernels, shrinking, deaths, and the command."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyggml.cli import main
from pyggml.errors import GraphError
from pyggml.parity import running
from pyggml.parity.case import Case, build
from pyggml.parity.fuzz import fuzz, sequence
from pyggml.parity.fuzz_cases import OPS, random_case
from pyggml.parity.fuzz_graphs import random_graph
from pyggml.parity.graph_case import GraphCase, PlanText, built
from pyggml.parity.graph_check import check_graph
from pyggml.parity.graph_values import Evaluation
from pyggml.parity.layouts import Layout
from pyggml.parity.shrink import shrunk
from pyggml.parity.worker import Pool, Setup, Worker
from tests.mutants.hunt import MUTANTS, hunt, installed
from tests.mutants.mutant import Mutant

MANY = 1500


@pytest.fixture(scope="module")
def many() -> list[Case]:
    return [random_case(3, number) for number in range(MANY)]


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    """A relu that kills its process for rows of odd length."""
    path = tmp_path / "fatal.py"
    path.write_text(
        "import os\nimport numpy as np\n\n\ndef relu(out, a):\n"
        "    if a.shape[-1] % 2:\n        os.abort()\n    np.maximum(a, 0, out=out)\n"
    )
    return f"{path}:relu"


# -- random cases and graphs --------------------------------------------------------------------


def test_a_seed_draws_the_same_cases_and_graphs() -> None:
    for number in range(30):
        assert str(random_case(5, number)) == str(random_case(5, number))
        assert str(random_graph(5, number, "null")) == str(random_graph(5, number, "null"))
    assert str(random_case(5, 0)) != str(random_case(6, 0))
    assert sequence(Setup("numpy"), 5, True)(3) == str(random_graph(5, 3, "numpy"))


def test_graphs_do_not_depend_on_the_hash_seed() -> None:
    """Python orders sets of strings by a seed that is new in each process."""
    code = (
        "from pyggml.parity.fuzz_graphs import random_graph\n"
        "print(*(random_graph(1, n, 'numpy') for n in range(20)), sep='\\n')"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(texts) == 1 and len(texts.pop()) > 1000


def test_every_text_parses_to_the_same_text(many: list[Case]) -> None:
    for case in many:
        assert str(Case.parse(str(case))) == str(case)
    for number in range(60):
        text = str(random_graph(2, number, "null"))
        assert str(GraphCase.parse(text)) == text


def test_cases_reach_every_op_and_what_grids_missed(many: list[Case]) -> None:
    counts = Counter(case.op for case in many)
    assert set(counts) == OPS
    attentions = [case for case in many if case.op == "flash_attn_ext"]
    sizes = [(c.sources[1].ne[1], c.sources[2].ne[0]) for c in attentions]  # type: ignore[union-attr]
    assert sum(keys > 256 and d_v % 4 != 0 for keys, d_v in sizes) >= 10
    hidden = [c for c in attentions if re.search(r"~(dead|past)\d+", str(c.sources[1]))]
    assert sum("~hide" in str(c) or "~upto" in str(c) for c in hidden) >= 20
    assert sum("i32[1]#" in str(c) for c in hidden) >= 10
    factors = [build(c, values=False).sources[2] for c in many if _has_factors(c)]
    assert sum(f is not None and f.ne[0] > 1 and f.nb[0] != 4 for f in factors) >= 5
    for op, at in (("soft_max_ext", 1), ("soft_max_ext", 2), ("mul_mat_id", 2), ("set_rows", 2)):
        sources = [c.sources[at] for c in many if c.op == op and len(c.sources) > at]
        assert any(s is not None and s.layout for s in sources), (op, at)
    assert {s.type for c in many for s in c.sources if s} >= {"q8_0", "iq2_xxs", "mxfp4", "bf16"}


def _has_factors(case: Case) -> bool:
    return case.op == "rope_ext" and len(case.sources) > 2


def test_graphs_reach_states_views_plans_and_attentions() -> None:
    graphs = [random_graph(4, number, "null") for number in range(150)]
    ops = Counter(s.op for graph in graphs for s in graph.statements)
    assert set(ops) >= {"state", "set_rows", "cpy", "state_of", "view", "permute", "soft_max_ext"}
    assert set(ops) >= {"flash_attn_ext", "mul_mat_id", "top_k", "rope_ext", "rms_norm", "cast"}
    keys = Counter(key for graph in graphs for plan in graph.plans for key in plan.attrs)
    assert set(keys) >= {"amb", "repeat", "on", "pins", "updates"}
    assert sum(len(graph.plans) > 1 for graph in graphs) >= 10
    assert sum(_twice(graph) for graph in graphs) >= 10
    assert any("bind" in p.attrs for n in range(60) for p in random_graph(4, n, "numpy").plans)


def _twice(graph: GraphCase) -> bool:
    """Whether the result of attention goes into a second softmax."""
    of = {s.name: s for s in graph.statements}
    softs = [s for s in graph.statements if s.op == "soft_max_ext" and s.args[0] in of]
    reads = [of[str(s.args[0])] for s in softs]
    return any(r.op == "mul_mat" and _op(of, r.args[1]) == "soft_max_ext" for r in reads)


def _op(of: dict, name: str | None) -> str:
    return str(of[name].op) if name in of else ""


def test_a_layout_has_one_spelling() -> None:
    for text in ("", "b1000a1000", "p0213", "s1211", "p1032b1000a0100s2111"):
        assert str(Layout.parse(text)) == text
    assert Layout.parse("wide") == Layout.parse("b1000a1000")
    for text in ("p0012", "q", "s0111", "wider"):
        assert Layout.parse(text) is None
    with pytest.raises(GraphError, match="is not a source"):
        Case.parse("relu(f32[4]@p0012)")


# -- wrong kernels, and how failures are reported -----------------------------------------------


def test_a_case_shrinks_while_it_fails_in_the_same_way() -> None:
    def run(text: str) -> str | None:
        case = Case.parse(text)
        first = case.sources[0]
        assert first is not None
        return "NaN at 3 wrong places" if first.ne[0] > 4 and first.type == "f16" else None

    text = "add(f16[129,7,3]~nan@p0213s1211, f16[129,1,3]@weight)"
    small, why = shrunk(text, "NaN at 77 wrong places", run)
    assert small == "add(f16[5], f16[5])" or len(small) <= 24, small
    assert why == "NaN at 3 wrong places" and run(small)


def test_a_graph_shrinks() -> None:
    text = (
        "x=f32[64,5]@wide; s=state(f32[64,6]); i=i32[5]!6; w=set_rows(s, x, i); a=relu(w); "
        "b=tanh(a); c=add(b, w); d=silu(c); plan(d, b, updates='w', repeat=2); plan(a)"
    )
    small, _ = shrunk(text, "boom", lambda t: "boom" if "tanh" in t and "plan" in t else None)
    assert len(GraphCase.parse(small).statements) == 2 and "repeat" not in small, small


def test_a_wrong_kernel_is_found_in_few_cases(tmp_path: Path) -> None:
    """It drops the last of an odd number of columns; the failing case is shrunk."""
    path = tmp_path / "wrong.py"
    path.write_text(
        "import numpy as np\n\n\ndef soft(out, a, b):\n    np.add(a, 0, out=out)\n"
        "    n = a.shape[-1] - (a.shape[-1] > 64 and a.shape[-1] % 2)\n"
        "    for axis, size in enumerate(a.shape):\n"
        "        b = np.take(b, np.arange(size) % b.shape[axis], axis=axis)\n"
        "    out[..., :n] += b[..., :n]\n"
    )
    setup = Setup("numpy", kernel=f"{path}:soft", ops=frozenset({"add"}))
    tally = fuzz(setup, 60, seed=1, most=200)
    assert tally.cases == 200 and tally.failed >= 3 and not tally.deaths
    (failure, *_) = [f for f in tally.failures if "NMSE" in f.why]
    size = re.fullmatch(r"add\(\w+\[(\d+)\]\S*, \w+\[\d+\]\S*\)", failure.small)
    assert size and int(size[1]) % 2 and 64 < int(size[1]) < 130, failure.small


def test_mutants_die_in_random_cases_too() -> None:
    """A fourth of all mutants, in far fewer cases than the small grid has."""

    def few(op: str) -> Iterator[Case]:
        return (random_case(1, number, frozenset({op})) for number in range(600))

    alive = [fate for fate in hunt(MUTANTS[::4], few) if not fate.killed]
    assert not alive


@pytest.mark.parametrize("op", ["mul_mat", "flash_attn_ext", "multi_add", "soft_max_ext"])
def test_the_allowance_for_cancellation_hides_no_imprecise_kernel(op: str) -> None:
    """An NMSE of twice the bound shows in a third of the cases."""

    def imprecise(right: Any, out: Any, *sources: Any, **attrs: Any) -> None:
        right(out, *sources, **attrs)
        if out.dtype == np.float32:
            noise = np.random.default_rng(0).standard_normal(out.shape)
            out *= (1 + (2e-10) ** 0.5 * noise).astype(np.float32)

    with installed(Mutant(op, "imprecise", imprecise)):
        outcomes = [running.tested(random_case(1, n, frozenset({op})), "numpy") for n in range(60)]
    assert sum("NOT within" in outcome.why for outcome in outcomes) >= 20


def test_the_tail_of_an_activation_may_be_as_wrong_as_f32_near_1() -> None:
    """GELU(-5) is -1e-6. An f32 kernel is off by its epsilon times |x y|; more is an error."""
    text = (
        "moe_up_gate(bf16[29,1,1]@weight, bf16[29,1,1]@weight@p0213b0022a0200s1233, f16[29,1,1], "
        "i32[2,1]<1@p0132b2220a2101, act='gelu', prec='f32')"
    )  # -2.99e-6 for -2.08e-6, from f32's 1 + tanh(x)
    assert running.tested(Case.parse(text), "numpy").status == "ok"

    def off(right: Any, out: Any, *sources: Any, **attrs: Any) -> None:
        right(out, *sources, **attrs)
        out += np.float32(1e-4)

    with installed(Mutant("moe_up_gate", "a little more", off)):
        assert running.tested(Case.parse(text), "numpy").status == "fail"


def test_a_product_that_cancels_has_the_noise_of_its_terms() -> None:
    case = GraphCase.parse("a=f32[2,2]; x=f32[2]; n=mul_mat(a, x); plan(n)")
    builder = built(case)
    builder.values |= {
        "a": np.array([[[[3.0, 3.0], [3.0, 0.0]]]]),
        "x": np.array([[[[1.0, -1.0]]]]),
    }
    exact = Evaluation(builder, {}, {}, 0).values["n"].array
    noisy = Evaluation(builder, {}, {"mul_mat": 1e-3}, 1).values["n"].array
    assert exact.ravel().tolist() == [0.0, 3.0]
    assert 0 < abs(noisy.ravel()[0]) < 0.01


@pytest.mark.parametrize(
    ("op", "what"),
    [
        ("mul_mat", "sums in f16"),
        ("flash_attn_ext", "sums in f16"),
        ("rms_norm", "divides by n - 1, not n"),
        ("set_rows", "drops the last row"),
    ],
)
def test_wrong_kernels_are_found_in_graphs(op: str, what: str) -> None:
    (mutant,) = [m for m in MUTANTS if (m.op, m.what) == (op, what)]
    graphs = (random_graph(9, number, "numpy") for number in range(60))
    chosen = [graph for graph in graphs if any(s.op == op for s in graph.statements)]
    plain = [replace(g, plans=tuple(_plain(plan) for plan in g.plans)) for g in chosen[:12]]
    assert not any(check_graph(graph, "numpy") for graph in plain)
    with installed(mutant):
        assert any("NOT within" in check_graph(graph, "numpy") for graph in plain)


def _plain(plan: PlanText) -> PlanText:
    """The plan without a budget."""
    return replace(plan, attrs={key: value for key, value in plan.attrs.items() if key != "amb"})


def test_a_death_is_reported_with_its_case_and_the_others_run(kernel: str) -> None:
    setup = Setup("numpy", kernel=kernel, ops=frozenset({"relu"}))
    texts = ["relu(f32[4])", "relu(f32[5])", "relu(f32[6])"]
    with Pool(setup) as pool:
        assert [(o.status, o.why) for o in pool.run(texts)] == [
            ("ok", ""), ("fail", "died: SIGABRT"), ("ok", ""),
        ]  # fmt: skip
        assert pool.deaths == 1


def test_a_case_that_never_ends_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "slow.py"
    path.write_text("import time\n\n\ndef relu(out, a):\n    time.sleep(60)\n")
    setup = Setup("numpy", kernel=f"{path}:relu", ops=frozenset({"relu"}))
    (outcome,) = Worker(setup, patience=0.3).run(["relu(f32[4])"])
    assert outcome.status == "fail" and outcome.why.startswith("hung")


# -- the command --------------------------------------------------------------------------------


def test_the_command_prints_how_to_rerun_the_failure(
    kernel: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--mode", "fuzz", "-b", "numpy", "--kernel", kernel, "-o", "relu", "--cases", "9"]
    assert main(["parity", *words]) == 1
    out = capsys.readouterr().out
    again = re.search(r"^ +pyggml (parity .*)$", out, re.MULTILINE)
    assert again and "ended the process" in out and "died: SIGABRT" in out
    assert main(shlex.split(again[1])) == 1
    assert main(["parity", "-b", "numpy", "--case", "x=f32[5]; y=relu(x); plan(y)"]) == 0


def test_a_short_run_passes(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--mode fuzz -b numpy --cases 40 --seed 2 -o add,concat"
    assert main(["parity", *words.split()]) == 0
    assert re.search(r"40 cases of 2 ops in .* 0 failed, 0 not supported", capsys.readouterr().out)


def test_options_of_other_modes_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("--graphs", "--mode test --seconds 3", "--mode fuzz --graphs -o relu"):
        assert main(["parity", "-b", "numpy", *words.split()]) != 0
    assert "needs --mode fuzz" in capsys.readouterr().err


OWN = '''
import numpy as np

from pyggml import ops
from pyggml.define import Node, op
from pyggml.backends.numpy.table import kernel


@op
def swish(a: Node, *, beta: float = 1.0):
    """y = a sigmoid(beta a)"""
    return a.spec


@swish.means
def _(a, *, beta):
    return ops.mul(a, ops.sigmoid(ops.scale(a, s=beta)))


@kernel(swish, types=None)
def swish_of_rows(out, a, *, beta):
    np.divide(a, 1 + np.exp(-beta * a), out=out)
    if FAULT and a.strides[-1] != a.itemsize:
        out += 1
'''


@pytest.mark.parametrize("fault", [False, True])
def test_own_ops_against_their_meanings(
    fault: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that is wrong for strided sources only must fail."""
    path = tmp_path / "own.py"
    path.write_text(f"FAULT = {fault}\n{OWN}")
    assert main(["parity", "-b", "numpy", "--ops", str(path)]) == fault
    out = capsys.readouterr().out
    assert re.search(
        r"^numpy: swish: \d{2,} cases, \d+ failed, 0 not supported$", out, re.MULTILINE
    )
    assert ("swish(f" in out and "swish.means(" not in out) == fault
