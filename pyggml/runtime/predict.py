"""The time of a plan by the cost rules of its ops: a prediction, not a measurement.

A step takes its launches, and the longer of its operations and its bytes at a device's rates. What
a step has in registers does not count as bytes. Products by expert id take the rows that the
busiest device has to compute. A weight of the host takes its bytes at the rate of the bus, those of
experts that random ids choose; one that is read ahead has the bus while other steps run, and the
step that reads it waits for it. A copy or a collective takes a latency and its bytes at the rate of
the link. Splits start when their device is free and what they wait for is done. Steps of the host
and copies to and from it have rates of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from pyggml.backends.base import in_host_memory
from pyggml.backends.step import LoadStep, Step
from pyggml.joint import cliques, joint_reduce, places_of, rounds
from pyggml.node import Node
from pyggml.operation import cost_of
from pyggml.ops.leaf import constant_op
from pyggml.ops.linear import expected_share
from pyggml.passes.work import Split, Work
from pyggml.runtime.kernels import kernels_of
from pyggml.transfer import origin, transfer


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device and its links sustain.

    The defaults are measured on H100 SXM, of single kernels and single collectives
    (benchmarks/results/h100 and scale, 2026-11-27; the names are those of the rows):

    flops      operations a second of a product: `mul_mat_iq4_nl_n512`
    experts    of products by expert id, if no row of a tile is empty, and
    tail       the rows of a tile that are empty for each expert: the two that give
               `moe_up_gate_iq4_nl_t512` and `_t2048` (48 and 192 rows an expert)
    attention  of the visible scores of flash attention: `fa_192_128_h16_n8192`
    nbytes     bytes of memory a second: `copy` times `mul_mat_vec_iq4_nl`
    launch     seconds that a launch takes besides: `moe_up_gate_iq4_nl_t1` less its bytes
    link       bytes a second from one device to another, and
    latency    seconds of a copy or collective without bytes: `nccl_8kb_graph`, `nccl_16mib_graph`
    small      seconds of a sum of at most SMALL bytes, besides the bytes: `nccl_8kb_boxes`

    NCCL's latency is that of two GPUs. That of more was not measured, and is taken to be the same.
    """

    flops: float = 536e12
    experts: float = 454e12
    tail: float = 58.0
    attention: float = 518e12
    nbytes: float = 2.23e12
    launch: float = 2e-6
    link: float = 240e9
    latency: float = 10.2e-6
    small: float = 3.6e-6


#: The largest parts whose sum takes `Rates.small`, in bytes, and the most devices of one.
SMALL, PEERS = 128 << 10, 8

#: Up to this many tokens, products by expert id are of vectors, which have no tiles.
VECTORS = 8

#: Bytes a second that a GPU reads of the host's memory (PCIe 5.0), measured on H100.
BUS = 55e9

