"""The float64 oracle against ggml itself, with new seeds, random shapes and values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.oracle
pytest.importorskip("ggml", reason="needs ggml-python (the extra 'oracle')")

from pyggml.parity.oracle import ORACLE, run  # noqa: E402
from pyggml.parity.tolerance import STORAGE, nmse, within  # noqa: E402
from tests.fixtures import ggml_cases, real_ggml  # noqa: E402
from tests.fixtures.case import Case, Source, load  # noqa: E402

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None)


def check(case: Case) -> None:
    values = real_ggml.run(case).values()
    result = within(values, run(case.op, case.values(), **case.attrs), case.bound)
    assert result, f"{case}: {result}; ggml may differ because: {case.why}"


@pytest.mark.parametrize("seed", [11, 12])
@pytest.mark.parametrize("family", sorted(ggml_cases.FAMILIES))
def test_family(family: str, seed: int) -> None:
    for case in ggml_cases.FAMILIES[family](np.random.default_rng(seed)):
        if case.op in ORACLE:
            check(case)


@pytest.mark.parametrize("family", sorted(ggml_cases.FAMILIES))
def test_the_stored_results_are_those_of_ggml(family: str) -> None:
    for case in load(family):
        assert case.out is not None
        now, then = real_ggml.run(case), case.out
        assert now.type == then.type
        # Another CPU may sum in another order.
        assert within(now.values(), then.values(), case.bound), str(case)


@few
@given(
    seeds,
    st.sampled_from(["f32", "f16", "q8_0", "q4_0"]),
    st.tuples(*[st.integers(1, 3)] * 4),
    st.integers(1, 9),
    st.integers(1, 70),
)
def test_mul_mat(seed: int, type: str, dims: tuple[int, ...], n: int, m: int) -> None:
    rng, (a2, a3, r2, r3) = np.random.default_rng(seed), dims
    k = 64 if type.startswith("q") else int(rng.integers(1, 90))
    a = ggml_cases.floats(rng, k, m, a2, a3, type=type)
    b = ggml_cases.floats(rng, k, n, a2 * r2, a3 * r3)
    loss = ggml_cases.B_LOSES.get(type, ggml_cases.QUANTIZED)
    case = Case(f"{type},{a.ne},{b.ne}", "mul_mat", (a, b), {}, *loss)
    if r2 * r3 * a2 * a3 * n * m >= 64:
        check(case)
        return
    # A few sums may all be close to 0: compare the error with what was added up.
    values, magnitudes = case.values(), [np.abs(s.values()) for s in (a, b)]
    error = real_ggml.run(case).values() - run("mul_mat", values)
    assert np.square(error).sum() <= loss[0] * np.square(run("mul_mat", magnitudes)).sum(), case


@few
@given(
    seeds,
    st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3, 5])),
    st.integers(1, 70),
    st.integers(1, 80),
    st.sampled_from([0.0, 8.0]),
    st.sampled_from([0.0, 10.0]),
    st.booleans(),
)
def test_flash_attn(
    seed: int, heads: tuple[int, int], n_q: int, n_kv: int, bias: float, cap: float, sink: bool
) -> None:
    rng, (h_kv, ratio) = np.random.default_rng(seed), heads
    mask = ggml_cases.mask_of(rng, n_kv, n_q, dead=int(rng.integers(n_q)))
    sinks = ggml_cases.floats(rng, h_kv * ratio) if sink else None
    shape = (32, 24), (h_kv * ratio, h_kv), (n_q, n_kv)
    attrs = {"max_bias": bias, "logit_softcap": cap}
    check(ggml_cases.attend(rng, f"{attrs}", "f32", *shape, mask, sinks, **attrs))


@few
@given(seeds, st.integers(1, 12), st.integers(1, 3), st.integers(1, 99), st.booleans())
def test_soft_max(seed: int, heads: int, ratio: int, n: int, sink: bool) -> None:
    rng = np.random.default_rng(seed)
    a = ggml_cases.floats(rng, n, 3, heads * ratio)
    mask = ggml_cases.mask_of(rng, n, 5, m2=heads, dead=None)
    sinks = ggml_cases.floats(rng, heads * ratio) if sink else None
    at = {"scale": 1.7, "max_bias": 4.0}
    check(Case(f"{a.ne},{mask.ne}", "soft_max_ext", (a, mask, sinks), at, *ggml_cases.F32))


@few
@given(
    seeds,
    st.sampled_from(["normal", "neox"]),
    st.integers(1, 32),
    st.floats(0.02, 1.5),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_rope(seed: int, mode: str, half: int, scale: float, ext: float) -> None:
    rng = np.random.default_rng(seed)
    a = ggml_cases.floats(rng, 64, 2, 9)
    pos = ggml_cases.integers(rng.integers(0, 3000, 9))
    at = {"n_dims": 2 * half, "mode": mode, "freq_scale": scale, "ext_factor": ext}
    at |= {"n_ctx_orig": 2048, "attn_factor": 1.1}
    check(Case(f"{at}", "rope_ext", (a, pos), at, 5e-8, "angles by a chain of f32 products"))


@pytest.mark.parametrize("type", [name for name in STORAGE if name != "f32"])
def test_the_loss_of_a_storage_type_is_about_half_its_bound(type: str) -> None:
    rng = np.random.default_rng(5)
    source = ggml_cases.floats(rng, 1024, 64)
    stored = real_ggml.run(Case(type, "cast", (source,), {"dtype": type}))
    assert isinstance(stored, Source)
    assert 0.3 * STORAGE[type] < nmse(stored.values(), source.values()) < 0.7 * STORAGE[type]
