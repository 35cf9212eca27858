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

    types     types that it accepts; empty if the annotation allows anything hashable
    choices   values that it accepts, if they are a fixed set
    optional  whether it accepts None
    default   inspect.Parameter.empty if the attribute is required
    """

    name: str
    types: frozenset[type]
    choices: tuple[Any, ...]
    optional: bool
    default: Any

    @classmethod
    def of(cls, parameter: inspect.Parameter) -> Attribute:
        """The attribute declared by a keyword-only parameter of a shape rule."""
        types, choices = _types_and_choices(parameter.annotation)
        optional = NoneType in types or parameter.default is None
        types -= {NoneType}
        return cls(parameter.name, types, choices, optional, parameter.default)

    @property
    def required(self) -> bool:
        """Whether a call must give the attribute."""
        return self.default is inspect.Parameter.empty

    @property
    def type_text(self) -> str:
        """What it accepts, in words: `float`, `int | None`, `one of 'asc', 'desc'`."""
        if self.choices:
            text = f"one of {', '.join(map(repr, self.choices))}"
        else:
            text = " | ".join(sorted(type_.__name__ for type_ in self.types)) or "a hashable value"
        return f"{text} | None" if self.optional else text

    def value(self, op_name: str, value: Any) -> Any:
        """`value` as a plain hashable Python value; DTypeError or ShapeError if it is not valid."""
        if type(value) in self.types and type(value) in _PLAIN and value == value:
            return value  # the usual case; NaN, not equal to itself, gets its error below
        prefix = f"{op_name}: {self.name}="
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
            value = value.item()
        if isinstance(value, DType):
            value = value.name
        if value is None and self.optional:
            return None
        if self.choices:
            return self._choice(prefix, value)
        if tuple in self.types:
            return integers(prefix, value)
        if self.types and not self._has_type(value):
            raise self._type_error(prefix, value)
        if float in self.types and isinstance(value, int):
            try:
                value = float(value)
            except OverflowError:
                raise ShapeError(f"{prefix} is too large for a float") from None
        if isinstance(value, float) and math.isnan(value):
            raise ShapeError(f"{prefix} is NaN")
        try:
            hash(value)
        except TypeError:
            raise DTypeError(
                f"{prefix} must be hashable, because equal nodes are one node: {value!r} "
                f"({type(value).__name__}) is not"
            ) from None
        return value

    def _has_type(self, value: Any) -> bool:
        """Whether `value` has an accepted type. An int counts as a float, a bool not as an int."""
        if isinstance(value, bool):
            return bool in self.types
        is_float = isinstance(value, int) and float in self.types
        return is_float or isinstance(value, tuple(self.types))

    def _choice(self, prefix: str, value: Any) -> Any:
        for choice in self.choices:
            if type(value) is type(choice) and value == choice:
                return value
        if any(isinstance(value, type(choice)) for choice in self.choices):
            known = ", ".join(map(str, self.choices))
            raise ShapeError(f"{prefix}{value!r} must be one of {known}")
        raise self._type_error(prefix, value)

    def _type_error(self, prefix: str, value: Any) -> DTypeError:
        got = f"{value!r} ({type(value).__name__})"
        return DTypeError(f"{prefix} takes {self.type_text}, not {got}")


def _types_and_choices(annotation: Any) -> tuple[frozenset[type], tuple[Any, ...]]:
    """The types and choices that an annotation allows; both are empty if it allows anything.

    None is represented by NoneType in the types.
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        return _types_and_choices(get_args(annotation)[0])
    if origin is Literal:
        values = get_args(annotation)
        none = frozenset({NoneType} if None in values else ())
        return none, tuple(value for value in values if value is not None)
    if origin in (Union, UnionType):
        types: frozenset[type] = frozenset()
        choices: tuple[Any, ...] = ()
        for member in get_args(annotation):
            member_types, member_choices = _types_and_choices(member)
            if not member_types and not member_choices:
                return frozenset(), ()
            types, choices = types | member_types, choices + member_choices
        return types, choices if not types - {NoneType} else ()
    if annotation is None:
        return frozenset({NoneType}), ()
    if annotation is DType:
        return frozenset({str}), ()  # stored by name
    type_ = origin or annotation
    if isinstance(type_, type) and type_ not in (Any, object, inspect.Parameter.empty):
        return frozenset({type_}), ()
    return frozenset(), ()
