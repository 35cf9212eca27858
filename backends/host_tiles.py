"""How the cpu backend stores each block type in tiles: planes of codes, scales and zero points.

A GPU that borrows such a weight reads the tiles (cuda/kernels/pack.cu), so the host needs no other
copy.

A tile is 16 rows of a matrix. Along a row, weights form groups of 32, and the value of a weight is

    w = scale (code - zero) + minimum,      or with levels   w = scale (levels[code] - zero)

All rows of a tile lie in the lanes of a vector: a vector of codes holds weights 4 j to 4 j + 3 of a
group, of 16 rows. So the sums of 16 rows are the lanes of one register, nothing is ever added
across lanes, and scales are read for 16 rows at once. A tile is a sequence of groups, each with

    scales  one entry for each row, as in `SCALES`
    codes   8 bits: 8 vectors, in order
            4 bits: 4 vectors; vector v holds j = v in the low half of each byte, v + 4 in the high
            2 bits: 2 vectors; vector v holds j = 4 v to 4 v + 3, from the low bits up
            1 bit: 8 words of 64 bits, in order
            The lower bits of codes come before the higher ones

and before every 8 groups, for types with blocks of 256, the f16 factors of their scales. A thread
reads a tile, and the tiles of a matrix, from the first byte to the last.

The design that lost: a plane of scales and a plane of codes in each tile. The processor's prefetch
has to find two streams again in every tile, and rows of 576 weights were read at half the speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import prod

from pyggml.dtypes import DType
from pyggml.quants.common import FP4_LEVELS, IQ4_LEVELS
from pyggml.spec import Ne

#: The name of this layout.
LAYOUT = "tiles16"
ROWS = 16
GROUP = 32

#: Bytes of a group in the plane of codes with this many bits.
CODE_BYTES = {8: 512, 4: 256, 2: 128, 1: 64}

_IQ4 = tuple(level + 128 for level in IQ4_LEVELS)


@dataclass(frozen=True, slots=True)
class Scales:
    """How a form stores its scales.

    nbytes   of a group of 16 rows
    super_   bytes of the factors of 256 weights of 16 rows
    minimum  whether there is a minimum
    halves   whether the two halves of a group have scales of their own
    """

    nbytes: int
    super_: int
    minimum: bool = False
    halves: bool = False


#: half      f16 scale                          half_min   f16 scale, f16 minimum
#: bf16      bf16 scale
#: byte      d s: f16 d, int8 s                 byte_min   d s and -m n: f16 d, m; uint8 s, n
#: bytes     as byte, for each half             nibbles    as byte_min, for each half; n << 4 | s
SCALES = {
    "half": Scales(32, 0),
    "half_min": Scales(64, 0, minimum=True),
    "bf16": Scales(32, 0),
    "byte": Scales(16, 32),
    "bytes": Scales(32, 32, halves=True),
    "byte_min": Scales(32, 64, minimum=True),
    "nibbles": Scales(32, 64, minimum=True, halves=True),
}


@dataclass(frozen=True, slots=True)
class Form:
    """A block type in tiles.

    bits    of each plane of codes
    scale   the name of its `SCALES`
    zero    the code (or level) of value 0
    levels  what the codes stand for, 0 to 255; None: themselves
    """

    name: str
    bits: tuple[int, ...]
    scale: str
    zero: int = 0
    levels: tuple[int, ...] | None = None

    @property
    def scales(self) -> Scales:
        return SCALES[self.scale]

    @property
    def group(self) -> int:
        """Bytes of a group of a tile."""
        return self.scales.nbytes + sum(CODE_BYTES[bits] for bits in self.bits)

    @property
    def planes(self) -> tuple[int, ...]:
        """Where in a group the codes of each of `bits` begin."""
        sizes = [self.scales.nbytes, *(CODE_BYTES[bits] for bits in self.bits)]
        return tuple(accumulate(sizes))[:-1]

    @property
    def wide(self) -> bool:
        """Whether a code (or level) may be above 127."""
        return max(self.levels or (0,)) > 127 or self.bits == (8,)


_FORMS = (
    Form("q4_0", (4,), "half", 8),
    Form("q4_1", (4,), "half_min"),
    Form("q5_0", (4, 1), "half", 16),
    Form("q5_1", (4, 1), "half_min"),
    Form("q8_0", (8,), "half", 128),
    Form("q2_K", (2,), "nibbles"),
    Form("q3_K", (2, 1), "bytes", 4),
    Form("q4_K", (4,), "byte_min"),
    Form("q5_K", (4, 1), "byte_min"),
    Form("q6_K", (4, 2), "bytes", 32),
    Form("iq4_nl", (4,), "half", 128, _IQ4),
    Form("iq4_xs", (4,), "byte", 128, _IQ4),
    Form("mxfp4", (4,), "bf16", 12, tuple(level + 12 for level in FP4_LEVELS)),
)
FORMS = {form.name: form for form in _FORMS}


@dataclass(frozen=True, slots=True)
class Tiles:
    """The sizes of a weight in tiles.

    groups    in a row
    tiles     of a matrix
    matrices  how many
    tile      bytes of a tile
    """

    groups: int
    tiles: int
    matrices: int
    tile: int

    @property
    def nbytes(self) -> int:
        return self.tile * self.tiles * self.matrices


def tiles_of(dtype: DType, ne: Ne) -> Tiles:
    """The tiles of a weight whose type is in `FORMS`."""
    form = FORMS[dtype.name]
    groups = ne[0] // GROUP
    tile = form.group * groups + form.scales.super_ * -(-groups // 8)
    return Tiles(groups, -(-ne[1] // ROWS), prod(ne[2:]), tile)
