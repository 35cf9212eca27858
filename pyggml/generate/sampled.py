"""The memory and the time of a session on several devices, from plans of a few of its layers.

Most layers of a model are alike, and so are the plans of its stages. A plan of the first layer of
each kind and of the last layer, on the devices of one stage, has what each of them adds to every
device. Weights and caches follow exactly. Arenas are as large as with all layers, up to small
copies at the border of stages. Time grows with the steps of the layers. DeepSeek-V3 on four devices
takes 0.3 s so, and 9 s with all layers.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from pyggml.backends.step import Step, own_nodes
from pyggml.generate.division import layer_bytes
from pyggml.generate.fit import Planner, Setup
from pyggml.generate.session import Session
from pyggml.models.model import Model
from pyggml.node import Node
from pyggml.ops.leaf import constant_op
from pyggml.passes.stages import at_gaps
from pyggml.runtime.layers import layers_of, layers_of_steps
from pyggml.runtime.leaves import Need
from pyggml.runtime.memory import DeviceMemory, Memory, leaf_bytes
from pyggml.runtime.places import Place, parse
from pyggml.runtime.plan import Plan
from pyggml.runtime.predict import Prediction, Rates
from pyggml.runtime.shards import Cuts, shard_of
from pyggml.transfer import origin

_LAYER = re.compile(r"^blk\.(\d+)\.|^cache_\w+_l(\d+)(?:@\d+)?$")


class Sampled(Planner):
    """A planner that plans a few layers on one stage.

    cuts   over the first of `places`
    slack  bytes that each device needs besides: what an exact plan has shown
    Errors of its methods: those of `compile`, such as GraphError for a cut that divides nothing.
    """

    def __init__(
        self,
        model: Model,
        places: Sequence[Place],
        pins: Mapping[str, str],
        host_layers: Collection[int],
        cuts: Cuts,
    ) -> None:
        model = copy.copy(model)
        model.shard = cuts
        super().__init__(model, places, pins, host_layers)
        shard = shard_of(cuts, places)
        assert shard is not None
        self.n_group, self.stages = len(shard.shares), shard.stages
        alike = [place for place in places if place.name == places[0].name]
        self.used = alike[: len(shard.devices)]
        self.others = [place for place in places if place not in self.used]
        self.inner: Cuts | None = cuts
        if not isinstance(cuts, str):
            self.inner = {name: shard.shares for name in cuts if name != "layers"} or None
        self.slack = 0
        self._sampled: dict[Setup, tuple[Session, dict[int, int]]] = {}
        self._decode: dict[int, tuple[Plan, ...]] = {}

    def excess(self, setup: Setup) -> int:
        return super().excess(setup) + self.slack

    def session(self, setup: Setup) -> Session:
        return self._sample(setup)[0]

    def _sample(self, setup: Setup) -> tuple[Session, dict[int, int]]:
        """A session of a few layers, and for each layer the one that stands for it."""
        if setup not in self._sampled:
            pins = self.pins_of(setup)
            kinds = self._kinds(setup, pins)
            firsts = {kind: il for il, kind in reversed(list(enumerate(kinds)))}
            stands = {il: firsts[kind] for il, kind in enumerate(kinds)}
            last = len(kinds) - 1
            stands[last] = last
            model = copy.copy(self.model)
            model.layers = sorted(set(stands.values()))
            model.backends = tuple(map(str, [*self.used[: self.n_group], *self.others]))
            model.shard, model.amb, model.pins = self.inner, setup.amb, pins
            session = Session(model, n_ctx=setup.n_ctx, n_batch=setup.n_batch)
            self._sampled[setup] = session, stands
        return self._sampled[setup]

    def _kinds(self, setup: Setup, pins: Mapping[str, str]) -> list[Hashable]:
        """For each layer what decides its plan: its tensors, its states, and their pins."""
        model = self.model
        patterns = [(re.compile(pattern), place) for pattern, place in pins.items()]

        def pin(name: str) -> str | None:
            return next((place for pattern, place in patterns if pattern.search(name)), None)

        kinds: list[list[Hashable]] = [[] for _ in range(model.arch.n_layer)]
        for name, tensor in model.file.tensors.items():
            if name.startswith("blk.") and (il := int(name.split(".")[1])) < len(kinds):
                short = name.split(".", 2)[2]
                kinds[il].append((short, tensor.ne, tensor.dtype.name, pin(name)))
        for kind, cache in zip(kinds, model.caches(setup.n_ctx, setup.n_batch)):
            kind += [(state.spec, pin(state.attrs["name"])) for state in cache.states]
        return [tuple(kind) for kind in kinds]

    def _stage_of(self, setup: Setup) -> list[int]:
        """The stage of each layer, as the pass `shard` divides them."""
        if len(self.stages) == 1:
            return [0] * self.model.arch.n_layer
        sizes = layer_bytes(self.model, 0, setup.n_ctx, setup.n_batch)
        sizes[0] += sum(
            t.nbytes
            for name, t in self.model.file.tensors.items()
            if name.startswith("token_embd.")
        )
        ends = at_gaps(range(1, len(sizes)), sizes, self.stages)
        return [sum(il >= end for end in ends) for il in range(len(sizes))]

    # -- memory -------------------------------------------------------------------------------

    def memory(self, setup: Setup) -> Memory:
        if setup not in self._memory:
            with warnings.catch_warnings(action="ignore"):
                self._memory[setup] = self._estimate(setup)
        return self._memory[setup]

    def _estimate(self, setup: Setup) -> Memory:
        session, stands = self._sample(setup)
        plans = self._plans(session, setup)
        self.n_plans += len(plans)
        sample = plans[0].memory_with(*plans[1:])
        needs = _needs(plans, self._decode[setup.host_experts])
        layers_of_stage: list[list[int]] = [[] for _ in self.stages]
        for il, stage in enumerate(self._stage_of(setup)):
            layers_of_stage[stage].append(stands[il])
        group = [place.backend.place for place in self.used[: self.n_group]]
        rows: dict[str, DeviceMemory] = {}
        for row in sample.devices:
            of_device = needs.get(parse(row.device).backend.device, {})
            if row.device not in group:  # the host, or a device of pins
                every = [il for layers in layers_of_stage for il in layers]
                leaves = _leaves(of_device, every, first=True, last=True)
                rows[row.device] = _with(row, leaves)
                continue
            for stage, layers in enumerate(layers_of_stage):
                first, last = stage == 0, stage == len(self.stages) - 1
                place = self.used[stage * self.n_group + group.index(row.device)]
                leaves = _leaves(of_device, layers, first=first or self.model.arch.tied, last=last)
                moved = replace(
                    row, device=place.backend.place, size=place.size, size_text=place.size_text
                )
                rows[moved.device] = _with(moved, leaves)
        order = [place.backend.place for place in (*self.used, *self.others)]
        return replace(sample, devices=tuple(sorted(rows.values(), key=lambda r: _rank(r, order))))

    def _plans(self, session: Session, setup: Setup) -> tuple[Plan, ...]:
        """The largest plans. Those for one token once for each number of layers on the host: then
        only their weights count, and these are of no length."""
        plans = session.plans
        if setup.host_experts in self._decode:
            return plans.largest_prompts()
        largest = plans.largest()
        self._decode[setup.host_experts] = largest[1::2]
        return largest

    # -- time ---------------------------------------------------------------------------------

    def times(self, setup: Setup) -> tuple[Prediction, Prediction]:
        session, stands = self._sample(setup)
        prompt, decode = session.plans.largest()[:2]
        return self._time(prompt, stands), self._time(decode, stands)

    def _time(self, plan: Plan, stands: Mapping[int, int]) -> Prediction:
        """The time of all layers, each of which takes its share of the sampled ones' time: that of
        the device that has most to do."""
        rates, sample = Rates(), plan.predict()
        nodes = (*plan.graph.nodes, *own_nodes(plan.graph.nodes, plan.steps))
        numbers = layers_of_steps([_main(step) for step in plan.steps], layers_of(nodes))
        devices = [s.backend.device for s in plan.splits for _ in (*s.copies, *s.steps)]
        most = max(sample.busy, key=lambda device: sample.busy[device])
        alone: dict[int | None, float] = {}
        for number, seconds, device in zip(numbers, sample.steps, devices):
            if device == most:
                alone[number] = alone.get(number, 0.0) + seconds
        rest = sum(alone.values())
        whole = rest + sum(alone.get(il, 0.0) for il in stands.values())
        whole -= sum(alone.get(il, 0.0) for il in set(stands.values()))
        scale = whole / rest if rest else 1.0
        hop = (
            rates.latency + 4.0 * self.model.arch.n_embd * plan.inputs["tokens"].ne[0] / rates.link
        )
        borders = (len(self.stages) - 1) * hop
        return Prediction(sample.total * scale + borders, {}, sample.between * scale + borders)


def _main(step: Step) -> Node:
    """The node by which a step is of a layer: experts may end with the norm of the next."""
    return next((node for node in step.nodes if node.op.ids is not None), step.node)


#: Device -> layer, or None -> the leaves that it needs there.
_Needs: TypeAlias = dict[str, dict[int | None, list[Need]]]


def _needs(plans: Sequence[Plan], weights: Sequence[Plan]) -> _Needs:
    """The leaves of plans of one store, and weights of others, by device and layer."""
    result: _Needs = {}
    seen: set[object] = set()
    for plan in (*plans, *weights):
        layers = layers_of(plan.graph.nodes)
        for need in plan.needs:
            leaf = origin(need.node)
            if need.key in seen or (plan not in plans and leaf.op is not constant_op):
                continue
            seen.add(need.key)
            match = _LAYER.search(leaf.attrs["name"] or "")
            if match is not None:
                il: int | None = int(match[1] or match[2])
            else:  # a derived constant is of the layer that reads it
                il = None if leaf.attrs["name"] else layers.get(leaf)
            result.setdefault(need.backend.device, {}).setdefault(il, []).append(need)
    return result


def _rank(row: DeviceMemory, order: Sequence[str]) -> int:
    """The number of a row's device; those of pins come last."""
    return order.index(row.device) if row.device in order else len(order)


def _with(row: DeviceMemory, needs: Iterable[Need]) -> DeviceMemory:
    """A device's memory with these leaves."""
    sizes = leaf_bytes(needs)
    return replace(row, weights=sizes["weights"], states=sizes["states"], inputs=sizes["inputs"])


def _leaves(
    needs: Mapping[int | None, Sequence[Need]], layers: Iterable[int], *, first: bool, last: bool
) -> list[Need]:
    """The leaves of a stage with these layers, some of them more than once."""
    leaves = [need for il in layers for need in needs.get(il, ())]
    for need in needs.get(None, ()):
        name = origin(need.node).attrs["name"] or ""
        if (first or not name.startswith("token_embd")) and (last or not name.startswith("output")):
            leaves.append(need)
    return leaves
