"""The launches of a layer with sparse attention: a change that adds one shows here."""

from __future__ import annotations

from collections import Counter

import pytest

from pyggml.backends.cuda.launch import Launch
from tools.launches import KINDS, launches_of, layer_launches

#: Launches of a token at 8192 rows.
LAUNCHES = {
    "window": 21, "ratio_4": 19, "ratio_128": 16, "v3": 11, "v32": 16, "glm_5": 16, "v2_lite": 8,
}  # fmt: skip


def names(kind: str, gpus: int = 1) -> list[str]:
    records = [record for _, record in layer_launches(KINDS[kind], gpus=gpus)]
    return [r.name.split("<")[0] if isinstance(r, Launch) else type(r).__name__ for r in records]


@pytest.mark.parametrize("kind", LAUNCHES)
def test_launches_of_a_decode_step(kind: str) -> None:
    assert len(names(kind)) == LAUNCHES[kind]


@pytest.mark.parametrize("kind", ("v2_lite", "v3", "v32"))
def test_a_layer_cut_over_gpus_has_two_sums_more(kind: str) -> None:
    """Norms have no more launches than on one GPU; shared experts wait for the row."""
    one, two = Counter(names(kind)), Counter(names(kind, gpus=2))
    one["up_gate_late"] = one.pop("up_gate_normed")
    if "list_token" in one:
        one["latent"] += one.pop("list_token")  # half of the heads
    assert two - one == {"Collective": 2} and not one - two


@pytest.mark.parametrize(("kind", "count"), [("window", 26), ("ratio_4", 21), ("ratio_128", 18)])
def test_a_layer_with_streams_cut_over_gpus(kind: str, count: int) -> None:
    """The step that adds the sum over experts to streams belongs to the next layer."""
    assert len(names(kind, gpus=2)) == count


def test_a_compressor_and_its_products_join_others() -> None:
    rest = {kind: Counter(names(kind)) for kind in ("window", "ratio_4", "ratio_128")}
    assert {counts["token_rows"] for counts in rest.values()} == {1}
    for kind in ("ratio_4", "ratio_128"):
        more = rest[kind] - rest["window"]
        assert (more["compressed_row"], more["norm_rope"], more["vec"]) == (0, 0, 0)
        assert not {"softmax", "sum_rows", "binary", "unary"} & more.keys()


def test_hyper_connections_are_two_launches_a_sublayer() -> None:
    counts = Counter(names("window"))
    own = "hyper_mix", "hyper_norm", "multi_add", "dsv4_hc_post"
    assert [counts[name] for name in own] == [1, 1, 1, 1]  # the last two join the next layer's
    assert not {"dsv4_hc_comb", "copy"} & counts.keys()


@pytest.mark.parametrize("kind", ("ratio_4", "ratio_128"))
def test_experts_are_one_step_with_their_routing_before_streams_too(kind: str) -> None:
    counts = Counter(names(kind))
    assert [counts[name] for name in ("router", "up_gate_shared", "down_shared")] == [1, 1, 1]
    assert not {"route", "vec_id", "multi_add"} & counts.keys()


@pytest.mark.parametrize("kind", ("window", "ratio_4", "ratio_128"))
def test_what_layers_of_a_kind_compute_once_is_few_launches(kind: str) -> None:
    """Rows of rings, windows that end and other small numbers are one launch, masks another."""
    assert len(launches_of(KINDS[kind], 1)) - LAUNCHES[kind] <= 6
