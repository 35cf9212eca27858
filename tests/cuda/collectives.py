"""GPUs with NCCL, imitated on the host: streams run late, kernels run thread by thread, graphs
replay what was captured, and collectives meet as NCCL's do. Kernels that wait for other GPUs run at
the same time as theirs.

In one process, a collective outside of a group, or a group that not all devices take part in, is an
error here; NCCL would wait for ever.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from threading import Lock
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pyggml.backends.cuda import backend, peer_rows, peer_sum
from pyggml.backends.cuda.device import compiler
from pyggml.backends.cuda.launch import Gemm, Launch
from pyggml.backends.cuda.peers import MOST, Peers
from pyggml.backends.null.meeting import MEETINGS, tasks_of
from pyggml.joint import joint_gather, joint_receive, joint_reduce, joint_scatter, joint_send
from tests.cuda import conftest
from tests.cuda.emulated import Meeting, multiply, starter

TYPES = {"NCCL_FLOAT32": np.float32, "NCCL_FLOAT16": np.float16, "NCCL_CHAR": np.uint8}


class Recorder:
    """Stands in for the queue of a stream that is being captured."""

    def __init__(self) -> None:
        self.actions: list[Callable[[Any], None]] = []

    def add(self, action: Callable[[], None]) -> None:
        self.actions.append(lambda stream: stream.queue.add(action))

    def mark(self) -> Any:
        raise AssertionError("an event, or a wait, during a capture")

    run_all = mark


class ExternalStream:
    def __init__(self, handle: int, index: int) -> None:
        self.stream = sys.modules["cuda.bindings.driver"].CUstream(handle)

    def begin_capture(self) -> None:
        self.queue, self.stream.queue = self.stream.queue, Recorder()

    def end_capture(self) -> Any:
        recorder, self.stream.queue = self.stream.queue, self.queue
        if not isinstance(recorder, Recorder):
            raise RuntimeError("the stream is not capturing")

        def launch(stream: ExternalStream) -> None:
            for action in recorder.actions:
                action(stream.stream)

        return SimpleNamespace(upload=lambda stream: None, launch=launch)


class Nccl(ModuleType):
    """`cupy.cuda.nccl`."""

    available = True
    NCCL_SUM = 0

    def __init__(self) -> None:
        super().__init__("cupy.cuda.nccl")
        for i, name in enumerate(TYPES):
            setattr(self, name, i)
        self.types = list(TYPES.values())
        self.group: list[tuple[Communicator, Callable[[Any], None]]] | None = None
        self.depth = 0
        self.calls: list[str] = []
        self.threads = False  # whether ranks are threads
        self.aborted: list[int] = []
        nccl = self

        class Bound(Communicator):
            def __init__(self, count: int, id: Any, index: int) -> None:
                nccl.threads = True
                super().__init__(nccl, count, tuple(id)[:4], index, clique=None)

            @staticmethod
            def initAll(devices: list[int]) -> list[Communicator]:
                nccl.threads = False
                clique: list[Communicator] = []
                id = ("all", *devices)
                for i in range(len(devices)):
                    clique.append(Communicator(nccl, len(devices), id, i, clique))
                return clique

        self.NcclCommunicator = Bound
        self.ids = 0

    def get_unique_id(self) -> bytes:
        self.ids += 1
        return bytes([self.ids, 7, 200, 0]) + bytes(124)

    def groupStart(self) -> None:
        self.depth += 1
        self.group = [] if self.group is None else self.group

    def dropped(self) -> None:
        """The end of a group that an interrupt cut short."""
        self.depth, self.group = 0, None

    def groupEnd(self) -> None:
        self.depth -= 1
        if self.depth:
            return
        group, self.group = self.group, None
        assert group is not None
        cliques = {id(c.clique): c.clique for c, _ in group if c.clique is not None}
        for clique in cliques.values():
            present = list(dict.fromkeys(c for c, _ in group if c.clique is clique))
            assert present == clique, "a group without some of the devices would wait for ever"
        for _, call in group:
            call(None)


class Communicator:
    def __init__(
        self, nccl: Nccl, count: int, id: Any, index: int, clique: list[Communicator] | None
    ) -> None:
        self.nccl, self.clique = nccl, clique
        self.places, self.index = tuple(f"{id}.{i}" for i in range(count)), index
        self.error = 0

    def _queue(self, op: Any, source: int, target: int, count: int, kind: int, stream: int) -> None:
        """Queue an operation, now or in each replay of the graph that is being captured."""
        where = sys.modules["cuda.bindings.driver"].CUstream(stream)
        dtype = np.dtype(self.nccl.types[kind])
        n = {joint_gather: count * len(self.places)}.get(op, count)
        node: Any = SimpleNamespace(
            op=op, attrs={"places": self.places, "index": self.index, "turn": -1},
            spec=SimpleNamespace(elements=n),
        )  # fmt: skip
        length = count * len(self.places) if op is joint_scatter else count

        def read() -> Any:
            if not source:
                return np.zeros(length, dtype)
            return np.frombuffer(ctypes.string_at(source, length * dtype.itemsize), dtype)

        def write(values: Any) -> None:
            ctypes.memmove(target, values.tobytes(), values.nbytes)

        def enqueue(stream: Any) -> None:
            bring, take, announce = tasks_of(node, read, write)
            stream.queue.add(bring)
            announce(stream.queue.mark())
            if self.clique is None:  # ranks are threads: go on while the host waits
                stream.queue.run_all()
            stream.queue.add(take)

        self.nccl.calls.append(op.name)
        if isinstance(where.queue, Recorder):
            where.queue.actions.append(enqueue)
            if self.nccl.group is not None:
                self.nccl.group.append((self, lambda _: None))
        elif self.nccl.group is not None:
            self.nccl.group.append((self, lambda _: enqueue(where)))
        else:
            enqueue(where)
        assert self.clique is None or self.nccl.group is not None, "a call outside of a group"

    def allReduce(
        self, source: int, target: int, count: int, kind: int, op: int, stream: int
    ) -> None:
        self._queue(joint_reduce, source, target, count, kind, stream)

    def allGather(self, source: int, target: int, count: int, kind: int, stream: int) -> None:
        self._queue(joint_gather, source, target, count, kind, stream)

    def reduceScatter(
        self, source: int, target: int, count: int, kind: int, op: int, stream: int
    ) -> None:
        self._queue(joint_scatter, source, target, count, kind, stream)

    def send(self, source: int, count: int, kind: int, peer: int, stream: int) -> None:
        assert self.index == 0 and peer == 1 and len(self.places) == 2
        self._queue(joint_send, source, 0, count, kind, stream)

    def recv(self, target: int, count: int, kind: int, peer: int, stream: int) -> None:
        assert self.index == 1 and peer == 0
        self._queue(joint_receive, 0, target, count, kind, stream)

    def broadcast(
        self, source: int, target: int, count: int, kind: int, root: int, stream: int
    ) -> None:
        """As a sum of zeros and the part of one device."""
        assert self.nccl.group is not None and self.index < len(self.places)
        source = source if self.index == root else 0
        self._queue(joint_reduce, source, target, count, kind, stream)

    def check_async_error(self) -> int:
        return self.error

    def abort(self) -> None:
        self.nccl.aborted.append(self.index)


class Kernels:
    """Compiles the kernels of launches for the host when the first of them starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loaded: dict[tuple[str, str], Callable[[Launch], None]] = {}
        self.known: dict[tuple[str, str], None] = {}
        self._meetings: dict[tuple[str, int], Meeting] = {}
        self._lock = Lock()  # the blocks of a kernel share memory

    def cubin(self, file: str, name: str, arch: str) -> compiler.Cubin:
        self.known[file, name] = None  # by any thread: others read a list of it
        cubin = conftest.fake_cubin(file, name, arch)
        return compiler.Cubin(
            name, f"{file}|{name}", arch, 32, 0, 0, 0, f"{file}|{name}".encode() or cubin.code
        )

    def meet(self, launches: Sequence[Launch]) -> None:
        """Run kernels that wait for each other."""
        if not launches:
            return
        (file,) = {launch.file for launch in launches}
        names = [name for f, name in list(self.known) if f == file]
        with self._lock:
            if (file, len(names)) not in self._meetings:
                folder = self.folder.parent / f"{Path(file).stem}-{len(names)}"
                folder.mkdir()
                self._meetings[file, len(names)] = Meeting(folder, file, names)
            assert self._meetings[file, len(names)].run(launches), "a kernel waits for ever"

    def start(self, launch: Launch) -> None:
        key = launch.file, launch.name
        with self._lock:
            if key not in self._loaded:
                new = [k for k in list(self.known) if k not in self._loaded]
                folder = self.folder / str(len(self._loaded))  # a path is loaded once
                folder.mkdir(parents=True)
                run = starter(folder, [Launch(*k, (1, 1, 1), (1, 1, 1), b"") for k in new])
                self._loaded |= dict.fromkeys(new, run)
            self._loaded[key](launch)


