"""Sessions in files: a GGUF file with the tokens and the rows of the caches."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from pyggml import gguf
from pyggml.errors import GGUFError
from pyggml.gguf.format import TensorInfo
from pyggml.gguf.writer import Tensor, write

if TYPE_CHECKING:
    from pyggml.generate.session import Session

_TYPE = "pyggml session"


def save(session: Session, path: str | PathLike[str]) -> int:
    """Write the session to a file, which appears when it is complete; return its bytes."""
    n = len(session.tokens)
    tensors = []
    for cache in session.caches:
        for state, rows in zip(cache.states, cache.used(n)):
            name, ne = state.attrs["name"], state.ne
            chunks = partial(_rows, session, name, rows)
            tensors.append(Tensor(name, state.dtype, (ne[0], rows, ne[2]), chunks))
    fields: dict[str, Any] = {
        "general.type": _TYPE,
        "session.model": _fingerprint(session),
        "session.tokens": np.array(session.tokens, np.int32),
        "session.most": session.most,
    }
    ranks = session.store.ranks
    tensors = tensors if n else []
    if ranks is None:
        return write(path, fields, tensors)
    # All ranks read all rows, so that rank 0 can fail to write without leaving the others behind.
    read = {tensor.name: list(tensor.chunks()) for tensor in tensors}
    whole = [replace(tensor, chunks=partial(read.__getitem__, tensor.name)) for tensor in tensors]
    written = ranks.together(lambda: 0 if ranks.rank else write(path, fields, whole))
    return int(ranks.gather(str(written))[0])


def _rows(session: Session, name: str, rows: int) -> Iterable[np.ndarray[Any, Any]]:
    yield np.ascontiguousarray(session.store.read(name, raw=True)[..., :rows, :])


def restore(session: Session, path: str | PathLike[str]) -> None:
    """Replace the session's tokens and caches by those of a file.

    GGUFError if the file is no saved session, or one of another model, of other cache types, or
    with more tokens than fit; then the session is as before.
    """
    with gguf.open(path) as file:
        if file.fields.get("general.type") != _TYPE:
            raise GGUFError(f"{path}: not a saved session")
        if file.fields.get("session.model") != _fingerprint(session):
            raise GGUFError(f"{path}: saved by a session of another model")
        tokens = _whole_numbers(file, "session.tokens", session.model.arch.n_vocab).tolist()
        most = int(_whole_numbers(file, "session.most", 2**31).item())
        if len(tokens) > session.n_ctx:
            raise GGUFError(
                f"{path}: {len(tokens)} tokens do not fit in a session with n_ctx={session.n_ctx}"
            )
        arrays = {}
        for cache in session.caches if tokens else ():
            for state, rows in zip(cache.states, cache.used(len(tokens))):
                name, ne = state.attrs["name"], (state.ne[0], rows, state.ne[2])
                info = file.tensors.get(name)
                if info is None or (info.dtype, info.ne) != (state.dtype, ne[: len(info.ne)]):
                    raise GGUFError(
                        f"{path}: the cache {name!r} is {_described(info)}, but this session has "
                        f"{state.dtype.name} {list(ne)}; use the same options"
                    )
                arrays[name] = file.array(name)
            arrays |= cache.contents(len(tokens))
        session.truncate(0)
        for name, array in arrays.items():
            whole = session.store.read(name, raw=True)
            whole[..., : array.shape[-2], :] = array.reshape(*whole.shape[:-2], *array.shape[-2:])
            session.store.write(name, whole)
        session.tokens += tokens
        session.most = most


def _whole_numbers(file: gguf.GGUFFile, key: str, end: int) -> np.ndarray[Any, Any]:
    """A field with numbers from 0 to before `end`; GGUFError if it is anything else."""
    value = file.fields.get(key)
    numbers = np.asarray(value if isinstance(value, (int, np.ndarray)) else "")
    if numbers.dtype.kind not in "iu" or ((numbers < 0) | (numbers >= end)).any():
        raise GGUFError(f"{file.paths[0]}: {key!r} must be numbers from 0 to {end - 1}")
    return numbers


def _described(info: TensorInfo | None) -> str:
    return "missing" if info is None else f"{info.dtype.name} {list(info.ne)}"


def _fingerprint(session: Session) -> str:
    """Text that is equal for models with the same hyperparameters and the same tensors."""
    model = session.model
    tensors = [(t.name, t.dtype.name, t.ne) for t in model.file.tensors.values()]
    return json.dumps([model.arch.fields(), tensors], sort_keys=True, default=np.ndarray.tolist)
