"""Wrong kernels of the cpu backend, each of which a case of the grid or a test here must notice."""

from __future__ import annotations

from tests.mutants.cpu_hunt import changed, hunt
from tests.mutants.cpu_mutants import MUTANTS


def test_every_mutant_changes_its_module() -> None:
    """The hunt of all of them takes minutes: python -m tests.mutants.cpu_hunt"""
    assert len({changed(mutant) for mutant in MUTANTS}) > 100
    assert all(compile(changed(mutant), mutant.module, "exec") for mutant in MUTANTS)


def test_a_sample_of_mutants_is_killed() -> None:
    sample = MUTANTS[::9]
    fates = list(hunt(sample))
    assert len(fates) == len(sample) >= 12 and {fate.op for fate in fates} >= {"attention", "copy"}
    assert not [fate.what for fate in fates if not fate.killed]
    # They must fail by their results, not by an exception.
    assert not [fate for fate in fates if fate.why.startswith("raised")]
