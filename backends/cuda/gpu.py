"""The properties of a GPU that kernels may depend on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """The properties of a GPU that kernels may depend on.

    arch    in NVRTC's spelling without "sm_": "90a"
    sms     number of multiprocessors
    shared  maximum bytes of shared memory per block
    l2      bytes of L2 cache
    """

    name: str
    arch: str
    sms: int
    shared: int
    l2: int
    memory: int

    @property
    def overlaps(self) -> bool:
        """Whether a launch may start before its predecessor has ended; every kernel waits for it
        (kernels/include/overlap.cuh)."""
        return not self.arch.startswith("8")


#: The device assumed where none is present: for planning and compiling ahead.
H200 = Device("H200", "90a", 132, 232_448, 60 << 20, 141 << 30)
