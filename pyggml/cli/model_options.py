"""The options of the commands that run a model, and what they mean."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from pyggml import backends
from pyggml.cli import options
from pyggml.cli.progress import progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from pyggml.generate.session import Session
    from pyggml.generate.text import Conversation
    from pyggml.generate.tokenizer import Tokenizer
    from pyggml.models.model import Model

N_CTX, N_BATCH = 4096, 512


def add_model_options(
    parser: argparse.ArgumentParser,
    n_ctx: int = N_CTX,
    *,
    fit: bool = False,
    lists: bool = False,
) -> None:
    """The options of `open_model` and `new_session`. Their long names are those of llama-bench and,
    for -mla, -amb and -fmoe, of ik_llama.cpp; -c has that of llama.cpp's other programs.

    fit    -c and -ub are None by default
    lists  without -c; the values of all others but --decode-weights, --read-ahead and
           --shard are lists: see
           `combinations`
    """

    def sized(meaning: str, default: int, kind: Callable[[str], int]) -> dict[str, Any]:
        note = "; with --fit the most that fits" if fit else ""
        return {
            "type": kind, "metavar": "N", "default": None if fit else default,
            "help": f"{meaning} (default: {default}{note})",
        }  # fmt: skip

    group = parser.add_argument_group("the model")
    named = options.by_first_name(group.add_argument)
    add = _lists_of(named) if lists else named
    add("-m", "--model", metavar="FILE", required=True,
        help="a GGUF file, or the first of its parts")  # fmt: skip
    if not lists:
        add("-c", "--ctx-size", **sized("tokens of context", n_ctx, options.rows))
    add("-b", "--batch-size", type=options.count, metavar="N", default=2048,
        help="accepted as in llama.cpp; limits -ub (default: %(default)s)")  # fmt: skip
    add("-ub", "--ubatch-size",
        **sized("tokens of a prompt that run at once", N_BATCH, options.count))  # fmt: skip
    add("-ctk", "--cache-type-k", type=options.dtype, metavar="TYPE", default="f16",
        help="type of the K cache (default: f16)")  # fmt: skip
    add("-ctv", "--cache-type-v", type=options.dtype, metavar="TYPE", default="f16",
        help="type of the V cache (default: f16)")  # fmt: skip
    add("-cti", "--cache-type-i", type=options.dtype, metavar="TYPE", default="f16",
        help="type of the index keys of DeepSeek V3.2 and GLM-5 (default: f16)")  # fmt: skip
    add("-fa", "--flash-attn", **on_off("flash attention"))
    add("-mla", "--mla-attn", type=int, choices=range(4), default=3,
        help="attention of DeepSeek models: 0 standard (not V3.2 and GLM-5), 1 latent, 2 or 3 "
        "latent but expanded for prompts (default: 3)")  # fmt: skip
    add("-fmoe", "--fused-moe", **on_off("run experts' up, gate and activation as one op"))
    add("-amb", "--attn-max-batch", metavar="MIB", type=options.positive,
        help="attention memory budget in MiB (default: none)")  # fmt: skip
    add("--backend", metavar="PLACES", type=_places, default="auto",
        help="places in order of preference, separated by commas (default: auto, which is cuda if "
        "there is a GPU, then cpu if numba is installed, else numpy)")  # fmt: skip
    add("--decode-weights", action="store_true",
        help="keep weights on numpy as f32: faster, but 4 bytes a weight")  # fmt: skip
    named("--read-ahead", type=options.read_ahead, metavar="{auto,on,off}",
        help="whether a GPU reads the weights that it borrows from the host while it computes, "
        "which takes more of its memory (default: auto, which is on unless a place with a size "
        "has no room)")  # fmt: skip
    add("-ngl", "--n-gpu-layers", type=options.natural, metavar="N",
        help="put only the last N layers on the first place, and the others on the host; the head "
        "counts as the last layer (default: all)")  # fmt: skip
    add("-ot", "--override-tensor", metavar="REGEX=PLACE", type=options.pins, action="extend",
        default=[],
        help="put tensors with a matching label on PLACE; separate pairs by commas")  # fmt: skip
    named("--shard", metavar="CUTS", type=options.shard,
        help="spread the model over the first places: auto, or heads, rows, experts, layers or "
        "sequence with a number of devices or their shares, such as heads=2,experts=2 or "
        "layers=3:1 (default: layers are divided, if at all, by -ot; with several processes "
        "auto)")  # fmt: skip


#: The type of an option -> that of the same option as a list.
_AS_LIST: dict[Any, Callable[[str], list[Any]]] = {
    None: lambda text: [text],  # a file; it may have commas in its name
    options.count: options.numbers(1),
    options.natural: options.numbers(0),
    options.dtype: options.listed(options.dtype),
    options.positive: options.listed(options.budget),
    int: options.listed(options.whole(0, 3)),
    options.pins: lambda text: [options.pin_set(text)],
}
#: The options that are lists, from those that need the most work to change.
_LISTED = ("m", "backend", "ngl", "ot", "b", "ub", "ctk", "ctv", "cti", "fa", "mla", "fmoe",
           "amb")  # fmt: skip


def _lists_of(add: Callable[..., Any]) -> Callable[..., Any]:
    """A function that adds an option as a list of values."""

    def add_list(*names: str, **settings: Any) -> None:
        if settings.get("action") == "store_true":
            add(*names, **settings)
            return
        default, kind = settings.get("default"), settings.get("type")
        settings["help"] %= {"default": default}
        if settings.pop("choices", None) == ("on", "off"):
            settings["type"], settings["metavar"] = options.listed(options.switch), "on,off"
        elif kind is _places:
            settings["type"] = lambda text: [_places(text)]
            default = _places(default)
        else:
            settings["type"] = _AS_LIST[kind]
            settings.setdefault("metavar", "N")
            if kind in (options.count, options.natural, options.dtype, options.positive, int):
                settings["metavar"] += ",.."
        add(*names, **settings | {"action": options.Values, "default": [default]})

    return add_list


def combinations(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """Each combination of the options' values, as if it had been given alone; -m varies slowest."""
    for values in product(*(getattr(args, name) for name in _LISTED)):
        yield argparse.Namespace(**vars(args) | dict(zip(_LISTED, values)))


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """The options of `open_text`, but not -n and --system: each command describes its own."""
    add = parser.add_argument_group("sampling").add_argument
    add("--temp", type=float, metavar="T", default=0.8,
        help="temperature; 0 takes the most probable token (default: %(default)s)")  # fmt: skip
    add("--top-k", type=options.natural, metavar="K", default=40,
        help="draw from the K most probable tokens; 0 is all (default: %(default)s)")  # fmt: skip
    add("--top-p", type=float, metavar="P", default=0.95,
        help="then from the fewest that have probability P (default: %(default)s)")  # fmt: skip
    add("--seed", type=options.natural, metavar="N",
        help="seed of the random numbers (default: another one each time)")  # fmt: skip
    add_model_options(parser)


