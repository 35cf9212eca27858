"""The attention memory budget: attentions that exceed it become loops over pieces.

`regions` finds the attentions, `choices` measures how each can be cut, `cut` makes the loops, and
`search` decides for the whole graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain

from pyggml.backends.step import LoopStep, Step
from pyggml.errors import BudgetError
from pyggml.graph import toposort
from pyggml.node import Node, label_of, line_of
from pyggml.passes.order import state_edges
from pyggml.passes.regions import Region, regions, score_tensors
from pyggml.passes.search import Search, Trial
from pyggml.passes.work import Work

#: More pieces of one attention are likely a mistake: each piece launches a few kernels.
MANY = 4096

_MIB = 2**20


def within_budget(work: Work, finish: Callable[[Work], Work]) -> Work:
    """Replace attentions by loops of the fewest pieces that fit `work.amb`.

    An attention stays whole, with a warning, if a tensor inside it is an output or if it runs on
    several devices. BudgetError with the least budget if no pieces fit.

    finish  the passes that place a graph in memory: they tell what it needs
    """
    amb = work.amb
    if amb is None:
        return replace(work, scores=frozenset(score_tensors(work.graph)))
    work, bounded = _bounded(work)
    search = Search(work, bounded, finish)
    trial = search.fit(amb)
    if trial is None:
        raise _too_small(search, amb)
    work = trial.work
    if trial.most > MANY:
        work = replace(work, warnings=(*work.warnings, _many(search, trial, amb)))
    plain = search.plain.placement
    if work.exempt:  # reports count what the budget does not bound
        uncut = search.plain.work
        plain = finish(replace(uncut, scores=uncut.scores | uncut.exempt)).placed
    return replace(work, scores=work.scores | work.exempt, plain=plain)


def _bounded(work: Work) -> tuple[Work, list[Region]]:
    """The attentions that may be cut; the work with a warning about each of the others."""
    roots = {root.root: root for root in work.graph.roots}
    edges = state_edges(work.graph.nodes)
    overwritten: dict[Node, list[Node]] = {}
    for write, readers in edges.items():
        for reader in readers:
            overwritten.setdefault(reader, []).append(write)
    bounded: list[Region] = []
    exempt: set[Node] = set()
    warnings = list(work.warnings)
    for region in regions(work.graph):
        label = label_of(region.out)
        outputs = [roots[n] for n in region.counted if n in roots]
        places = {work.home(node).place for node in region.inside}
        if not outputs and len(places) == 1:
            bounded.append(_in_time(region, overwritten, edges))
            continue
        exempt |= region.counted
        if outputs:
            warnings.append(
                f"{label_of(outputs[0])} is an output: the attention of {label} "
                "stays whole, outside the budget"
            )
        else:
            warnings.append(
                f"the attention of {label} runs on {', '.join(sorted(places))}: it "
                "stays whole, outside the budget; pin it to one place"
            )
    return replace(work, exempt=frozenset(exempt), warnings=tuple(warnings)), bounded


def _in_time(
    region: Region, overwritten: Mapping[Node, list[Node]], edges: dict[Node, tuple[Node, ...]]
) -> Region:
    """The region without nodes that must run before a write that its result depends on.

    A loop reads its sources when it makes the result. Adds to `edges` the order that a loop needs.

    overwritten  nodes that read a state -> the later writes to it
    """
    reads = {node: overwritten[node] for node in region.inside if node in overwritten}
    if not reads:
        return region
    before = set(toposort([region.out], edges))
    early = frozenset(node for node, writes in reads.items() if before.intersection(writes))
    for write in {write for node in reads.keys() - early for write in overwritten[node]}:
        edges[write] = (*edges.get(write, ()), region.out)
    return replace(region, outside=region.outside | early)


# -- messages ---------------------------------------------------------------------------------


def _many(search: Search, trial: Trial, amb: float) -> str:
    region = next(r for r, c in zip(search.regions, trial.choices) if c.pieces == trial.most)
    return (
        f"amb={amb / _MIB:g} MiB cuts the attention of {label_of(region.out)} (at "
        f"{line_of(region.out)}) into {trial.most:,} pieces; the least budget with at most "
        f"{MANY:,} is amb={search.least_with(MANY).need / _MIB!r}"
    )


def _too_small(search: Search, amb: float) -> BudgetError:
    least = search.least()
    alone = next((r.out for r, need in zip(search.regions, search.least_alone) if need > amb), None)
    what = "what is alive together" if alone is None else f"{alone!r} (at {line_of(alone)})"
    step = max(_counted_steps(search.finish(least.work)), key=lambda step: step.scratch)
    scratch = ""
    if step.scratch:
        scratch = (
            f", {step.scratch / _MIB:g} MiB of it scratch of {step.node.op.name}, "
            "which pieces of any size need"
        )
    mib = least.need / _MIB
    return BudgetError(
        f"amb={amb / _MIB:g} MiB is too small for {what}: the smallest pieces need {mib!r} MiB "
        f"({least.need} bytes){scratch}; give amb={mib!r} or more",
        mib,
    )


def _counted_steps(work: Work) -> list[Step]:
    """The steps that read or make counted tensors, those of loop bodies included."""
    loops = [step for step in work.steps if isinstance(step, LoopStep)]
    bodies = (body.steps for step in loops for body in step.bodies)
    steps = chain((s for s in work.steps if not isinstance(s, LoopStep)), *bodies)
    return [s for s in steps if any(n in work.scores for n in (*s.nodes, *s.reads))]
