"""Wrong products of the cpu backend, each of which a case of the grid or a test must notice."""

from __future__ import annotations

from tests.mutants.cpu_products import MUTANTS, changed, hunt


def test_every_mutant_of_products_changes_its_module() -> None:
    """The hunt of all of them takes minutes: python -m tests.mutants.cpu_products"""
    assert len({changed(mutant) for mutant in MUTANTS}) > 60
    assert all(compile(changed(mutant), mutant.module, "exec") for mutant in MUTANTS)


def test_a_sample_of_wrong_products_is_killed() -> None:
    """By their results, not by an exception."""
    sample = MUTANTS[3::11]
    fates = list(hunt(sample))
    assert len(fates) == len(sample) >= 6
    assert not [fate.what for fate in fates if not fate.killed or fate.why.startswith("raised")]