#: A host with 8 channels of memory and PCIe 5.0: two thirds of 3 TFLOP/s, 300 GB/s and, for copies
#: to and from devices, 63 GB/s.
HOST = Rates(2e12, 2e12, 0.0, 2e12, 200e9, link=42e9)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of one run.

    total    from the first step to the last
    busy     device -> seconds of its steps
    between  seconds of copies and collectives between devices, of the device with most
    steps    seconds of each of the plan's steps and copies, alone
    """

    total: float
    busy: dict[str, float]
    between: float
    steps: tuple[float, ...] = ()


def predict(work: Work, rates: Rates | None = None) -> Prediction:
    """The time of a run of a planned graph."""
    clocks = _Clocks(work, rates or Rates())
    joint = [[step.joint for step in split.steps] for split in work.splits]
    last = {max(members): members for members in cliques(joint)}
    waiting = {i for members in last.values() for i in members}
    for i, split in enumerate(work.splits):
        clocks.copies(i, split)
        if i in last:
            clocks.together(last[i])
        elif i not in waiting:
            clocks.steps(i, len(split.steps))
    alone = tuple(map(clocks.seconds, work.steps))
    longest = max(clocks.between.values(), default=0.0)
    return Prediction(max(clocks.now.values(), default=0.0), clocks.busy, longest, alone)


class _Clocks:
    """The clock of each device, in seconds of a run.

    now, busy, between  by device
    bus, arrivals       by device: when its last load has ended; weight -> when that of it has
    ends, done          of each split: when it ends, and how many of its steps have run
    launches            of each step
    """

    def __init__(self, work: Work, rates: Rates) -> None:
        self.work, self.rates = work, rates
        self.now: dict[str, float] = {}
        self.busy: dict[str, float] = {}
        self.between: dict[str, float] = {}
        self.bus: dict[str, float] = {}
        self.arrivals: dict[Node, float] = {}
        self.ends: dict[int, float] = {}
        self.done = [0] * len(work.splits)
        self.launches = {
            step: max(1, len(each.names)) for step, each in zip(work.steps, kernels_of(work))
        }

    def seconds(self, step: Step) -> float:
        """A step or copy, alone."""
        return seconds_of(self.work, step, self.rates, self.launches[step])

    def copies(self, i: int, split: Split) -> None:
        """Wait for other splits, and copy what they have computed."""
        device = split.backend.device
        sent = [self.seconds(step) for step in split.copies]
        copies = (max(sent) if _one_collective(split.steps) else sum(sent)) if sent else 0.0
        start = max([self.now.get(device, 0.0), *(self.ends[k] for k in split.waits)])
        self.now[device] = start + copies
        self.between[device] = self.between.get(device, 0.0) + copies
        self.busy.setdefault(device, 0.0)
        self.ends[i] = self.now[device]

    def steps(self, i: int, end: int) -> None:
        """Run the steps of a split up to this one."""
        split = self.work.splits[i]
        device, steps = split.backend.device, split.steps[self.done[i] : end]
        for step in steps:
            seconds = self.seconds(step)
            begin = max([self.now[device], *self._awaited(step)])
            if isinstance(step, LoadStep):
                self.bus[device] = max(begin, self.bus.get(device, 0.0)) + seconds
                self.between[device] += seconds
                if step.ahead:
                    self.arrivals[step.node] = self.bus[device]
                    continue
                self.now[device] = self.bus[device]
                continue
            self.now[device] = begin + seconds
            self.busy[device] += seconds
        self.ends[i], self.done[i] = self.now[device], end

    def _awaited(self, step: Step) -> list[float]:
        """When the weights have arrived that a step reads and its device reads ahead."""
        nodes = {read.base for read in step.reads} & self.arrivals.keys()
        return [self.arrivals.pop(node) for node in nodes]

    def together(self, members: Sequence[int]) -> None:
        """Run splits whose devices meet in joint steps."""
        splits = [self.work.splits[i] for i in members]
        for turn in rounds([[step.joint for step in split.steps] for split in splits]):
            meeting = [(members[number], index) for number, index in turn.items()]
            for i, index in meeting:
                self.steps(i, index)
            names = [self.work.splits[i].backend.device for i, _ in meeting]
            begin = max(self.now[name] for name in names)
            for (i, index), name in zip(meeting, names):
                joint = self.seconds(self.work.splits[i].steps[index])
                self.now[name] = begin + joint
                self.between[name] += joint
                self.done[i] += 1
        for i, split in zip(members, splits):
            self.steps(i, len(split.steps))


def _one_collective(steps: tuple[Step, ...]) -> bool:
    """Whether the split begins with a collective: its parts arrive at the same time."""
    return bool(steps) and steps[0].node.op.name in ("all_reduce", "all_gather", "reduce_scatter")


def seconds_of(work: Work, step: Step, rates: Rates, launches: int) -> float:
    """A step or copy of a planned graph, alone."""
    ends = [work.home(step.node.base)]
    if step.node.op is transfer:
        ends.append(work.home(origin(step.node)))
    if any(map(in_host_memory, ends)):
        rates = HOST
    if isinstance(step, LoadStep):
        [share] = {expected_share(r) for r in work.graph.users[step.node]} if step.ids else {1.0}
        return rates.latency + share * step.nbytes / BUS
    if step.node.op is transfer:
        return rates.latency + step.node.spec.nbytes / rates.link
    joint = step.joint
    if joint is None:
        return launches * rates.launch + _longer(step.nodes, step, rates)
    at = step.nodes.index(joint)
    before, behind = step.nodes[:at], step.nodes[at + 1 :]
    seconds = _joint_seconds(joint, rates)
    if joint.spec.nbytes > SMALL:  # else less than the wait for the other devices varies
        seconds = max(seconds, _longer(behind, step, rates))
    return seconds + (launches * rates.launch + _longer(before, step, rates) if before else 0.0)


def _longer(nodes: Sequence[Node], step: Step, rates: Rates) -> float:
    """The operations of some nodes of a step, or their bytes, whichever take longer."""
    works = [_work(node, step, rates) for node in nodes]
    return max(sum(w[0] for w in works), sum(w[1] for w in works) / rates.nbytes)


def _joint_seconds(joint: Node, rates: Rates) -> float:
    """What devices take together. Large sums that need not be exact are sent in half the bytes by
    two devices."""
    if joint.op is joint_reduce and len(places_of(joint)) <= PEERS:
        n, nbytes = len(places_of(joint)), joint.spec.nbytes
        if nbytes <= SMALL:
            return rates.small + (n - 1) * nbytes / rates.link
        if n == 2 and not joint.attrs["exact"]:
            return rates.small + nbytes / 2 / rates.link
    return rates.latency + cost_of(joint).sent / rates.link


def _work(node: Node, step: Step, rates: Rates) -> tuple[float, float]:
    """Seconds of a node's operations, and the bytes that it moves from and to memory."""
    cost = cost_of(node)
    seconds, nbytes = cost.flops / rates.flops, cost.nbytes
    if node.op.name in ("mul_mat_id", "moe_up_gate"):
        seconds, nbytes = _experts(node, rates)
    elif node.op.name == "flash_attn_ext":
        seconds = cost.flops * _visible(node, step) / rates.attention
    inner = {other for other in step.nodes if other is not step.node}
    nbytes -= sum(
        s.spec.nbytes for s in dict.fromkeys(node.src) if s is not None and s.base in inner
    )
    if node in inner:
        nbytes -= node.spec.nbytes
    return seconds, max(0.0, nbytes)


