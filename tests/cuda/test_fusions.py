"""Fusions of the CUDA backend: which nodes share a step, and which must not. Needs no GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.cuda import fusion, patterns
from pyggml.backends.cuda.device.compiler import KERNELS
from pyggml.backends.cuda.fusion import Fused, Run, covered
from pyggml.backends.cuda.lowering import lower
from pyggml.parity.patterns import PATTERNS, pattern

ROW = "rms_norm mul rope_ext concat set_rows"
COMPRESSOR = (
    "get_rows add set_rows set_rows get_rows get_rows add cont cont soft_max_ext mul sum_rows "
    "rms_norm mul rope_ext set_rows"
)
HYPER = "rms_norm mul_mat dsv4_hc_maps mul_multi_add rms_norm mul"
FIXED = HYPER.replace("rms_norm mul", "rms_norm fixed_point mul").replace(
    "fixed_point mul_mat", "mul_mat"
)
SCORES = "mul_mat soft_max_ext mul_mat"
BOTH = "flash_attn_ext flash_attn_ext merge_lse rope_ext"
SOFTMAX = "mul_mat soft_max_ext top_k get_rows"
SIGMOID = "mul_mat sigmoid add grouped_topk get_rows sum_rows clamp div scale"
OWN_SIGMOID = SIGMOID.replace("get_rows", "get_rows get_rows")
EXPERTS = "moe_up_gate mul_mat_id"
SHARED = f"{EXPERTS} fused_up_gate mul_mat mul_multi_add add"
FIXED_NORM = "add rms_norm fixed_point mul"
NORM = "rms_norm mul"
HALVES = "rms_norm halves mul"
#: The ops of each step that has several.
FUSED = {
    "norm_and_products": ["add rms_norm fixed_point mul", "add rms_norm mul"],
    "norms_of_a_prompt": [HALVES, f"add {HALVES}", HALVES, HALVES, HALVES],
    "layer_norms": ["norm mul add", "norm mul", "norm mul", "norm mul"],
    "shared_activations": ["mul_mat mul_mat"],
    "experts": ["soft_max_ext top_k get_rows", "mul_multi_add add add"],
    "experts_of_a_prompt": ["mul_mat_id mul_multi_add add", f"{EXPERTS} mul_multi_add"],
    "feed_forward_of_a_prompt": [HALVES, f"{EXPERTS} mul_multi_add"],
    "norms_behind_experts": [f"mul_mat_id mul_multi_add add add {HALVES}"] * 4,
    "grouped_experts": ["sigmoid add grouped_topk get_rows sum_rows clamp div scale"],
    "root_routing": ["softplus sqrt add top_k get_rows sum_rows clamp div scale"],
    "given_routing": ["softplus sqrt get_rows sum_rows clamp div scale"],
    "divided_weights": ["soft_max_ext add top_k get_rows sum_rows clamp div"],
    "experts_of_devices": [
        "soft_max_ext top_k get_rows get_rows sum_rows clamp div scale",
        "soft_max_ext top_k get_rows sum_rows clamp div scale",
    ],
    "probabilities_kept": [],
    "shared_mask": ["causal_mask flash_attn_ext"] * 2,
    "hidden_rows": ["causal_mask flash_attn_ext"] * 6,
    "attention_of_a_prompt": ["causal_mask halves flash_attn_ext"] * 4,
    "attention_of_a_prompt_bf16": ["causal_mask flash_attn_ext"],
    "chosen_rows": ["causal_mask flash_attn_ext"] * 2,
    "indexed_rows": [],
    "moved_list": [],
    "mask_kept": [],
    "keys_of_heads": ["mul_mat repeat concat"] * 2,
    "scores_of_heads": [f"causal_mask {SCORES}"] * 3 + [SCORES],
    "scores_bf16": [SCORES],
    "scores_of_f32": [SCORES],
    "scores_of_moved_position": [SCORES],
    "scores_kept": [],
    "strided_mask": ["causal_mask flash_attn_ext"],
    "moved_position": [],
    "squares": [],
    "odd_routing": ["soft_max_ext top_k get_rows"],
    "flat_weights": ["soft_max_ext top_k get_rows"],
    "small_numbers": [
        "cast fill div cast cast scale sub cast cont add scale clamp cont scale",
        "mul scale div add sub",
    ],
    **{
        f"joined_products{kind}": [
            "rms_norm fixed_point mul",
            "mul_mat mul_mat mul_mat",
            "mul_mat mul_mat",
        ]
        for kind in ("", "_of_tokens", "_of_many")
    },
    **{f"turned_products{kind}": ["mul_mat cont"] * 2 for kind in ("", "_q8_0")},
    "products_behind_norms": [f"{NORM} mul_mat mul_mat mul_mat", f"add {NORM} mul_mat mul_mat"],
    "attention_to_a_window": ["flash_attn_ext fixed_point rope_ext"],
    **{f"attention_to_both{kind}": [f"causal_mask {BOTH}"] for kind in ("", "_bf16")},
    **{f"attention_to_lists{kind}": [f"causal_mask {BOTH}"] for kind in ("", "_q8_0")},
    "norm_and_rope": [
        "rms_norm rope_ext",
        "rms_norm mul rope_ext",
        "rms_norm mul rope_ext rope_ext",
    ],
    **{
        f"norm_rope_row_{kind}": ["rms_norm mul rope_ext set_rows"] * 2
        for kind in ("f16", "bf16", "q8_0")
    },
    **{f"turned_rows{kind}": ["rope_ext rope_ext set_rows"] for kind in ("", "_of_tokens")},
    **{
        f"rows_of_token{kind}": [
            f"rms_norm rope_ext rope_ext rms_norm mul rope_ext set_rows {COMPRESSOR} {COMPRESSOR}"
        ]
        for kind in ("", "_q8_0", "_neox")
    },
    **{
        f"compressor{kind}": [COMPRESSOR]
        for kind in (
            "",
            "_of_pairs_q8_0",
            "_of_tokens_bf16",
            "_of_many",
            "_of_many_pairs_q8_0",
            "_of_many_waiting",
            "_waiting",
        )
    },
    **{
        f"values_of_{heads}": ["causal_mask flash_attn_ext fixed_point mul_mat"]
        for heads in ("heads", "heads_q8_0", "many_heads_in_lists")
    },
    **{
        f"values_of_{heads}": ["causal_mask flash_attn_ext mul_mat fixed_point cont"]
        for heads in ("heads_bf16", "heads_in_lists", "long_heads_in_lists")
    },
    "values_of_heads_kept": ["causal_mask flash_attn_ext", "mul_mat cont"],
    **{
        f"hyper_connections{kind}": [
            FIXED,
            f"dsv4_hc_post {HYPER}",
            f"mul_multi_add add dsv4_hc_post {HYPER}",
        ]
        for kind in ("", "_of_tokens", "_of_three")
    },
    "experts_of_token": [f"add {NORM} {SOFTMAX} {SHARED} add"],
    "experts_of_two_tokens": [FIXED_NORM, f"{SOFTMAX} {SHARED} add"],
    **{
        f"experts_of_{tokens}_alone": [FIXED_NORM, f"{SOFTMAX} {EXPERTS} mul_multi_add add"]
        for tokens in ("token", "tokens")
    },
    **{f"experts_of_{tokens}": [f"{SIGMOID} {SHARED}"] for tokens in ("token_grouped", "tokens")},
    "experts_of_device_alone": [f"add {NORM} {SOFTMAX} get_rows {EXPERTS} mul_multi_add add"],
    "experts_of_device_grouped": [f"{OWN_SIGMOID} {SHARED}"],
    **{
        f"experts_of_{part}": [f"add {NORM} {SOFTMAX} get_rows {SHARED} add"]
        for part in ("device", "others")
    },
    "experts_of_tokens_and_device": [FIXED_NORM, f"{SOFTMAX} get_rows {SHARED} add"],
    "experts_of_others_alone": [f"{OWN_SIGMOID} {EXPERTS} mul_multi_add"],
    **{
        f"absorbed_queries{kind}": [f"rope_ext mul_mat concat {ROW}"]
        for kind in ("", "_q8_0", "_of_tokens", "_of_two_q8_0")
    },
    "absorbed_queries_kept": [ROW],
    "gated": ["silu mul", "relu mul"],
    "turned_f16": ["rope_ext set_rows"],
    "turned_bf16": ["rope_ext set_rows"],
    "scored_rows": ["scale lightning_indexer"],
    **{f"latent_row_{t}_{m}": [ROW] for t in ("f16", "bf16", "q8_0") for m in ("normal", "neox")},
}


def plan_of(name: str) -> gg.Plan:
    return gg.compile(pattern(name).outputs, backends=["cuda:0:24GiB"])


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_become_steps(name: str) -> None:
    several = [step for step in plan_of(name).steps if len(step.nodes) > 1]
    assert [" ".join(n.op.name for n in step.nodes) for step in several] == FUSED[name]


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_give_the_same_results_on_numpy_and_null(name: str) -> None:
    graph = pattern(name)
    expected = gg.compile(graph.outputs).run(graph.inputs)
    results = gg.compile(graph.outputs, backends=["null:0"]).run(graph.inputs)
    for key, values in expected.items():
        np.testing.assert_array_equal(results[key], values)


def test_rows_that_a_causal_mask_hides_never_show() -> None:
    graph = pattern("hidden_rows")
    for values in gg.compile(graph.outputs).run(graph.inputs).values():
        assert np.isfinite(values).all()


def test_activations_are_prepared_once() -> None:
    """One step for two products of the same rows; a view of other rows prepares its own."""
    steps = plan_of("shared_activations").steps
    (preparation,) = (step for step in steps if step.node.op.name == "fixed_point")
    readers = [step for step in steps if preparation.node in step.reads]
    assert [[node.ne[1] for node in step.nodes] for step in readers] == [[5, 5]]


@pytest.mark.parametrize(
    ("name", "alone", "kept"),
    [("norms_of_a_prompt", 1, 4), ("attention_of_a_prompt", 3, 1)],
)
def test_results_that_are_read_only_as_f16_are_unread(name: str, alone: int, kept: int) -> None:
    """Outputs are read in another form, too."""
    work = plan_of(name)._work
    steps = [s for s in work.steps if isinstance(s, fusion.CudaStep)]
    left = [step for step in steps if "halves" in step.results]
    assert all(step.unread == (step.node not in work.graph.roots) for step in left)
    assert [sum(s.unread for s in left), len(left)] == [alone, alone + kept]
    assert not any(step.unread for step in steps if step not in left)


@pytest.mark.parametrize("other", ("silu", "experts", "part"))
def test_results_with_other_readers_are_not_unread(other: str) -> None:
    """Another op, experts that order rows themselves, and a product of some of the columns."""
    k, n = 64, 150
    x, row = gg.input("x", ne=(k, n)), gg.constant(np.ones(k, np.float32), name="row")
    y = gg.mul(gg.rms_norm(x, eps=1e-6), row)
    wide, w = (gg.constant(np.ones((24, k)), dtype="q8_0", name=name) for name in ("wide", "w"))
    experts = gg.constant(np.ones((2, 24, k)), dtype="q8_0", name="experts")
    ids = gg.input("ids", "i32", ne=(1, n))
    outputs = {
        "silu": lambda: gg.silu(y),
        "experts": lambda: gg.mul_mat_id(experts, gg.reshape(y, ne=(k, 1, n)), ids),
        "part": lambda: gg.mul_mat(w, gg.view(y, ne=(k, 100))),
    }
    for more, unread in (({}, True), ({"more": outputs[other]()}, False)):
        steps = gg.compile({"y": gg.mul_mat(wide, y), **more}, backends=["cuda:0:24GiB"]).steps
        (norm,) = (s for s in steps if isinstance(s, fusion.CudaStep) and "halves" in s.results)
        assert norm.unread == unread


def test_lists_take_positions_instead_of_a_mask_that_others_need() -> None:
    for name, reads in (("indexed_rows", "pos"), ("moved_list", "mask")):
        steps = [step for step in plan_of(name).steps if step.node.op is gg.flash_attn_ext]
        (step,) = (step for step in steps if isinstance(step, fusion.CudaStep))
        assert {"pos", "mask"} & set(step.operands) == {reads}


def nodes_of(name: str) -> list[gg.Node]:
    nodes = gg.Graph(pattern(name).outputs).nodes
    return [n for n in nodes if not n.op.leaf and n.op.view is None]


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_can_be_left_out(name: str) -> None:
    """Without fusion, every node is one step, with the operands of its kernel in the table."""
    nodes = nodes_of(name)
    steps = lower(nodes, set(), fuse=False)
    assert [step.nodes for step in steps] == [(node,) for node in nodes]
    for step, node in zip(steps, nodes):
        assert isinstance(step, fusion.CudaStep)
        assert step.operands == {n: node[n] for n in node.op.operands if node.get(n) is not None}


def test_the_first_pattern_that_matches_wins() -> None:
    """One row of a norm times an activation is both a gated row and a weighted norm."""
    x, g = gg.input("x", ne=(256,)), gg.input("g", ne=(256,))
    y = gg.mul(gg.rms_norm(x, eps=1e-6), gg.relu(g))
    nodes = [n for n in gg.Graph({"y": y}).nodes if not n.op.leaf]
    orders = (patterns.PATTERNS, patterns.PATTERNS[::-1])
    steps = [
        next(s for s in covered(nodes, set(), order) if isinstance(s, Fused)) for order in orders
    ]
    assert [[n.op.name for n in s.nodes] for s in steps] == [["relu", "mul"], ["rms_norm", "mul"]]


def test_every_pattern_is_listed_once() -> None:
    """A pattern that patterns.py does not list would never match."""
    defined = {
        f"{path.stem}.{name}"
        for path in Path(fusion.__file__).parent.rglob("*.py")
        for name in re.findall(r"^def ([a-z]\w+)\(node: Node, run: Run\)", path.read_text(), re.M)
    }
    listed = [f"{m.__module__.rpartition('.')[2]}.{m.__name__}" for m, _ in patterns.PATTERNS]
    assert sorted(listed) == sorted(defined)


@pytest.mark.parametrize("weight", ("up", "up_s"))
def test_experts_of_a_token_need_up_and_gate_in_one_layout(weight: str) -> None:
    """A weight that a view reads stays as in the file, while its partner is in tiles."""
    y = pattern("experts_of_token").outputs["y"]
    (leaf,) = (n for n in gg.Graph({"y": y}).nodes if n.attrs.get("name") == weight)
    part = gg.mul_mat(gg.view(leaf, ne=leaf.ne[:2]), gg.relu(gg.input("other", ne=(leaf.ne[0], 1))))
    for more, fused in (({}, True), ({"part": part}, False)):
        steps = gg.compile({"y": y, **more}, backends=["cuda:0:24GiB"])._work.steps
        (step,) = (s for s in steps for n in s.nodes if n.op is gg.moe_up_gate)
        gates = [n for n in step.nodes if n.op is gg.fused_up_gate]
        assert (len(step.nodes) > 1 and bool(gates)) == fused


@pytest.mark.parametrize(("rows", "first", "fused"), [(1, 0, True), (2, 0, False), (1, 1, False)])
def test_experts_of_a_token_read_all_of_it(rows: int, first: int, fused: bool) -> None:
    """Not `rows` parts of it for several experts. The rows of a router begin at 16 bytes, which
    those of a view, from row `first` on, need not."""
    k, n, used, n_ff = 64, 8, 4, 32

    def weight(name: str, *shape: int) -> gg.Node:
        return gg.constant(np.ones(shape, np.float32), dtype="q8_0", name=name)

    x = gg.relu(gg.input("x", ne=(k, 1)))
    router = gg.constant(np.ones((n + first, k), np.float32), name="router")
    if first:
        router = gg.view(router, ne=(k, n), start=(0, first))
    probs = gg.soft_max(gg.mul_mat(router, x))
    ids = gg.top_k(probs, k=used)
    shares = gg.get_rows(gg.reshape(probs, ne=(1, n, 1)), ids)
    up, gate = (weight(name, n, n_ff, k // rows) for name in ("up", "gate"))
    hidden = gg.moe_up_gate(up, gate, gg.reshape(x, ne=(k // rows, rows, 1)), ids)
    y = gg.mul_multi_add(gg.mul_mat_id(weight("down", n, k, n_ff), hidden, ids), shares)
    nodes = [n for n in gg.Graph({"y": y}).nodes if not n.op.leaf and n.op.view is None]
    (step,) = (s for s in lower(nodes, {y}) if hidden in s.nodes)
    assert (len(step.nodes) > 1) == fused


def test_a_step_comes_before_the_first_reader_of_its_results() -> None:
    ops = [step.node.op.name for step in plan_of("experts").steps]
    assert ops.index("get_rows") < ops.index("mul_mat_id")


def test_a_moved_step_may_not_read_later_results() -> None:
    y = pattern("experts").outputs["y"]
    nodes = [n for n in gg.Graph({"y": y}).nodes if not n.op.leaf and n.op.view is None]
    run = Run(nodes, set())
    steps = [s for s in covered(nodes, set(), patterns.PATTERNS) if isinstance(s, Fused)]
    (route,) = (step for step in steps if step.at is not step.node)
    early = [*(n for n in nodes if n in route.nodes), *(n for n in nodes if n not in route.nodes)]
    assert run.allows(route) and not Run(early, set()).allows(route)


def host_between(dtype: str, n_tokens: int, prec: str = "default") -> dict[str, gg.Node]:
    """Products and activations around a product on the host, which splits the GPU's run in two."""
    weights = (
        gg.constant(np.ones((256, 256), np.float32), dtype=dtype, name=name)
        for name in ("a", "b", "host", "c", "d")
    )
    a, b, host, c, d = (partial(gg.mul_mat, w, prec=prec) for w in weights)
    x = gg.silu(gg.input("x", ne=(256, n_tokens)))
    first = gg.add(a(x), b(x))
    gate = gg.silu(first)
    y = gg.mul(gate, gg.add(host(first), gg.add(c(x), d(x))))
    return {"y": y, "gate": gate}


