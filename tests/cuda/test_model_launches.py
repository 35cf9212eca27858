"""The launches of a V2-Lite layer, recorded without a GPU: a change that adds one shows here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import pyggml as gg
from pyggml import gguf
from pyggml.backends.cuda.gpu import H200, Device
from pyggml.backends.cuda.launch import Collective, Gemm, Launch, Record
from pyggml.backends.cuda.lowering import step_of, timely
from pyggml.backends.cuda.recording import check_early, record_step, released_soon
from pyggml.models.batch import Batch, Options
from pyggml.models.model import Model
from pyggml.models.presets import V2_LITE
from pyggml.models.synth import synth
from pyggml.runtime.kernels import planned_memory

#: Rows of the cache.
N_KV = 4096


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A layer with experts; its file has no weights."""
    path = Path(tmp_path_factory.mktemp("lite")) / "lite.gguf"
    arch = replace(V2_LITE, n_block=1, n_layer_dense=0, n_vocab=256)
    synth(path, arch, dtype="iq4_nl", header_only=True)
    with gguf.open(path, allow_missing_data=True) as file:
        yield Model(file)


def records_of(
    model: Model,
    n_tokens: int,
    mla: int,
    flash: bool = True,
    device: Device = H200,
    layers: int = 1,
) -> list[Record]:
    """The records of layers with the same weights for the last `n_tokens` of N_KV."""
    options = Options(mla=mla, flash=flash)
    y = gg.input("x", ne=(model.arch.n_embd, n_tokens))
    batch = Batch(n_tokens, N_KV, options, n_tokens, padded=False)
    for i in range(layers):
        y = model.arch.layer(y, model.layer(0), model.arch.cache(i, N_KV, n_tokens, options), batch)
    work = gg.compile({"y": y}, backends=["cuda:0:24GiB"])._work
    at, arenas = planned_memory(work)
    return [
        record
        for step, offset in zip(work.steps, work.placed.scratch_at)
        for record in record_step(
            step, at, (arenas["cuda:0"].ptr + offset, step.scratch), device, names_only=True
        )
    ]


def counts(records: list[Record]) -> dict[str, int]:
    """How often each kernel is launched."""
    return dict(
        Counter(
            record.name.split("<")[0] if isinstance(record, Launch) else "gemm"
            for record in records
            if isinstance(record, (Launch, Gemm))
        )
    )


@pytest.mark.parametrize("mla", (0, 1, 3))
@pytest.mark.parametrize("n_tokens", (1, 2048))
def test_no_tensor_is_copied_onto_itself(model: Model, n_tokens: int, mla: int) -> None:
    """A part of a concat is often written in place by the step that computes it."""
    for record in records_of(model, n_tokens, mla):
        if isinstance(record, Launch) and record.name.startswith("copy<"):
            # Two tensors of 56 bytes: address, 4 strides, 4 sizes.
            assert record.args[:40] != record.args[56:96]


def test_a_decode_step_is_few_launches(model: Model) -> None:
    """None of them only normalizes, quantizes, rotates, copies, routes or adds up."""
    assert [r.name.split("<")[0] for r in launches(model)] == [
        "vec_normed", "absorb", "latent", "combine_vec", "vec",
        "norm_router", "up_gate_normed", "down_shared",
    ]  # fmt: skip


@pytest.mark.parametrize("n_tokens", (2, 8))
def test_a_step_of_several_tokens_has_the_same_kernels(model: Model, n_tokens: int) -> None:
    """But for norms."""
    names = [r.name.split("<")[0] for r in launches(model, n_tokens)]
    assert names == [
        "rms_norm", "vec_joined", "absorb", "latent_hopper", "combine_vec", "vec",
        "rms_norm", "router", "up_gate_shared", "down_shared",
    ]  # fmt: skip


def launches(model: Model, n_tokens: int = 1) -> list[Launch]:
    return [r for r in records_of(model, n_tokens, 1) if isinstance(r, Launch)]


@pytest.mark.parametrize("n_tokens", (1, 2))
def test_a_launch_is_released_soon_where_it_reads_only_constants_early(
    model: Model, n_tokens: int
) -> None:
    """The router of one token behind the output of attention, which fetches its weights earlier."""
    records = records_of(model, n_tokens, 1)
    (chosen,) = released_soon([records])
    soon = [i for i, (a, b) in enumerate(zip(records, chosen)) if a != b]
    assert len(soon) == (n_tokens == 1)
    for i in soon:
        before, router = chosen[i], records[i + 1]
        assert isinstance(before, Launch) and isinstance(router, Launch)
        assert before.name.startswith("vec<") and before.name.endswith(", Soon>")
        assert router.name.startswith("norm_router<") and router.patient and not router.early
        late = replace(router, patient=False)
        assert released_soon([records[: i + 1], [late]])[0][i] == records[i]


