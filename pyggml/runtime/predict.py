"""The time of a plan by the cost rules of its ops: a prediction, not a measurement.

A step takes the longer of its operations and its bytes at a device's rates, and at least the time
of a launch. A copy or a collective takes a latency and its bytes at the rate of the link. Splits
start when their device is free and what they wait for is done. Steps of the host and copies to and
from it have rates of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyggml.backends.base import in_host_memory
from pyggml.backends.step import Step
from pyggml.operation import cost_of
from pyggml.passes.work import Work
from pyggml.transfer import origin, transfer


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device and its links sustain.

    The defaults are two thirds of an NVIDIA H100 SXM's figures (data sheet: 989 TFLOP/s of f16,
    3.35 TB/s, 450 GB/s of NVLink in each direction), 2 us for a launch and 6 us for a message.

    flops, nbytes  operations and bytes of memory a second
    link           bytes a second from one device to another
    launch         seconds that a step takes at least
    latency        seconds of a copy or collective without bytes
    """

    flops: float = 660e12
    nbytes: float = 2.2e12
    link: float = 300e9
    launch: float = 2e-6
    latency: float = 6e-6


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
    rates = rates or Rates()
    ends: list[float] = []
    free: dict[str, float] = {}
    busy: dict[str, float] = {}
    between: dict[str, float] = {}
    for split in work.splits:
        device = split.backend.device
        sent = [seconds_of(work, step, rates) for step in split.copies]
        copies = (max(sent) if _one_collective(split.steps) else sum(sent)) if sent else 0.0
        steps = sum(seconds_of(work, step, rates) for step in split.steps)
        start = max([free.get(device, 0.0), *(ends[i] for i in split.waits)])
        end = start + copies + steps
        ends.append(end)
        free[device] = end
        busy[device] = busy.get(device, 0.0) + steps
        between[device] = between.get(device, 0.0) + copies
    alone = tuple(seconds_of(work, step, rates) for step in work.steps)
    longest = max(between.values(), default=0.0)
    return Prediction(max(free.values(), default=0.0), busy, longest, alone)


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
    costs = [cost_of(node) for node in step.nodes]
    flops, nbytes = sum(c.flops for c in costs), sum(c.nbytes for c in costs)
    return max(rates.launch, flops / rates.flops, nbytes / rates.nbytes)
