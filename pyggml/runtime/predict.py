"""The time of a plan by the cost rules of its ops: a prediction, not a measurement.

A step takes the longer of its operations and its bytes at a device's rates, and at least the time
of a launch. A copy or a collective takes a latency and its bytes at the rate of the link. Splits
start when their device is free and what they wait for is done. Steps of the host and copies to and
from it have rates of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyggml.backends.base import in_host_memory
from pyggml.backends.step import Step
from pyggml.joint import cliques, joint_reduce, rounds
from pyggml.operation import cost_of
from pyggml.passes.work import Split, Work
from pyggml.transfer import origin, transfer


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device and its links sustain.

    The defaults are two thirds of an NVIDIA H100 SXM's figures (data sheet: 989 TFLOP/s of f16,
    3.35 TB/s), 2 us for a launch, and what NCCL and our own sums took between two H100 with 18
    NVLinks: 10.2 us for 8 KiB and 82 us for 16 MiB, 3.9 us up to 128 KiB.

    flops, nbytes  operations and bytes of memory a second
    link           bytes a second from one device to another
    launch         seconds that a step takes at least
    latency        seconds of a copy or collective without bytes
    small          seconds of a sum of at most SMALL bytes that devices take together
    """

    flops: float = 660e12
    nbytes: float = 2.2e12
    link: float = 234e9
    launch: float = 2e-6
    latency: float = 10e-6
    small: float = 3.9e-6


#: The largest parts whose sum takes `Rates.small`, in bytes.
SMALL = 128 << 10


#: A host with 8 channels of memory and PCIe 5.0: two thirds of 3 TFLOP/s, 300 GB/s and, for copies
#: to and from devices, 63 GB/s.
HOST = Rates(flops=2e12, nbytes=200e9, link=42e9)


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
    nodes = [[step.node for step in split.steps] for split in work.splits]
    last = {max(members): members for members in cliques(nodes)}
    waiting = {i for members in last.values() for i in members}
    for i, split in enumerate(work.splits):
        clocks.copies(i, split)
        if i in last:
            clocks.together(last[i])
        elif i not in waiting:
            clocks.steps(i, len(split.steps))
    alone = tuple(seconds_of(work, step, clocks.rates) for step in work.steps)
    longest = max(clocks.between.values(), default=0.0)
    return Prediction(max(clocks.now.values(), default=0.0), clocks.busy, longest, alone)


class _Clocks:
    """The clock of each device, in seconds of a run.

    now, busy, between  by device
    ends, done          of each split: when it ends, and how many of its steps have run
    """

    def __init__(self, work: Work, rates: Rates) -> None:
        self.work, self.rates = work, rates
        self.now: dict[str, float] = {}
        self.busy: dict[str, float] = {}
        self.between: dict[str, float] = {}
        self.ends: dict[int, float] = {}
        self.done = [0] * len(work.splits)

    def copies(self, i: int, split: Split) -> None:
        """Wait for other splits, and copy what they have computed."""
        device = split.backend.device
        sent = [seconds_of(self.work, step, self.rates) for step in split.copies]
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
        seconds = sum(seconds_of(self.work, step, self.rates) for step in steps)
        self.now[device] += seconds
        self.busy[device] += seconds
        self.ends[i], self.done[i] = self.now[device], end

    def together(self, members: Sequence[int]) -> None:
        """Run splits whose devices meet in joint steps."""
        splits = [self.work.splits[i] for i in members]
        for turn in rounds([[step.node for step in split.steps] for split in splits]):
            meeting = [(members[number], index) for number, index in turn.items()]
            for i, index in meeting:
                self.steps(i, index)
            names = [self.work.splits[i].backend.device for i, _ in meeting]
            begin = max(self.now[name] for name in names)
            for (i, index), name in zip(meeting, names):
                joint = seconds_of(self.work, self.work.splits[i].steps[index], self.rates)
                self.now[name] = begin + joint
                self.between[name] += joint
                self.done[i] += 1
        for i, split in zip(members, splits):
            self.steps(i, len(split.steps))


def _one_collective(steps: tuple[Step, ...]) -> bool:
    """Whether the split begins with a collective: its parts arrive at the same time."""
    return bool(steps) and steps[0].node.op.name in ("all_reduce", "all_gather", "reduce_scatter")


def seconds_of(work: Work, step: Step, rates: Rates) -> float:
    """A step or copy of a planned graph, alone."""
    ends = [work.home(step.node.base)]
    if step.node.op is transfer:
        ends.append(work.home(origin(step.node)))
    if any(map(in_host_memory, ends)):
        rates = HOST
    if step.node.op is transfer:
        return rates.latency + step.node.spec.nbytes / rates.link
    if step.node.op is joint_reduce and step.node.spec.nbytes <= SMALL:
        return rates.small
    if step.node.op.joint:
        return rates.latency + cost_of(step.node).sent / rates.link
    costs = [cost_of(node) for node in step.nodes]
    flops, nbytes = sum(c.flops for c in costs), sum(c.nbytes for c in costs)
    return max(rates.launch, flops / rates.flops, nbytes / rates.nbytes)
