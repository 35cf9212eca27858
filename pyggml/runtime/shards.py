"""The argument `shard=` of compile: which cuts, over which devices, in which proportion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TypeAlias

from pyggml.backends.base import Backend
from pyggml.errors import DeviceError, DTypeError, UnknownNameError
from pyggml.passes.shard import CUTS
from pyggml.passes.stages import Shard
from pyggml.runtime.places import Place

#: "auto", or cut -> the number of devices (of stages for "layers"), or their shares. As a name,
#: "auto" stands for the cuts of AUTO.
Cuts: TypeAlias = str | Mapping[str, int | Sequence[float]]

#: What "auto" cuts: all that can be cut without a copy of a cache on each device.
AUTO = ("heads", "experts", "rows")


def shard_of(cuts: Cuts | None, places: Sequence[Place]) -> Shard | None:
    """The shard that `cuts` describe over the first of `places`; None if nothing is divided.

    For a number of devices, the parts are in the proportion of the sizes of the places, if they
    have any; shares are used as they are.
    Errors: DTypeError, UnknownNameError, DeviceError if there are too few devices.
    """
    if cuts is None:
        return None
    alike = [place for place in places if place.name == places[0].name]
    strict = True
    if cuts == "auto":
        cuts = {"auto": len(alike)}
    if isinstance(cuts, Mapping) and list(cuts) == ["auto"]:
        cuts, strict = dict.fromkeys(AUTO, cuts["auto"]), False
    if not isinstance(cuts, Mapping):
        raise DTypeError(
            f"shard= must be 'auto' or a dict such as {{'heads': 2}}, not {cuts!r}; "
            f"the cuts are: {', '.join(CUTS)}"
        )
    numbers = {name: _shares(name, value) for name, value in cuts.items()}
    counts = {name: len(shares) for name, shares in numbers.items()}
    group = {name: n for name, n in counts.items() if name != "layers" and n > 1}
    if len(set(group.values())) > 1:
        raise DTypeError(
            f"shard={dict(cuts)!r}: all cuts but 'layers' are over the same devices, so their "
            "numbers must be equal"
        )
    n_group, n_stages = max(group.values(), default=1), counts.get("layers", 1)
    count = n_group * n_stages
    if count == 1:
        return None
    if len(alike) < count:
        names = ", ".join(str(place) for place in alike)
        raise DeviceError(
            f"shard={dict(cuts)!r} needs {count} devices of one kind, and backends= names "
            f"{len(alike)}: {names}"
        )
    used = alike[:count]
    given = [numbers[name] for name in group if not isinstance(cuts[name], int)]
    if any(shares != given[0] for shares in given[1:]):
        raise DTypeError(f"shard={dict(cuts)!r}: the shares of all cuts but 'layers' must be equal")
    sizes = [float(place.size or 0) for place in used]
    known = all(sizes)
    in_group = [sum(sizes[i::n_group]) for i in range(n_group)]
    in_stage = [sum(sizes[i * n_group : (i + 1) * n_group]) for i in range(n_stages)]
    shares = given[0] if given else tuple(in_group) if known else (1.0,) * n_group
    stages = numbers.get("layers", (1.0,))
    if known and isinstance(cuts.get("layers", 1), int):
        stages = tuple(in_stage)
    devices: tuple[Backend, ...] = tuple(place.backend for place in used)
    return Shard({n: k for n, k in counts.items() if k > 1}, shares, stages, devices, strict)


def with_shares(cuts: Cuts, places: Sequence[Place]) -> Cuts:
    """Cuts that mean the same for places without sizes, as a command that runs has them."""
    shard = shard_of(cuts, places)
    sizes = {place.size for place in places[: len(shard.devices)]} if shard is not None else ()
    if shard is None or len(sizes) == 1:
        return cuts
    if cuts == "auto" or list(cuts) == ["auto"]:
        return {"auto": _small(shard.shares)}
    shares = {name: shard.stages if name == "layers" else shard.shares for name in shard.cuts}
    return {name: _small(each) for name, each in shares.items()}


def _small(shares: Sequence[float]) -> int | tuple[float, ...]:
    """Equal shares as their number, others with the largest as 100."""
    if len(set(shares)) == 1:
        return len(shares)
    return tuple(round(100 * share / max(shares), 2) for share in shares)


def shard_text(cuts: Cuts) -> str:
    """The cuts as the value of --shard."""
    if isinstance(cuts, str):
        return cuts
    shares = {
        k: v if isinstance(v, int) else ":".join(f"{x:g}" for x in v) for k, v in cuts.items()
    }
    return ",".join(f"{name}={value}" for name, value in shares.items())


def _shares(name: str, value: object) -> tuple[float, ...]:
    """The shares of a cut, equal ones for a number of devices."""
    if name not in CUTS:
        raise UnknownNameError(f"shard=: there is no cut {name!r}; there are: {', '.join(CUTS)}")
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1:
        return (1.0,) * int(value)
    shares = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    numbers = [float(x) for x in shares if isinstance(x, Real) and not isinstance(x, bool)]
    if shares and len(numbers) == len(shares) and all(0 < x < float("inf") for x in numbers):
        return tuple(numbers)
    raise DTypeError(
        f"shard={{{name!r}: {value!r}}}: expected a number of devices such as 2, or their shares "
        "such as (3, 1)"
    )
