"""What an architecture is: hyperparameters from a file's keys, tensors, and layers as graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Self, TypeVar

from pyggml.errors import GGUFError
from pyggml.gguf import GGUFFile
from pyggml.models.batch import Batch, Options
from pyggml.models.cache import Cache
from pyggml.models.keys import Keys, key, read, written
from pyggml.models.known import check_file
from pyggml.models.layers import norm
from pyggml.models.weights import Layer, Weights
from pyggml.node import Node
from pyggml.ops import add, get_rows
from pyggml.where import warn

MAX_LAYERS = 10_000
Sizes = dict[str, tuple[int, ...]]
A = TypeVar("A", bound="type[Architecture]")

#: general.architecture -> the module of this package, or the class itself.
_REGISTRY: dict[str, str | type[Architecture]] = {
    "deepseek2": "deepseek2",
    "deepseek32": "deepseek32",
    "deepseek4": "deepseek4",
    "glm-dsa": "glm_dsa",
    "glm4moe": "glm4moe",
    "gpt-oss": "gpt_oss",
    "llama": "llama",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3",
}


def register(cls: A) -> A:
    """A class decorator: files whose general.architecture is `cls.name` use this class."""
    _REGISTRY[cls.name] = cls
    return cls


def architectures() -> tuple[str, ...]:
    """The names of all architectures."""
    return tuple(_REGISTRY)


def architecture(name: str) -> type[Architecture]:
    """The class of an architecture; GGUFError for an unknown name."""
    if name not in _REGISTRY:
        raise GGUFError(
            f"architecture {name!r} is unknown; pyggml has {', '.join(_REGISTRY)}. "
            "docs/adding-a-model.md shows how to add one"
        )
    entry = _REGISTRY[name]
    if isinstance(entry, str):
        import_module(f"pyggml.models.{entry}")
        entry = _REGISTRY[name]
        assert not isinstance(entry, str)
    return entry


def _n_tokens(keys: Keys) -> int:
    tokens = keys.fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, Sized):
        keys.fail("vocab_size", "is missing, and the file has no tokenizer.ggml.tokens")
    return len(tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """An architecture's hyperparameters, and its layers as graphs.

    A subclass declares `name`, its keys as fields, and the methods that raise NotImplementedError.
    A layer is   h = x + attention(norm(x)),   y = h + feed_forward(norm(h)).

    name     general.architecture
    n_nextn  of n_block, the last blocks that predict further tokens (MTP); the graph has none
    tied     whether token_embd is the output matrix, too
    neutral  keys of features that the graphs do not compute -> the values that switch them off,
             in addition to those of `known`
    """

    name: ClassVar[str]
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    #: The values of Options.mla that the graphs support; (): they ignore it.
    mla_forms: ClassVar[tuple[int, ...]] = ()
    #: Names of the two norms of a layer.
    norms: ClassVar[tuple[str, str]] = ("attn_norm", "ffn_norm")

    n_block: int = key("block_count", most=MAX_LAYERS)
    n_nextn: int = key("nextn_predict_layers", 0, least=0, rare=True)
    n_ctx_train: int = key("context_length")
    n_embd: int = key("embedding_length")
    rms_eps: float = key("attention.layer_norm_rms_epsilon")
    n_vocab: int = key("vocab_size", _n_tokens)
    tied: bool = False

    @classmethod
    def of(cls, file: GGUFFile) -> Self:
        """The hyperparameters of a file, checked against each other and against its tensors.

        GGUFError names a key that is missing, has the wrong type or contradicts another one, a
        tensor that is missing or has the wrong size, and any key or tensor of the architecture that
        pyggml does not know.
        """
        keys = Keys(cls.name, file.fields)
        values = read(cls, keys)
        values["tied"] = "output.weight" not in file.tensors
        config = cls(**values | cls.derived(keys, file, values))
        config._check_vocabulary(keys)
        config._check_nextn(keys)
        config.check(keys)
        check_file(config, keys, file.tensors, cls.neutral)
        return config

    @classmethod
    def derived(cls, keys: Keys, file: GGUFFile, values: dict[str, Any]) -> dict[str, Any]:
        """Field name -> value of the fields that do not come from one key.

        values  those that do
        """
        return {}

    def check(self, keys: Keys) -> None:
        """Raise a GGUFError for values that contradict each other."""

    def _check_vocabulary(self, keys: Keys) -> None:
        tokens = keys.fields.get("tokenizer.ggml.tokens")
        if isinstance(tokens, Sized) and len(tokens) != self.n_vocab:
            problem = f"{self.n_vocab}, but tokenizer.ggml.tokens has {len(tokens)} tokens"
            keys.fail("vocab_size", problem)

    def _check_nextn(self, keys: Keys) -> None:
        if self.n_nextn >= self.n_block:
            keys.fail("nextn_predict_layers", f"{self.n_nextn}, must be below {self.n_block}")
        if self.n_nextn:
            warn(
                f"key '{keys.architecture}.nextn_predict_layers': the last {self.n_nextn} of "
                f"{self.n_block} blocks predict further tokens (MTP) and are left out"
            )

    def fields(self) -> dict[str, Any]:
        """The keys of a file of this model; `of` reads them back."""
        own = {f"{self.name}.{name}": value for name, value in written(self)}
        return {"general.architecture": self.name} | own

    @property
    def n_layer(self) -> int:
        """The layers of the graph."""
        return self.n_block - self.n_nextn

    # -- tensors ------------------------------------------------------------------------------

    # Name, without `blk.N.` and `.weight`, -> ne. Every matrix may also have a factor, NAME.scale.

    def layer_tensors(self, il: int) -> Sizes:
        """The tensors that layer `il` must have."""
        raise NotImplementedError

    def optional_tensors(self, il: int) -> Sizes:
        """Tensors that layer `il` may have besides."""
        return {}

    def model_tensors(self) -> Sizes:
        """The tensors outside the layers that a file must have."""
        matrix = self.n_embd, self.n_vocab
        sizes: Sizes = {"token_embd": matrix, "output_norm": (self.n_embd,)}
        return sizes if self.tied else sizes | {"output": matrix}

    def stored_sizes(self, name: str, ne: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Other sizes that files of some programs have for a tensor; `weight` reshapes them."""
        return ()

    # -- graphs -------------------------------------------------------------------------------

    def dense_rows(self) -> int:
        """Graphs that read more rows of full caches attend to some of them only; 0: no such limit.

        So the largest of the graphs with fewer rows may need the most memory.
        """
        return 0

    def cache(self, il: int, n_ctx: int, n_batch: int, options: Options) -> Cache:
        """The cache of layer `il` for `n_ctx` tokens that come in batches of up to `n_batch`."""
        raise NotImplementedError

    def attention(self, x: Node, layer: Layer, cache: Cache, batch: Batch) -> Node:
        """f32 [n_embd, T]. Writes the tokens to the cache and attends to it; x is normalized."""
        raise NotImplementedError

    def feed_forward(self, x: Node, layer: Layer, batch: Batch) -> Node:
        """f32 [n_embd, T]; x is normalized."""
        raise NotImplementedError

    def begin(self, x: Node) -> Node:
        """What the first layer gets, from the tokens' embeddings, f32 [n_embd, T]."""
        return x

    def end(self, x: Node, w: Weights) -> Node:
        """What `output_norm` gets, f32 [n_embd, n_outputs], from the last layer's output."""
        return x

    def layer(self, x: Node, layer: Layer, cache: Cache, batch: Batch) -> Node:
        """One layer. The last one computes its feed-forward only for the batch's outputs."""
        normed = layer.label(norm(layer, self.norms[0], x, self.rms_eps), "attn_norm")
        y = self.attention(normed, layer, cache, batch)
        if batch.outputs is not None and layer.il == self.n_layer - 1:
            x, y = get_rows(x, batch.outputs), get_rows(y, batch.outputs)
        h = layer.label(add(x, y), "ffn_inp")
        normed = layer.label(norm(layer, self.norms[1], h, self.rms_eps), "ffn_norm")
        y = self.feed_forward(normed, layer, batch)
        return layer.label(add(h, y), "l_out")
