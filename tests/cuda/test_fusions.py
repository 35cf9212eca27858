"""What the CUDA backend does in one step, and where it must not. No GPU."""

from __future__ import annotations

import re
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
#: The ops of each step that has several.
FUSED = {
    "norm_and_products": ["add rms_norm fixed_point mul", "add rms_norm mul"],
    "shared_activations": [],
    "experts": ["soft_max_ext top_k get_rows", "mul_multi_add add add"],
    "grouped_experts": ["sigmoid add grouped_topk get_rows sum_rows clamp div scale"],
    "divided_weights": ["soft_max_ext add top_k get_rows sum_rows clamp div"],
    "probabilities_kept": [],
    "shared_mask": ["causal_mask flash_attn_ext"] * 2,
    "hidden_rows": ["causal_mask flash_attn_ext"] * 6,
    "mask_kept": [],
    "moved_position": [],
    "squares": [],
    "odd_routing": ["soft_max_ext top_k get_rows"],
    "flat_weights": ["soft_max_ext top_k get_rows"],
    "gated": ["silu mul", "relu mul"],
    "turned_f16": ["rope_ext set_rows"],
    "turned_bf16": ["rope_ext set_rows"],
    **{f"latent_row_{t}_{m}": [ROW] for t in ("f16", "bf16", "q8_0") for m in ("normal", "neox")},
}


def planned(name: str) -> gg.Plan:
    return gg.compile(pattern(name).outputs, backends=["cuda:0:24GiB"])


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_become_steps(name: str) -> None:
    several = [step for step in planned(name).steps if len(step.nodes) > 1]
    assert [" ".join(n.op.name for n in step.nodes) for step in several] == FUSED[name]


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_the_same_on_every_backend_here(name: str) -> None:
    made = pattern(name)
    want = gg.compile(made.outputs).run(made.inputs)
    got = gg.compile(made.outputs, backends=["null:0"]).run(made.inputs)
    for key, values in want.items():
        np.testing.assert_array_equal(got[key], values)


def test_rows_that_a_causal_mask_hides_never_show() -> None:
    made = pattern("hidden_rows")
    for values in gg.compile(made.outputs).run(made.inputs).values():
        assert np.isfinite(values).all()


def test_activations_are_prepared_once() -> None:
    """One step for two products of the same rows; a view of other rows prepares its own."""
    steps = planned("shared_activations").steps
    (made,) = (step for step in steps if step.node.op.name == "fixed_point")
    readers = [step for step in steps if made.node in step.reads]
    assert [step.node.ne[1] for step in readers] == [5, 5]


def nodes_of(name: str) -> list[gg.Node]:
    nodes = gg.Graph(pattern(name).outputs).nodes
    return [n for n in nodes if not n.op.leaf and n.op.view is None]


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_can_be_left_out(name: str) -> None:
    """Then a step for each node, as the kernel table has it, and nothing of the backend's own."""
    nodes = nodes_of(name)
    steps = lower(nodes, set(), fuse=False)
    assert [step.nodes for step in steps] == [(node,) for node in nodes]
    for step, node in zip(steps, nodes):
        assert isinstance(step, fusion.CudaStep)
        assert step.operands == {n: node[n] for n in node.op.operands if node.get(n) is not None}


def test_the_first_pattern_in_their_order_counts() -> None:
    """One row of a norm times an activation is both a gated row and a weighted norm."""
    x, g = gg.input("x", ne=(256,)), gg.input("g", ne=(256,))
    y = gg.mul(gg.rms_norm(x, eps=1e-6), gg.relu(g))
    nodes = [n for n in gg.Graph({"y": y}).nodes if not n.op.leaf]
    ways = (patterns.PATTERNS, patterns.PATTERNS[::-1])
    steps = [next(s for s in covered(nodes, set(), way) if isinstance(s, Fused)) for way in ways]
    assert [[n.op.name for n in s.nodes] for s in steps] == [["relu", "mul"], ["rms_norm", "mul"]]


