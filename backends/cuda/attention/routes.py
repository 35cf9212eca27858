"""The choice of a flash_attn_ext kernel for a node, and how its work is split. Needs no device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from pyggml.backends.cuda.gpu import Device
from pyggml.backends.cuda.table import ALIGNMENT
from pyggml.node import Node

#: Head sizes (d_k, d_v) with tensor-core kernels.
PAIRS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
#: Those with kernels for a V that is part of K. Only these read lists of keys.
LATENT = ((576, 512), (512, 512))
#: Warps and stages of attention_split.cu: the first pair that fits is used. The last one fits every
#: GPU from 8.0 on: 99 KB on 8.6, 8.9 and 12.0, 163 KB on 8.0.
SPLIT = {
    (64, 64): ((8, 4), (8, 2)),
    (80, 80): ((8, 4), (8, 2)),
    (96, 96): ((8, 3), (4, 3)),
    (128, 128): ((8, 2), (4, 2)),
    (192, 128): ((8, 2), (4, 2)),
    (256, 256): ((4, 2), (2, 2)),
}
#: The same for attention_latent.cu: MI, WM, WN and keys per tile, by rows per block.
LATENT_SPLIT = {
    16: ((1, 1, 8, 64), (1, 2, 4, 32), (1, 1, 4, 32)),
    64: ((2, 2, 4, 64), (2, 2, 4, 32), (1, 2, 4, 32), (1, 1, 4, 32)),
}
#: Keys per tile of attention_tiles.cu and attention_hopper.cu.
TILES = {pair: 32 if pair == (256, 256) else 64 for pair in PAIRS}
HOPPER = {(64, 64): 128, (128, 128): 128, (192, 128): 128, (256, 256): 64}
#: The type codes of attention_any.cu.
TYPES = {
    name: code
    for code, name in enumerate(
        ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")
    )
}
C_TYPES = {"f16": "__half", "bf16": "__nv_bfloat16", "q8_0": "__half"}
#: Upper bounds of the kernels' static shared memory: by route, and for all others. `latent` with 64
#: rows a block uses up to 2,944 bytes; latent_hopper, with the least room left, 1,344.
STATIC = {"latent": 3072, "list_token": 10240}
MOST_STATIC = 2048
#: Number of blocks that fills the GPU once. A constant, not a property of the device, so that
#: memory can be planned and results do not depend on the GPU.
FULL = 132
#: Keys and queries per cell of a mask's map.
CELL = 64
#: Minimum number of keys per split.
LEAST = {
    "any": 64,
    "split": 128,
    "latent": 64,
    "latent_hopper": 64,
    "list_hopper": 128,
    "list_token": 64,
    "tiles": 256,
}


@dataclass(frozen=True, slots=True)
class Instance:
    """A kernel instance: its name, threads per block, rows of scores per block, dynamic shared
    memory."""

    name: str
    threads: int
    rows: int
    shared: int


@dataclass(frozen=True)
class Shape:
    """The sizes of one flash_attn_ext node."""

    d_k: int
    d_v: int
    n_q: int
    n_kv: int
    heads: int
    heads_kv: int
    n3: int
    type_k: str
    type_v: str
    mask_batch: int  # 0: no map of a mask
    exact: bool
    n_ids: int = 0  # 0: no lists

    @staticmethod
    def of(node: Node, fused: bool = False) -> Shape:
        q, k, v, mask, ids = node["q"], node["k"], node["v"], node.get("mask"), node.get("ids")
        batch = 0 if mask is None or fused or ids is not None else mask.ne[3]
        n_ids = 0 if ids is None else ids.ne[0]
        names = k.dtype.name, v.dtype.name
        exact = node.attrs["prec"] == "f32"
        d_k, n_q, heads, n3 = q.ne
        return Shape(d_k, v.ne[0], n_q, k.ne[1], heads, k.ne[2], n3, *names, batch, exact, n_ids)

    @property
    def ratio(self) -> int:
        """Heads per key head."""
        return self.heads // self.heads_kv

    @property
    def rows(self) -> int:
        """Rows of scores per key head."""
        return self.n_q * self.ratio

    @property
    def keys(self) -> int:
        """Keys of a query."""
        return self.n_ids or self.n_kv

    def pitch(self, rows: int) -> int:
        """Rows from one query to the next, with `rows` per block: no block has two lists."""
        return _ceil(self.ratio, rows) * rows if self.n_ids else self.ratio

    def blocks(self, rows: int) -> int:
        """Blocks of `rows` rows per key head."""
        return _ceil(self.n_q * self.pitch(rows), rows)

    @cached_property
    def routes(self) -> tuple[str, ...]:
        """The kernels that may run it, best first; addresses and the device decide between them."""
        pair, kind = (self.d_k, self.d_v), self.type_k
        if self.exact or kind != self.type_v or kind not in C_TYPES:
            return ("any",)
        if pair in LATENT:
            if self.n_ids:
                if self._many:
                    return "list_hopper", "latent", "any"
                few = kind == "f16" and self.ratio >= 128
                return ("list_token",) * few + ("latent", "any")
            return ("latent_hopper",) * self._many + ("latent", "any")
        if self.n_ids or pair not in PAIRS or (kind == "q8_0" and pair not in HOPPER):
            return ("any",)
        if self.rows <= 32:
            return "split", "any"
        return ("hopper",) * (pair in HOPPER and self._unsplit) + ("tiles", "any")

    @property
    def _unsplit(self) -> bool:
        """Whether one block for all keys of 128 rows is as fast as splits and `combine`.

        On an H100 the first takes 3.3 us for 128 keys, and a block of `tiles` 4.6. `combine` takes
        0.58 us for 128 rows, and 7 more for its launch. FULL blocks run at once.
        """
        blocks = self.blocks(128) * self.heads_kv * self.n3
        return 2 * blocks >= FULL or (
            _ceil(self.n_kv, 128) * (3.3 - 4.6 * blocks / FULL) <= 7 + 0.58 * blocks
        )

    @property
    def _many(self) -> bool:
        """Whether latent attention has rows enough for the kernels of 9.0. They decode all keys of
        q8_0 first, which must not cost more than what it saves."""
        if self.n_ids:
            full = self.ratio > 16 and self.blocks(64) * self.heads_kv * self.n3 >= 8
            return full and (self.type_k != "q8_0" or self.n_q * self.n_ids >= self.n_kv)
        return self.rows > (256 if self.type_k == "q8_0" else 16)

    @property
    def long(self) -> bool:
        """Whether a block of `latent_hopper` has so many tiles of 64 keys that it takes pairs of
        them. With 4 tiles it loses 3 us, with 16 it gains 2."""
        return _ceil(_ceil(self.n_kv, 64), self.splits("latent_hopper")) >= 16

    def block_rows(self, route: str) -> int:
        """Rows of scores per block; for `latent` the maximum, if shared memory allows."""
        if route in ("latent_hopper", "list_hopper"):
            return 64
        if route == "list_token":
            return 32
        if route == "latent":
            if self.n_ids and self.ratio > 16:
                return 16 if self.blocks(16) * self.heads_kv * self.n3 <= FULL else 64
            return 16 if self.n_ids or self.rows <= 16 else 64
        if route == "tiles":
            return 64 if self.rows <= 64 else 128
        return 128 if route == "hopper" else 16

    def splits(self, route: str) -> int:
        """The number of splits of the keys, chosen so that even few rows fill the GPU."""
        if route == "hopper":
            return 1
        blocks = self.blocks(self.block_rows(route)) * self.heads_kv * self.n3
        units = _ceil(self.keys, LEAST[route])
        most = max(1, min(FULL * (2 if route == "any" else 1) // blocks, units))
        return _ceil(units, _ceil(units, most))

    def parts(self, route: str) -> tuple[int, int]:
        """Bytes that the splits write for `combine`: sums; maxima and sums of weights. They are
        separate blocks of scratch, because the second are pairs of floats: after an odd number of
        floats they would not be 8-byte aligned."""
        n = self.splits(route)
        token = route == "list_token"
        count = 0 if n == 1 and not token else self.n3 * self.n_q * self.heads * n
        return (2 if token else 4) * count * self.d_v, 8 * count

    @property
    def map(self) -> int:
        """Size of the map of an explicit mask, in bytes."""
        return self.mask_batch * _ceil(self.n_q, CELL) * _ceil(self.n_kv, CELL)

    def decoded(self, route: str) -> tuple[int, int]:
        """Bytes for keys and values decoded to f16, if the kernel does not read q8_0 itself."""
        if self.type_k != "q8_0" or route in ("any", "split", "latent"):
            return 0, 0
        rows = 2 * self.n_kv * self.heads_kv * self.n3
        return rows * self.d_k, 0 if (self.d_k, self.d_v) in LATENT else rows * self.d_v

    def instance(self, route: str, room: int, extra: bool) -> Instance:
        """The instance that a route launches; the smallest one if none fits.

        room   dynamic shared memory available to a block
        extra  whether there is a mask or a soft-cap
        """
        d_k, d_v, kind = self.d_k, self.d_v, C_TYPES.get(self.type_k)
        rows = self.block_rows(route)
        if route == "any":
            size = next(n for n in (64, 128, 256, 576) if n >= max(d_k, d_v))
            keys = 16 if size == 576 else 32
            shared = 4 * ((16 + keys) * (size + 4) + 16 * (keys + 1))
            return Instance(f"any<{size}, {keys}, {self._listed}>", 256, rows, shared)
        if route == "latent_hopper" and not self.long:
            name = f"latent_hopper<{kind}, {d_k}>"
            return Instance(name, 256, rows, 64 * (6 * d_k + 128) + 1024)
        if route in ("latent_hopper", "list_hopper"):
            name = f"{'list_hopper' if self.n_ids else 'latent_pairs'}<{kind}, {d_k}>"
            weights = 0 if d_k > d_v else 256
            return Instance(name, 384, rows, 64 * (6 * d_k + weights) + 1024)
        if route == "list_token":
            tiles = min(2, _ceil(_ceil(self.n_ids, LEAST[route]), self.splits(route)))
            shared = 32 * (2 * d_k + 128) + tiles * 128 * d_k + 1024
            return Instance(f"list_token<{d_k}>", 256, rows, shared)
        if route == "latent":
            return self.latent(rows, room)
        if route == "split":
            return _first_fit((self._split(*cut) for cut in SPLIT[d_k, d_v]), room)
        tile = 2 * (d_k + d_v) + 32  # bytes of a key and its value, padded
        if route == "tiles":
            keys = TILES[d_k, d_v]
            name = f"tiles<{kind}, {d_k}, {d_v}, {rows // 16}, {keys}>"
            return Instance(name, 2 * rows, rows, max(2 * keys * tile, rows * (2 * d_k + 16)))
        keys = HOPPER[d_k, d_v]
        name = f"hopper<{kind}, {d_k}, {d_v}, {keys}, {str(extra).lower()}>"
        return Instance(name, 384, rows, 256 * d_k + 4 * keys * (d_k + d_v) + 1024)

    def latent(self, rows: int, room: int) -> Instance:
        """The instance of `latent` for `rows` rows a block."""
        return _first_fit((self._latent(*cut) for cut in LATENT_SPLIT[rows]), room)

    def _split(self, warps: int, stages: int) -> Instance:
        d_k, d_v, raw = self.d_k, self.d_v, self.type_k == "q8_0"
        tile = 16 * (2 * (d_k + d_v) + 32)  # bytes of 16 keys and values, padded
        stage = _ceil(16 * (d_k + d_v) // 32 * 34, 16) * 16 if raw else tile
        ring = stages * stage + (tile if raw else 0)
        words = f"{C_TYPES[self.type_k]}, {d_k}, {d_v}, {warps}, {stages}, {str(raw).lower()}"
        return Instance(f"split<{words}>", 32 * warps, 16, warps * max(ring, 64 * (d_v + 4)))

    def _latent(self, mi: int, wm: int, wn: int, keys: int) -> Instance:
        raw, rows, row = self.type_k == "q8_0", 16 * mi * wm, 2 * self.d_k
        tiles = keys * (row + 2 * (self.d_k // 32 * 34)) if raw else 2 * keys * row
        cut = f"{mi}, {wm}, {wn}, {keys}"
        words = f"{C_TYPES[self.type_k]}, {self.d_k}, {cut}, {str(raw).lower()}, {self._listed}"
        return Instance(f"latent<{words}>", 32 * wm * wn, rows, rows * (row + 2 * keys) + tiles)

    @property
    def _listed(self) -> str:
        return str(self.n_ids > 0).lower()

    def scratch(self) -> int:
        """Bytes of scratch, enough for any kernel that may be chosen."""
        return max(
            sum(
                -(-n // ALIGNMENT) * ALIGNMENT for n in (*self.parts(r), self.map, *self.decoded(r))
            )
            for r in self.routes
        )


def room_of(route: str, device: Device) -> int:
    """Bytes of dynamic shared memory that a block of the route's kernel may have."""
    return device.shared - STATIC.get(route, MOST_STATIC)


def _first_fit(instances: Iterable[Instance], room: int) -> Instance:
    """The first instance that fits, else the last one."""
    for instance in instances:
        if instance.shared <= room:
            break
    return instance


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