def peers_of(launch: Launch) -> Peers:
    """The argument that says where the others are."""
    for at in range(0, len(launch.args) - ctypes.sizeof(Peers) + 1, 8):
        peers = Peers.from_buffer_copy(launch.args, at)
        boxes, n = [*peers.box], peers.count
        if 1 < n <= MOST and 0 <= peers.index < n and all(boxes[:n]) and not any(boxes[n:]):
            return peers
    raise AssertionError(f"{launch.name} has no boxes")


class Kernel:
    """A launch of a kernel that waits for those of other GPUs: all run when the first must end."""

    launches: dict[int, Launch] = {}
    over: set[tuple[int, ...]] = set()
    numbers = count()
    lock = Lock()

    def __init__(self, kernels: Kernels, launch: Launch) -> None:
        self._kernels, self._launch = kernels, launch
        peers = peers_of(launch)
        self._places = tuple(f"box {address}" for address in peers.box[: peers.count])
        self._index = peers.index

    def enqueue(self, stream: Any, threads: bool) -> None:
        node: Any = SimpleNamespace(
            op=joint_gather, attrs={"places": self._places, "index": self._index, "turn": -1}
        )

        def read() -> Any:
            number = next(self.numbers)
            self.launches[number] = self._launch
            return np.array([number])

        def write(numbers: Any) -> None:
            key = tuple(numbers.tolist())
            with self.lock:
                if key not in self.over:
                    launches = [self.launches[n] for n in key]
                    self._kernels.meet([x for x in launches if "SummedRow" not in x.name])
                    self.over.add(key)
            if "SummedRow" in self._launch.name:  # all parts have been sent
                self._kernels.start(self._launch)

        bring, take, announce = tasks_of(node, read, write)
        stream.queue.add(bring)
        announce(stream.queue.mark())
        if threads:
            stream.queue.run_all()
        stream.queue.add(take)