def test_every_pattern_is_listed_once() -> None:
    """A family that writes one and forgets patterns.py would never see it matched."""
    written = {
        f"{path.stem}.{name}"
        for path in Path(fusion.__file__).parent.rglob("*.py")
        for name in re.findall(r"^def ([a-z]\w+)\(node: Node, run: Run\)", path.read_text(), re.M)
    }
    listed = [f"{m.__module__.rpartition('.')[2]}.{m.__name__}" for m, _ in patterns.PATTERNS]
    assert sorted(listed) == sorted(written)


def test_a_step_stands_where_its_first_result_is_read() -> None:
    ops = [step.node.op.name for step in planned("experts").steps]
    assert ops.index("get_rows") < ops.index("mul_mat_id")


def test_a_moved_step_may_not_read_what_is_not_there_yet() -> None:
    y = pattern("experts").outputs["y"]
    nodes = [n for n in gg.Graph({"y": y}).nodes if not n.op.leaf and n.op.view is None]
    run = Run(nodes, set())
    steps = [s for s in covered(nodes, set(), patterns.PATTERNS) if isinstance(s, Fused)]
    (route,) = (step for step in steps if step.at is not step.node)
    early = [*(n for n in nodes if n in route.nodes), *(n for n in nodes if n not in route.nodes)]
    assert run.allows(route) and not Run(early, set()).allows(route)


def host_between(kind: str, n_tokens: int, prec: str = "default") -> dict[str, gg.Node]:
    """Products and activations around one of the host's, which cuts the GPU's run in two."""
    made = (
        gg.constant(np.ones((256, 256), np.float32), dtype=kind, name=name)
        for name in ("a", "b", "host", "c", "d")
    )
    a, b, host, c, d = (partial(gg.mul_mat, w, prec=prec) for w in made)
    x = gg.silu(gg.input("x", ne=(256, n_tokens)))
    first = gg.add(a(x), b(x))
    opened = gg.silu(first)
    y = gg.mul(opened, gg.add(host(first), gg.add(c(x), d(x))))
    return {"y": y, "opened": opened}


@pytest.mark.parametrize("n_tokens", (5, 64))  # of 64 the weight is borrowed: a load between runs
@pytest.mark.parametrize("prec", ("default", "f32"))
def test_what_an_earlier_run_made_is_neither_covered_nor_shared(n_tokens: int, prec: str) -> None:
    plan = gg.compile(
        host_between("q8_0", n_tokens, prec),
        backends=["cuda:0:24GiB", "numpy"],
        pins={"^host$": "numpy"},
    )
    made = [node for step in plan.steps for node in step.nodes]
    assert len(made) == len(set(made))  # the verifier looks at the rest


def test_every_kernel_waits_for_its_predecessor() -> None:
    """Launches overlap: one that did not wait would not only read too early, but let all that
    follow take its end for the end of everything before."""
    kernels = 0
    for path in KERNELS.glob("*.cu"):
        for part in re.split(r"\b__global__\b", path.read_text())[1:]:
            body = part[part.index("{") : part.index("\n}\n")]
            kernels += 1
            waits = r"\bbegin\(\)|\bwait_for_predecessor\(\)|tile_product<"
            assert re.search(waits, body), f"{path.name}: {part[:80]}"
    assert kernels > 40


@pytest.mark.parametrize("name", PATTERNS)
def test_nothing_is_fused_where_the_user_says_so(name: str) -> None:
    plan = gg.compile(pattern(name).outputs, backends=["cuda:0:24GiB"], fuse=False)
    assert all(len(step.nodes) == 1 for step in plan.steps)
    assert not any(step.node.op.name == "fixed_point" for step in plan.steps)
    assert ", nothing fused" in str(plan).partition("\n")[0]
    assert "nothing fused" not in str(planned(name))


def test_fuse_is_a_choice_of_two() -> None:
    x = gg.input("x", ne=(4,))
    with pytest.raises(gg.DTypeError, match="fuse= must be True or False"):
        gg.compile({"y": gg.relu(x)}, fuse="no")  # type: ignore[arg-type]
    for place in ("numpy", "null:0"):
        got = gg.compile({"y": gg.relu(x)}, backends=[place], fuse=False).run(x=[-1, 0, 1, 2])
        np.testing.assert_array_equal(got["y"], [0, 0, 1, 2])
