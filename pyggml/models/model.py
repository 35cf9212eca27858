"""A model file opened for use: its graphs, and the store of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from pyggml import gguf
from pyggml.backends import preferred
from pyggml.errors import GGUFError, UnknownNameError
from pyggml.gguf import GGUFFile
from pyggml.graph import Graph, precise
from pyggml.models.base import architecture
from pyggml.models.batch import Batch, Options
from pyggml.models.cache import Cache
from pyggml.models.known import all_sizes
from pyggml.models.layers import linear, norm, scaled
from pyggml.models.random_weights import RandomWeights
from pyggml.models.ranked import together
from pyggml.models.weights import Layer, Weights
from pyggml.node import Node
from pyggml.ops import get_rows
from pyggml.runtime.compile import compile
from pyggml.runtime.plan import Plan
from pyggml.runtime.ranks import Ranks
from pyggml.runtime.shards import Cuts
from pyggml.runtime.store import Store

if TYPE_CHECKING:
    from pyggml.generate.session import Session


class Model:
    """A model from an open file. Create it with `pyggml.load`, best in a `with`, which closes it.

    arch      its architecture: the hyperparameters
    weights   its tensors as constants
    layers    the layers of its graphs: all, unless memory and time are estimated from a few
    store     the memory of its weights, shared by all sessions
    backends, amb, pins, decode_weights, read_ahead, shard   as in `compile`
    ranks     the processes that run it together, in `store.ranks`
    """

    def __init__(
        self,
        file: GGUFFile,
        *,
        backends: Sequence[str] = ("numpy",),
        amb: float | None = None,
        pins: Mapping[str, str] | None = None,
        decode_weights: bool = False,
        read_ahead: bool | None = None,
        shard: Cuts | None = None,
        ranks: Ranks | None = None,
        options: Options | None = None,
    ) -> None:
        name = file.fields.get("general.architecture")
        try:
            if not isinstance(name, str):
                raise GGUFError("key 'general.architecture' is missing")
            self.arch = architecture(name).of(file)
        except GGUFError as error:
            raise GGUFError(f"{file.paths[0]}: {error}") from None
        self.file = file
        self.layers: Sequence[int] = range(self.arch.n_layer)
        self.options = options or Options()
        self.weights = Weights(file, all_sizes(self.arch))
        self.backends, self.amb, self.pins = tuple(backends), amb, pins
        self.decode_weights, self.read_ahead, self.shard = decode_weights, read_ahead, shard
        self.store = Store(ranks=ranks)
        if ranks is not None:
            self.backends, self.shard = together(ranks, self)

    def __repr__(self) -> str:
        arch = self.arch
        return (
            f"<model {arch.name}: {arch.n_layer} layers, n_embd {arch.n_embd}, "
            f"n_vocab {arch.n_vocab}, on {', '.join(self.backends)}>"
        )

    def close(self) -> None:
        """Close the file. Weights that no plan has uploaded yet can then no longer be read."""
        self.file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def session(self, n_ctx: int = 4096, n_batch: int = 512, **options: Any) -> Session:
        """A new, empty sequence of up to `n_ctx` tokens; prompts run in batches of `n_batch`.

        options  values that differ from the model's `Options`, such as cache_k=. The session's
                 `model` is then a copy of this one that has them and shares all else
        """
        from pyggml.generate.session import Session

        model = self
        if options:
            model = copy(self)
            model.options = replace(self.options, **options)
        return Session(model, n_ctx=n_ctx, n_batch=n_batch)

    def layer(self, il: int) -> Layer:
        """The tensors of layer `il`; UnknownNameError if there is none."""
        n = self.arch.n_layer
        if not 0 <= il < n:
            raise UnknownNameError(f"no layer {il}: the model has {n} layers, numbered from 0")
        return self.weights.layer(il)

    # -- graphs -------------------------------------------------------------------------------

    def caches(self, n_ctx: int, n_batch: int) -> tuple[Cache, ...]:
        """The caches of `layers`."""
        return tuple(self.arch.cache(il, n_ctx, n_batch, self.options) for il in self.layers)

    def graph(self, batch: Batch, caches: tuple[Cache, ...]) -> Graph:
        """Output `logits`, f32 [n_vocab, n_outputs]; without outputs, it only fills the caches."""
        w, arch = self.weights, self.arch
        x = w.label(scaled(w, "token_embd", get_rows(w["token_embd"], batch.tokens)), "inp_embd")
        x = arch.begin(x)
        for il, cache in zip(self.layers, caches):
            x = arch.layer(x, w.layer(il), cache, batch)
        if not batch.n_outputs:
            return Graph({}, batch.writes)
        return Graph({"logits": self.head(x)}, batch.writes)

    def head(self, x: Node) -> Node:
        """Logits of the last layer's output."""
        w = self.weights
        x = self.arch.end(x, w)
        x = w.label(norm(w, "output_norm", x, self.arch.rms_eps), "result_norm")
        y = linear(w, "token_embd" if self.arch.tied else "output", x)
        return w.label(y, "result_output")

    def plan(self, batch: Batch, caches: tuple[Cache, ...], store: Store) -> Plan:
        """The compiled graph of a batch."""
        return self.compile(self.graph(batch, caches), store)

    def compile(self, graph: Graph, store: Store) -> Plan:
        """A plan of a graph on the model's backends, with its precision, budget and pins."""
        if self.options.prec == "f32":
            graph = precise(graph)
        return compile(
            graph.outputs,
            updates=graph.updates,
            backends=self.backends,
            amb=self.amb,
            pins=self.pins,
            store=store,
            decode_weights=self.decode_weights,
            read_ahead=self.read_ahead,
            shard=self.shard,
        )


