"""The kernels' decoders, compiled for the host, give the values of the codecs.

Skipped if no C++ compiler supports `_Float16`; test_packing.py checks tiles without a compiler.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyggml import quants
from pyggml.backends.cuda.device.compiler import KERNELS
from pyggml.backends.cuda.weights import packing
from pyggml.backends.cuda.weights.formats import FORMATS
from pyggml.dtypes import TYPES
from pyggml.parity import tolerance
from tests.cuda.host import libraries, on_host

HERE = Path(__file__).parent
TENSOR = "{(char*)raw, {0, row, row * rows, row * rows}, {32 * groups, rows, 1, 1}}"


def products() -> str:
    """C++ that decodes weights as products do: from tiles, and from rows of a file."""
    tile = (KERNELS / "linear_tile.cu").read_text().split("// -- the product")[0]
    tile = re.sub(r"#include.*", "", on_host(tile))
    cases = "\n".join(
        f'if (name == std::string("{name}")) return run<{name}>(tiles, tile, packed, tensor, out);'
        for name in FORMATS
    )
    return f"""#include "host.hpp"
#include "raw.cuh"
#include "linear_fragments.cuh"
{tile}
{(HERE / "decoders.cpp").read_text()}
#include <string>
extern "C" int decode_weights(const char* name, int tiles, int tile, const Packed& packed,
                              const void* raw, long long row, float* out) {{
    const int rows = packed.rows, groups = packed.groups;
    const Tensor tensor = {TENSOR};
    {cases}
    return 1;
}}
{copies()}"""


def copies() -> str:
    """C++ that runs the kernel `decode_tiles` of copy.cu thread by thread, to f16."""
    source = (KERNELS / "copy.cu").read_text()
    parts = [
        re.search(rf"^{start}.*?^}}\n", source, re.M | re.S)
        for start in ("// Row number", "// Decodes a weight in tiles")
    ]
    cases = "\n".join(
        f'if (name == std::string("{name}")) '
        f"wide ? decode_tiles<tiles::{name}, __half, 8>(tensor, packed, total)"
        f" : decode_tiles<tiles::{name}, __half, 1>(tensor, packed, total);"
        for name in FORMATS
    )
    return f"""static Dim3 blockIdx, thread;
#define threadIdx thread
{"".join(part.group() for part in parts if part is not None)}
extern "C" void decode_tiles_to_f16(const char* name, const Packed& packed, int matrices, int wide,
                                    char* out) {{
    const int n = 32 * packed.groups, row = 2 * n, rows = packed.rows;
    const int matrix = row * rows;
    const Tensor tensor = {{out, {{2, row, matrix, matrix * matrices}}, {{n, rows, matrices, 1}}}};
    const unsigned total = matrices * packed.tiles * packed.groups * 8;
    for (blockIdx.x = 0; blockIdx.x * 256 < total; ++blockIdx.x)
        for (thread.x = 0; thread.x < 256; ++thread.x) {{ {cases} }}
}}"""


def values() -> str:
    """C++ that decodes blocks value by value, as copies and gathers do."""
    cases = "\n".join(
        f'if (name == std::string("{name}"))'
        f"for (; n > 0; --n, raw += file::{name}::BYTES)"
        f"for (int i = 0; i < file::{name}::SIZE; ++i) *out++ = file::{name}::value(raw, i);"
        for name in FORMATS
    )
    return f"""#include "host.hpp"
#include "blocks.cuh"
#include <string>
extern "C" void decode_values(const char* name, const unsigned char* raw, int n, float* out) {{
    {cases}
}}"""


@pytest.fixture(scope="module", name="libraries")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The libraries of `products` and `values`."""
    texts = {"products": products(), "values": values()}
    return libraries(tmp_path_factory.mktemp("host"), texts, "-ffp-contract=off")


def blocks_of(name: str, rows: int) -> NDArray[np.uint8]:
    """Random bytes [rows, blocks, bytes of a block], with scales between 2^-8 and 2^8."""
    t = TYPES[name]
    shape = (rows, 3 if t.block > 64 else 8, t.nbytes)
    raw = np.random.default_rng(3).integers(0, 256, shape, np.uint8)
    if name == "mxfp4":
        raw[..., 0] = 120 + raw[..., 0] % 16
    elif name == "nvfp4":
        raw[0, 0, :4] = 0x7F, 0xFF, 0x80, 0
    else:
        scales = {"q2_K": (80, 82), "iq1_m": (54,), "q1_0": (0,)}.get(name, (0, 2, t.nbytes - 2))
        for at in scales:
            raw[..., at + 1] = raw[..., at + 1] & 0x9F | 0x20
    return raw


def pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("tiles", (True, False), ids=("tiles", "rows of a file"))
@pytest.mark.parametrize("name", FORMATS)
def test_products_decode_like_the_codecs(name: str, tiles: bool, libraries: list[Any]) -> None:
    """`vec` exactly; `tile` with the rounding to f16, or to bf16 for mxfp4."""
    rows = 19
    raw = blocks_of(name, rows)
    expected = quants.decode(name, raw)
    t, ne = TYPES[name], (expected.shape[1], rows, 1, 1)
    packed = packing.to_tiles(t, ne, raw)
    struct = ctypes.byref(packing.tiles_of(t, ne).at(packed.ctypes.data))
    for tile in (False, True):
        result = np.full_like(expected, np.nan)
        status = libraries[0].decode_weights(
            name.encode(), tiles, tile, struct, pointer(raw),
            ctypes.c_longlong(t.row_bytes(ne[0])), pointer(result),
        )  # fmt: skip
        assert status == 0
        if tile:
            assert tolerance.nmse(result, expected) < 2e-7
        else:
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_casts_from_tiles_are_those_of_the_codecs(name: str, libraries: list[Any]) -> None:
    """Two matrices of 19 rows, so that the last tile of each is not full."""
    raw = blocks_of(name, 38)
    expected = quants.decode(name, raw).astype(np.float16)
    t, ne = TYPES[name], (expected.shape[1], 19, 2, 1)
    packed = packing.to_tiles(t, ne, raw)
    struct = ctypes.byref(packing.tiles_of(t, ne).at(packed.ctypes.data))
    for wide in (False, True):
        result = np.full_like(expected, np.nan)
        libraries[0].decode_tiles_to_f16(name.encode(), struct, 2, wide, pointer(result))
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_the_codecs(name: str, libraries: list[Any]) -> None:
    raw = blocks_of(name, 5)
    expected = quants.decode(name, raw)
    result = np.full_like(expected, np.nan)
    libraries[1].decode_values(
        name.encode(), pointer(raw), expected.size // TYPES[name].block, pointer(result)
    )
    np.testing.assert_array_equal(result.view(np.uint32), expected.view(np.uint32))
