"""Attributes of ops: their types and choices, read from the annotations of the op's shape rule."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pyggml.dtypes import DType
from pyggml.errors import DTypeError, ShapeError
from pyggml.spec import integers

#: Types whose values need no conversion.
_PLAIN = frozenset({bool, int, float, str})


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute of an op.

    kinds     types it accepts; empty if the annotation allows anything hashable
    choices   values it accepts, if they are a fixed set
    optional  whether it accepts None
    default   inspect.Parameter.empty if the attribute is required
    """

    name: str
    kinds: frozenset[type]
    choices: tuple[Any, ...]
    optional: bool
    default: Any

    @classmethod
    def of(cls, parameter: inspect.Parameter) -> Attribute:
        """The attribute declared by a keyword-only parameter of a shape rule."""
        kinds, choices = _kinds(parameter.annotation)
        optional = NoneType in kinds or parameter.default is None
        kinds -= {NoneType}
        return cls(parameter.name, kinds, choices, optional, parameter.default)

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def takes(self) -> str:
        """Its type in words: `float`, `int | None`, `one of 'asc', 'desc'`."""
        if self.choices:
            words = f"one of {', '.join(map(repr, self.choices))}"
        else:
            words = " | ".join(sorted(kind.__name__ for kind in self.kinds)) or "a hashable value"
        return f"{words} | None" if self.optional else words

    def value(self, op_name: str, value: Any) -> Any:
        """`value` as a plain hashable Python value; DTypeError or ShapeError if it is not valid."""
        if type(value) in self.kinds and type(value) in _PLAIN and value == value:
            return value  # the usual case; NaN, not equal to itself, falls through to its error
        what = f"{op_name}: {self.name}="
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
            value = value.item()
        if isinstance(value, DType):
            value = value.name
        if value is None and self.optional:
            return None
        if self.choices:
            return self._chosen(what, value)
        if tuple in self.kinds:
            return integers(what, value)
        if self.kinds and not self._fits(value):
            raise DTypeError(f"{what} takes {self.takes}, not {value!r} ({type(value).__name__})")
        if float in self.kinds and isinstance(value, int):
            try:
                value = float(value)
            except OverflowError:
                raise ShapeError(f"{what} is too large for a float") from None
        if isinstance(value, float) and math.isnan(value):
            raise ShapeError(f"{what} is NaN")
        try:
            hash(value)
        except TypeError:
            raise DTypeError(
                f"{what} must be hashable, because equal nodes are one node: {value!r} "
                f"({type(value).__name__}) is not"
            ) from None
        return value

    def _fits(self, value: Any) -> bool:
        if isinstance(value, bool):
            return bool in self.kinds
        whole = isinstance(value, int) and float in self.kinds
        return whole or isinstance(value, tuple(self.kinds))

    def _chosen(self, what: str, value: Any) -> Any:
        for choice in self.choices:
            if type(value) is type(choice) and value == choice:
                return value
        if any(isinstance(value, type(choice)) for choice in self.choices):
            known = ", ".join(map(str, self.choices))
            raise ShapeError(f"{what}{value!r} must be one of {known}")
        raise DTypeError(f"{what} takes {self.takes}, not {value!r} ({type(value).__name__})")


def _kinds(annotation: Any) -> tuple[frozenset[type], tuple[Any, ...]]:
    """Types (NoneType for None) and choices that an annotation allows; both empty: anything."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin is Literal:
        values = get_args(annotation)
        none = frozenset({NoneType} if None in values else ())
        return none, tuple(value for value in values if value is not None)
    if origin in (Union, UnionType):
        kinds: frozenset[type] = frozenset()
        choices: tuple[Any, ...] = ()
        for member in get_args(annotation):
            member_kinds, member_choices = _kinds(member)
            if not member_kinds and not member_choices:
                return frozenset(), ()
            kinds, choices = kinds | member_kinds, choices + member_choices
        return kinds, choices if not kinds - {NoneType} else ()
    if annotation is None:
        return frozenset({NoneType}), ()
    if annotation is DType:
        return frozenset({str}), ()  # stored by name
    kind = origin or annotation
    if isinstance(kind, type) and kind not in (Any, object, inspect.Parameter.empty):
        return frozenset({kind}), ()
    return frozenset(), ()