def load(
    path: str | PathLike[str],
    *,
    backends: Sequence[str] | None = None,
    amb: float | None = None,
    pins: Mapping[str, str] | None = None,
    decode_weights: bool = False,
    read_ahead: bool | None = None,
    shard: Cuts | None = None,
    ranks: Ranks | None = None,
    random_weights: bool = False,
    **options: Any,
) -> Model:
    """Open a GGUF file as a model. Weights are uploaded when the first session runs.

    with gg.load("model.gguf") as model:
        session = model.session(n_ctx=4096)
        logits = session.forward([1, 2, 3])      # [1, n_vocab]

    backends  places in order of preference; by default CUDA if there is a GPU, then the CPU
    amb, pins as in `compile`: the attention memory budget in MiB, and label pattern -> place
    decode_weights
              as in `compile`: True keeps weights on NumPy as f32
    read_ahead
              as in `compile`: whether a GPU reads weights of the host while it computes
    shard     as in `compile`: how the model is spread over the first of `backends`
    ranks     `pyggml.join()`: the processes that run the model together, each with a device of its
              own. Without shard= that is "auto", and one name in `backends` stands for a device of
              each: ["cuda"] for cuda:0, cuda:1, ...
    random_weights
              read no weights from the file, which may be only a header, but draw others
              (`RandomWeights`): enough to measure the speed and the memory of a model
    options   flash=, fused=, mla=, prec=, cache_k=, cache_v=, cache_i= (see `Options`)
    Errors: GGUFError for a file that is not complete and well-formed, or has an architecture, keys
    or tensors that pyggml does not know; PeerError if another rank has another file, version or
    options.
    """
    file = None
    try:
        file = gguf.open(path, allow_missing_data=random_weights)
        if random_weights:
            file.values = RandomWeights(file.tensors).array
        where = preferred() if backends is None else backends
        return Model(
            file,
            backends=where,
            amb=amb,
            pins=pins,
            decode_weights=decode_weights,
            read_ahead=read_ahead,
            shard=shard,
            ranks=ranks,
            options=Options(**options),
        )
    except BaseException as error:
        if file is not None:
            file.close()
        if ranks is not None:
            ranks.failed(error)
        raise