@pytest.mark.parametrize("n_tokens", (5, 64))  # with 64, the weight is loaded between the runs
@pytest.mark.parametrize("prec", ("default", "f32"))
def test_results_of_an_earlier_run_are_neither_fused_nor_shared(n_tokens: int, prec: str) -> None:
    plan = gg.compile(
        host_between("q8_0", n_tokens, prec),
        backends=["cuda:0:24GiB", "numpy"],
        pins={"^host$": "numpy"},
    )
    nodes = [node for step in plan.steps for node in step.nodes]
    assert len(nodes) == len(set(nodes))  # the verifier checks the rest


def test_every_kernel_waits_for_its_predecessor() -> None:
    """Launches overlap. A kernel that does not wait may read too early, and later kernels take its
    end for the end of all kernels before it."""
    sources = [*KERNELS.glob("*.cu"), *KERNELS.glob("include/*.cuh")]
    functions = [part for path in sources for part in bodies("__device__", path)]
    waits = {"begin", "wait_for_predecessor"}
    for _ in range(3):  # of those that call others
        waits |= {head for head, body in functions if waits & calls(body)}
    kernels = [part for path in sources for part in bodies("__global__", path)]
    assert len(kernels) > 40
    for name, body in kernels:
        assert waits & calls(body), name


def bodies(kind: str, path: Path) -> Iterator[tuple[str, str]]:
    """Name and body of each function of a kind that a source defines at the outermost level."""
    for part in re.split(rf"^[^\S\n]*(?=[^\n]*\b{kind}\b)", path.read_text(), flags=re.M)[1:]:
        head, brace, rest = part.partition("{")
        name = re.search(r"(\w+)\s*\((?!.*launch_bounds)", head.replace("(32 * MOST_WARPS", ""))
        if brace and name and ";" not in head:
            yield name[1], rest.partition("\n}\n")[0]


def calls(body: str) -> set[str]:
    return set(re.findall(r"\b(\w+)(?:<[^;()]*>)?\(", body))


@pytest.mark.parametrize("name", PATTERNS)
def test_without_fuse_nothing_is_fused(name: str) -> None:
    plan = gg.compile(pattern(name).outputs, backends=["cuda:0:24GiB"], fuse=False)
    assert all(len(step.nodes) == 1 for step in plan.steps)
    assert not any(step.node.op.name == "fixed_point" for step in plan.steps)
    assert ", nothing fused" in str(plan).partition("\n")[0]
    assert "nothing fused" not in str(plan_of(name))


def test_fuse_must_be_true_or_false() -> None:
    x = gg.input("x", ne=(4,))
    with pytest.raises(gg.DTypeError, match="fuse= must be True or False"):
        gg.compile({"y": gg.relu(x)}, fuse="no")  # type: ignore[arg-type]
    for place in ("numpy", "null:0"):
        results = gg.compile({"y": gg.relu(x)}, backends=[place], fuse=False).run(x=[-1, 0, 1, 2])
        np.testing.assert_array_equal(results["y"], [0, 0, 1, 2])
