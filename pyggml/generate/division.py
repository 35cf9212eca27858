"""Dividing a model's layers among devices, by pins."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate

from pyggml.backends import HOSTS
from pyggml.models.model import Model
from pyggml.runtime.places import Place


def expert_pins(n_layer: int, host: str) -> dict[str, str]:
    """Pins that put the experts of the first `n_layer` layers on `host`, as --n-cpu-moe does."""
    if not n_layer:
        return {}
    return {rf"^blk\.({either(range(n_layer))})\.ffn_\w+_exps\.": host}


def layer_pins(
    model: Model,
    places: Sequence[Place],
    *,
    n_ctx: int,
    n_batch: int,
    host_experts: int = 0,
    host_layers: Collection[int] = (),
) -> dict[str, str]:
    """Pins that divide the layers among the devices of `places`, in order; none for one device.

    A layer's weights and cache are on one device. token_embd is on the first device, the output
    matrix on the last one. Each device gets a share of the bytes in proportion to its size, or
    equal shares if any has no size.

    host_experts  the experts of the first layers do not count: they are on the host
    host_layers   layers that are on the host as a whole
    """
    devices = [place for place in places if place.name not in HOSTS]
    if len(devices) < 2:
        return {}
    layers = [il for il in range(model.arch.n_layer) if il not in host_layers]
    sizes = layer_bytes(model, host_experts, n_ctx, n_batch)
    head = _bytes(model, "output"), _bytes(model, "token_embd.")
    items = [head[1], *(sizes[il] for il in layers), head[0]]
    of_item = _shares(items, [place.size for place in devices])
    pins: dict[str, str] = {}
    for number, place in enumerate(devices):
        own = [il for il, device in zip(layers, of_item[1:-1]) if device == number]
        if own:
            numbers = either(own)
            pins[rf"^(blk\.({numbers})\.|cache_\w+_l({numbers})$)"] = place.backend.place
    if not model.arch.tied:
        pins[r"^output"] = devices[-1].backend.place
    return pins


def expert_bytes(model: Model) -> list[int]:
    """The bytes of each layer's experts in the file."""
    tensors = model.file.tensors.items()
    return _by_layer(model, ((name, t.nbytes) for name, t in tensors if "_exps." in name))


def layer_bytes(model: Model, host_experts: int, n_ctx: int, n_batch: int) -> list[int]:
    """The bytes of each layer: its tensors in the file and its caches."""
    tensors = model.file.tensors.items()
    sizes = _by_layer(model, ((name, t.nbytes) for name, t in tensors))
    experts = expert_bytes(model)
    caches = model.caches(n_ctx, n_batch)
    for il, cache in enumerate(caches):
        sizes[il] += sum(state.spec.nbytes for state in cache.states)
        sizes[il] -= experts[il] if il < host_experts else 0
    return sizes


def _by_layer(model: Model, sizes: Iterable[tuple[str, int]]) -> list[int]:
    total = [0] * model.arch.n_layer
    for name, nbytes in sizes:
        word, _, number = name.partition(".")
        if word == "blk" and (il := int(number.partition(".")[0])) < len(total):
            total[il] += nbytes
    return total


def _bytes(model: Model, prefix: str) -> int:
    return sum(t.nbytes for name, t in model.file.tensors.items() if name.startswith(prefix))


def _shares(items: Sequence[int], sizes: Sequence[int | None]) -> list[int]:
    """The device of each item, in order: the one in whose share the item's middle falls."""
    known = [size for size in sizes if size is not None]
    weights = known if len(known) == len(sizes) else [1] * len(sizes)
    ends = [end / sum(weights) for end in accumulate(weights)]
    total, devices = max(sum(items), 1), []
    for item, end in zip(items, accumulate(items)):
        middle = (end - item / 2) / total
        devices.append(next(i for i, share in enumerate(ends) if middle <= share or share == 1))
    devices[-1] = len(sizes) - 1
    return devices


def either(numbers: Iterable[int]) -> str:
    """A regular expression of these numbers, such as [0-9]|[1-3][0-9]|4[0-2]."""
    digits_of: dict[int, list[int]] = {}
    for number in numbers:
        digits_of.setdefault(number // 10, []).append(number % 10)
    tens_of: dict[str, list[int]] = {}
    for n, digits in digits_of.items():
        tens_of.setdefault(_digits(digits), []).append(n)
    parts = []
    for last, tens in tens_of.items():
        single = [n for n in tens if 0 < n < 10]
        parts += [f"{n or ''}{last}" for n in tens if n not in single]
        parts += [_digits(single) + last] if single else []
    return "|".join(parts)


def _digits(digits: Sequence[int]) -> str:
    if len(digits) == 1:
        return str(digits[0])
    run = digits[-1] - digits[0] == len(digits) - 1
    return f"[{digits[0]}-{digits[-1]}]" if run else f"[{''.join(map(str, digits))}]"


def joined(*pins: Mapping[str, str]) -> dict[str, str]:
    """All pins in order; the first pattern that matches counts."""
    result: dict[str, str] = {}
    for each in pins:
        for pattern, place in each.items():
            result.setdefault(pattern, place)
    return result
