"""A model that several processes run together: what they compare before they begin."""

from __future__ import annotations

import hashlib
import sys
from typing import TYPE_CHECKING

import numpy as np

from pyggml.gguf import GGUFFile, StringArray, Value

if TYPE_CHECKING:
    from pyggml.models.model import Model
    from pyggml.runtime.ranks import Ranks
    from pyggml.runtime.shards import Cuts

#: The bytes at the beginning and the end of each tensor that are compared.
SAMPLE = 256


def together(ranks: Ranks, model: Model) -> tuple[tuple[str, ...], Cuts | None]:
    """The places and the cuts of a model on these ranks, which have compared the model.

    Errors: PeerError if the version, the file or the options differ.
    """
    places = tuple(ranks.places(model.backends))
    shard = "auto" if model.shard is None and ranks.size > 1 else model.shard
    ranks.agree(
        "model",
        "\n".join(
            [
                f"pyggml {sys.modules['pyggml'].__version__}",  # this layer cannot import it
                f"a file of {digest(model.file)}",
                f"options {model.options}",
                f"places {', '.join(places)}, shard {shard}, amb {model.amb}, "
                f"decode_weights {model.decode_weights}, read_ahead {model.read_ahead}",
            ]
        ),
    )
    return places, shard


def digest(file: GGUFFile) -> str:
    """A text that is equal for equal files: the digest of all keys, and of the name, type, size and
    both ends of each tensor. It reads two pages of each tensor, not all data."""
    total = hashlib.sha256()
    for key, value in sorted(file.fields.items()):
        total.update(key.encode() + b"=" + _bytes_of(value) + b"\n")
    for name, info in file.tensors.items():
        total.update(f"{name} {info.dtype.name} {info.ne}\n".encode())
        data = file.array(name).reshape(-1).view("u1")
        total.update(data[:SAMPLE].tobytes() + data[-SAMPLE:].tobytes())
    return f"{len(file.tensors)} tensors, digest {total.hexdigest()[:16]}"


def _bytes_of(value: Value) -> bytes:
    if isinstance(value, StringArray):
        return b"\0".join(value.raw())
    return value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