def _places(text: str) -> list[str]:
    """Places, separated by commas, or auto."""
    return list(backends.preferred()) if text == "auto" else options.places(text)


def on_off(meaning: str) -> dict[str, Any]:
    """An option with the values on and off, or 1 and 0; on its own it is on."""
    return {
        "type": options.switch, "choices": ("on", "off"), "nargs": "?", "const": "on",
        "default": "on", "help": f"{meaning} (default: on)",
    }  # fmt: skip


# -- what they mean ---------------------------------------------------------------------------


@contextmanager
def open_model(args: argparse.Namespace) -> Iterator[Model]:
    """The model of -m. Its file is open inside the block."""
    from pyggml.models.model import load

    model = load(
        args.m,
        backends=args.backend,
        amb=args.amb,
        decode_weights=args.decode_weights,
        read_ahead=args.read_ahead,
        shard=getattr(args, "shard", None),
        ranks=getattr(args, "ranks", None),
        random_weights=getattr(args, "random_weights", False),
        **graph_options(args),
    )
    try:
        tied = "output" not in model.weights
        pins = layer_pins(args.ngl, model.arch.n_layer, args.backend, tied=tied)
        model.pins = pins_of(args.ot) | pins
        yield model
    finally:
        model.file.close()


def same_model(args: argparse.Namespace) -> tuple[Any, ...]:
    """What `open_model` reads of the options that `variant` cannot change."""
    return args.m, args.backend, args.ngl, args.ot, args.decode_weights, args.read_ahead