class Cublas:
    """Queues products, which NumPy computes."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def ready(self) -> Callable[[Gemm], None]:
        return lambda gemm: self.context.stream.queue.add(lambda: multiply(gemm))


#: Freed memory. To free it would wait for all streams, also for that of another thread.
FREED: list[Any] = []


def _freed(block: Any) -> None:
    FREED.append(block)
    del block.live[block.ptr]


def imitate(machine: Any, patch: pytest.MonkeyPatch, kernels: Kernels, gpus: int = 2) -> Nccl:
    """A machine with GPUs, whose kernels run on the host, until the end of the test."""
    machine(f"gpus {gpus}")
    nccl = Nccl()
    bindings: Any = __import__("cuda.bindings.driver").bindings.driver
    patch.setattr(compiler, "compile_instance", kernels.cubin)

    def launch(config: Any, function: Any, params: int, extra: int) -> Any:
        _, buffer, _, size, _ = (ctypes.c_uint64 * 5).from_address(extra)
        args = ctypes.string_at(buffer, ctypes.c_size_t.from_address(size).value)
        file, name = function.symbol.split("|")
        grid = config.gridDimX, config.gridDimY, config.gridDimZ
        block = config.blockDimX, config.blockDimY, config.blockDimZ
        record = Launch(file, name, grid, block, args, config.sharedMemBytes)
        stream = config.hStream
        meets = file in (peer_sum.FILE, peer_rows.FILE) and name != "end_of_run"
        if not meets and "SummedRow" not in name:
            stream.queue.add(lambda: kernels.start(record))
            return (bindings.OK,)
        kernel = Kernel(kernels, record)
        if isinstance(stream.queue, Recorder):
            stream.queue.actions.append(lambda stream: kernel.enqueue(stream, nccl.threads))
        else:
            kernel.enqueue(stream, nccl.threads)
        return (bindings.OK,)

    patch.setattr(bindings, "cuLaunchKernelEx", launch)
    patch.setattr(sys.modules["pycuda.driver"].DeviceAllocation, "free", _freed)
    patch.setattr(backend, "Cublas", Cublas)
    cupy: Any = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(ExternalStream=ExternalStream, nccl=nccl)
    for name, module in (("cupy", cupy), ("cupy.cuda", cupy.cuda), ("cupy.cuda.nccl", nccl)):
        patch.setitem(sys.modules, name, module)
    MEETINGS.forget()
    return nccl