@pytest.mark.parametrize("n_tokens", (1, 2, 2048))
def test_what_is_read_early_is_complete(model: Model, n_tokens: int) -> None:
    records = records_of(model, n_tokens, 1)
    check_early(records)
    early = [r for r in records if isinstance(r, Launch) and r.early]
    assert len(early) == {1: 3, 2: 2, 2048: 0}[n_tokens]
    product = Gemm(1, 1, 1, (0, 0, 0), ("f32",) * 3, (1, 1, 1), (True, False), 1, (0, 0, 0))
    total = Collective("all_reduce", 0, 0, (1, 1), "f32", ("cuda:0", "cuda:1"), 0)
    for launch in early:
        for before, library in ((product, "cuBLAS"), (total, "NCCL")):
            with pytest.raises(gg.PyggmlError, match=f"reads before it waits.* {library}"):
                check_early([before, launch])
            check_early([before, replace(launch, early=False)])


def test_ids_behind_a_product_of_cublas_are_waited_for() -> None:
    """Which may start before launches ahead of it have ended."""
    up, gate = (gg.constant(np.ones((8, 32, 64)), dtype="q8_0", name=n) for n in ("up", "gate"))
    w, b = gg.constant(np.ones((300, 64), "f4"), name="w"), gg.input("b", ne=(64, 64))
    ids = gg.top_k(gg.soft_max(gg.input("scores", ne=(8, 2))), k=3)
    experts = gg.moe_up_gate(up, gate, gg.input("x", ne=(64, 1, 2)), ids)
    chosen, few, many = map(step_of, (ids, gg.relu(b), gg.mul_mat(w, b)))
    assert many.workspace and not few.workspace
    for between, late in ((few, False), (many, True)):
        assert timely([chosen, between, step := step_of(experts)])[-1] is step
        assert step.late == late


def test_a_prompt_prepares_once_what_several_products_read(model: Model) -> None:
    """q and kv_a read what the norm wrote, as shared experts do, and attn_output what attention
    wrote; experts share sorted pairs, and copies of rows in the order of these."""
    assert counts(records_of(model, 2048, 3)) == {
        "rms_norm": 2, "to_halves": 2, "ring": 7, "rope_tokens": 1, "latent_row": 1, "gemm": 1,
        "exact": 1, "copy": 1, "hopper": 1, "route": 1, "group_pairs": 1, "place_rows": 1,
        "rescale_rows": 1, "add_short": 1,
    }  # fmt: skip


def test_a_prompt_has_one_norm_for_each_further_layer(model: Model) -> None:
    """The other is part of the sum over the experts before."""
    one, two = (counts(records_of(model, 2048, 3, layers=n)) for n in (1, 2))
    assert {name: n - one[name] for name, n in two.items()} == one | {"rms_norm": 1}


@pytest.mark.parametrize("mla", (0, 1))
def test_a_prompt_without_flash_attention_has_pieces_of_four_heads(model: Model, mla: int) -> None:
    """Scores, softmax, values; nothing writes a mask, and q is converted once."""
    launches = counts(records_of(model, 2048, mla, flash=False))
    keys = 1 - mla  # of the standard form
    assert (launches["softmax"], launches["gemm"]) == (4, 8 + keys)
    assert launches["copy_rows"] == 2 - mla
    assert not {"causal_mask", "put_rows"} & launches.keys()


def test_experts_wait_for_lists_that_the_launch_before_may_have_made(model: Model) -> None:
    """`late`, the last argument of `tile`: only launches of its own come before down's product.
    With 96 pairs an expert, up and gate share their columns with the shared experts."""
    device = replace(H200, arch="100a")
    records = [r for r in records_of(model, 1024, 3, device=device) if isinstance(r, Launch)]
    late = [r.args[-4:] for r in records if r.name.startswith("tile<") and "true" in r.name]
    assert late == [b"\1\0\0\0", b"\0\0\0\0"]


def test_shared_experts_run_between_the_routing_and_the_experts(model: Model) -> None:
    """Of more tokens than one step takes; so the experts need not wait for their ids: `late`, the
    last argument, is 0."""
    records = [r for r in records_of(model, 10, 1) if isinstance(r, Launch)]
    names = [r.name.split("<")[0] for r in records]
    behind = names[names.index("route") :]
    assert [name for name in behind if name in ("tile", "vec_id")] == ["tile"] * 2 + ["vec_id"] * 2
    assert [r.args[-4:] for r in records if r.name.startswith("vec_id<")] == [bytes(4)] * 2


def test_experts_right_behind_their_routing_wait_for_ids() -> None:
    """No other product can go between; and what comes before the first step is not known."""
    up, gate = (gg.constant(np.ones((8, 32, 64)), dtype="q8_0", name=n) for n in ("up", "gate"))
    x, scores = gg.input("x", ne=(64, 1, 2)), gg.input("scores", ne=(8, 2))
    ids = gg.top_k(gg.soft_max(scores), k=3)
    late = {}
    for name, chosen in (("chosen", ids), ("given", gg.input("ids", "i32", ne=(3, 2)))):
        work = gg.compile(
            {"y": gg.moe_up_gate(up, gate, x, chosen)}, backends=["cuda:0:24GiB"]
        )._work
        late[name] = [step.late for step in work.steps if step.node.op.weights]  # type: ignore[attr-defined]
    assert late == {"chosen": [True], "given": [True]}