def variant(model: Model, args: argparse.Namespace) -> Model:
    """The model with other options of its graphs and another budget; it shares the weights."""
    from pyggml.models.batch import Options

    other = copy(model)
    other.options, other.amb = Options(**graph_options(args)), args.amb
    return other


@dataclass(frozen=True, slots=True)
class Text:
    """A session that writes text.

    conversation  one with the model's chat template; None without
    settings      the arguments n=, sampler= and progress= of `continuation` and `answer`
    """

    session: Session
    tokenizer: Tokenizer
    conversation: Conversation | None
    settings: dict[str, Any]


@contextmanager
def open_text(args: argparse.Namespace, *, chat: bool) -> Iterator[Text]:
    """A session of the model of -m with its tokenizer, and for `chat` its chat template."""
    from pyggml.generate.chat import ChatTemplate
    from pyggml.generate.text import Conversation
    from pyggml.generate.tokenizer import Tokenizer

    with options.wrong_usage():
        sampler = sampler_of(args)
    with open_model(args) as model:
        fields = model.file.fields
        tokenizer = Tokenizer(fields)
        template = ChatTemplate(fields, tokenizer) if chat else None
        session = new_session(args, model)
        talk = None if template is None else Conversation(session, tokenizer, template, args.system)
        settings = {"n": args.n, "sampler": sampler, "progress": progress("prompt", "tokens")}
        yield Text(session, tokenizer, talk, settings)


def graph_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the model's `Options`."""
    return {
        "flash": args.fa == "on", "fused": args.fmoe == "on",
        "mla": 3 if args.mla == 2 else args.mla, "cache_k": args.ctk, "cache_v": args.ctv,
        "cache_i": args.cti,
    }  # fmt: skip


def new_session(args: argparse.Namespace, model: Model) -> Session:
    """A session with -c tokens of context, whose weights are loaded."""
    session = model.session(n_ctx=args.c, n_batch=min(args.b, args.ub))
    load_weights(session)
    return session


def load_weights(session: Session) -> None:
    """On a terminal, load the weights of a session now, with a progress bar."""
    from pyggml.generate.plans import padded_rows

    show = progress("loading", "bytes")
    if show is not None:
        session.plan(1, padded_rows(1, session.n_ctx), 1).bind({}, show)


def sampler_of(args: argparse.Namespace) -> Callable[[NDArray[np.float32]], int]:
    from pyggml.generate.sample import Sampler, greedy

    if args.temp == 0:
        return greedy
    seed = int.from_bytes(os.urandom(4)) if args.seed is None else args.seed
    return Sampler(temperature=args.temp, top_k=args.top_k, top_p=args.top_p, seed=seed)


def pins_of(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Pattern -> place. Of two equal patterns, the first counts."""
    pins: dict[str, str] = {}
    for pattern, place in pairs:
        pins.setdefault(pattern, place)
    return pins


def layer_pins(n: int | None, n_layer: int, names: Sequence[str], *, tied: bool) -> dict[str, str]:
    """Pins that leave only the last `n` layers on the first place, with their caches.

    As in llama.cpp, the head is the last of n_layer + 1 layers. `tied`: it uses token_embd.
    """
    if n is None or n > n_layer or names[0].partition(":")[0] in backends.HOSTS:
        return {}
    layers = "|".join(map(str, range(n_layer + 1 - n if n else n_layer)))
    parts = [rf"blk\.({layers})\.", rf"cache_\w+_l({layers})$"] if layers else []
    if not n:
        parts.append(r"(token_embd|output)\." if tied else r"output\.")
    host = next((name for name in names if name in backends.HOSTS), None) or backends.on_host()
    return {f"^({'|'.join(parts)})": host} if parts else {}
