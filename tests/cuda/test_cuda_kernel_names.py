"""The names of a step's CUDA kernels are those of its launches, and need no driver."""

from __future__ import annotations

import subprocess
import sys

import pyggml as gg
from pyggml import backends, passes
from pyggml.backends.cuda.launch import Gemm, Launch
from pyggml.backends.cuda.naming import name_of
from pyggml.backends.step import LoopStep
from pyggml.graph import Graph
from pyggml.passes.work import Work
from pyggml.runtime.kernels import kernels_of
from tests.cuda.test_recording import recordable, steps_of


def test_the_names_of_every_case_are_those_of_its_launches() -> None:
    device = backends.get("cuda")
    kinds = set()
    for case, node in list(recordable())[::5]:
        work = passes.run(Work(Graph({"y": node}), (device,)))
        records = [step_records for _, step_records in steps_of(node)]
        names = [tuple(map(name_of, each)) for each in records]
        assert [kernels.names for kernels in kernels_of(work)] == names, case
        kinds |= {type(record) for each in records for record in each}
    assert {Launch, Gemm} <= kinds


def test_a_loop_has_the_kernels_of_each_body_once() -> None:
    k = gg.state("cache_k", "f16", ne=(64, 1024, 8))
    q = gg.input("q", ne=(64, 256, 8))
    p = gg.soft_max_ext(gg.mul_mat(k, q), scale=0.125)
    out = gg.mul_mat(gg.transpose(gg.state("cache_v", "f16", ne=(64, 1024, 8))), p)
    plan = gg.compile({"out": out}, amb=4, backends=["cuda:0:24GiB"])
    [loop] = [i for i, step in enumerate(plan.steps) if isinstance(step, LoopStep)]
    names = " ".join(plan.kernels()[loop].names)
    assert "softmax" in names
    bodies = len(plan.steps[loop].bodies)  # type: ignore[attr-defined]
    assert names.count("softmax") <= bodies


def test_attention_on_hopper_is_named_without_a_driver() -> None:
    """Its tensor maps come from the driver, which the process below must not import."""
    code = (
        "import sys, pyggml as gg\n"
        "q = gg.input('q', ne=(192, 512, 128)); pos = gg.input('pos', 'i32', ne=(512,))\n"
        "k, v = (gg.state(n, 'f16', ne=(d, 2048, 128)) for n, d in [('k', 192), ('v', 128)])\n"
        "y = gg.flash_attn_ext(q, k, v, gg.causal_mask(pos, n_kv=2048), scale=0.1)\n"
        "plan = gg.compile({'y': y}, backends=['cuda:0:80GiB'])\n"
        "print(plan.kernels())\n"
        "assert not {'pycuda', 'cupy', 'cuda'} & {m.split('.')[0] for m in sys.modules}\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "hopper<" in result.stdout