def _experts(node: Node, rates: Rates) -> tuple[float, float]:
    """Of products by expert id, on the device with most: ids are taken to be random."""
    cost, ids = cost_of(node), node["ids"]
    weights = [node[name] for name in node.op.weights]
    here, picks = weights[0].ne[2], ids.spec.elements
    rows = busiest(picks, here / all_experts(node))
    touched = min(here, rows)
    whole = sum(w.spec.nbytes for w in weights) / here
    nbytes = cost.nbytes - whole * (min(here, picks) - touched)
    empty = rates.tail * touched if ids.ne[1] > VECTORS else 0.0
    return cost.flops * (rows + empty) / picks / rates.experts, nbytes


def all_experts(node: Node) -> int:
    """The experts of all devices: one that has some of them looks its ids up in a table of all."""
    table: Node = node["ids"]
    while table.op.name in ("add", "get_rows", "reshape"):
        table = table.src[0] or table
    here: int = node[node.op.weights[0]].ne[2]
    return table.spec.elements if table.op is constant_op else here


def busiest(picks: int, part: float) -> float:
    """The expected picks of the device with most, if each has `part` of what is picked at random:
    the mean, and the largest of so many normal deviations (Blom 1958)."""
    if part >= 1:
        return float(picks)
    n = 1 / part
    largest = NormalDist().inv_cdf((n - 0.375) / (n + 0.25))
    mean = picks * part
    return float(min(picks, max(1.0, mean + mean**0.5 * largest)))


def _visible(node: Node, step: Step) -> float:
    """The part of the scores that a causal mask leaves: the kernels skip the others."""
    tokens, rows = node["q"].ne[1], node["k"].ne[1]
    masked = any(other.op.name == "causal_mask" for other in step.nodes)
    return 1 - (tokens - 1) / (2 * rows) if masked and tokens <= rows else 1.0
