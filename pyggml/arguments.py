"""Arguments of calls to ops and builders: which ones they take, and errors for wrong ones."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec

from pyggml.attributes import Attribute
from pyggml.errors import DTypeError, PyggmlError
from pyggml.node import Node, Sources
from pyggml.renamed import KEYWORDS
from pyggml.where import at_line

P = ParamSpec("P")


class Parameters:
    """The tensors and attributes that an op takes.

    tensors     name -> default: None if the tensor is optional, else inspect.Parameter.empty
    more        the name of the tensors that may follow in any number (`*others`), or ""
    attributes  name -> Attribute
    """

    def __init__(self, op_name: str, signature: inspect.Signature) -> None:
        parameters = signature.parameters.values()
        self.op_name = op_name
        plain = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.tensors = {p.name: p.default for p in plain}
        self.more = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "")
        self.attributes = {p.name: Attribute.of(p) for p in parameters if p.kind is p.KEYWORD_ONLY}
        names = list(self.tensors)
        #: Number of positional arguments -> the keywords that may follow.
        self._keywords = [frozenset((*names[n:], *self.attributes)) for n in range(len(names) + 1)]

    def bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Sources, dict[str, Any]]:
        """The sources and attributes that a call gives; DTypeError or ShapeError for wrong ones."""
        many = len(args) >= len(self._keywords)
        known = self._keywords[-1 if many else len(args)]
        if (many and not self.more) or not kwargs.keys() <= known:
            self._refuse(args, kwargs)
        return self._sources(args, kwargs), self._attribute_values(kwargs)

    def check_meaning(self, meaning: Callable[..., Any]) -> None:
        """DTypeError if a function cannot be called with these tensors and attributes."""
        try:
            inspect.signature(meaning).bind(*self.tensors, **dict.fromkeys(self.attributes))
        except TypeError:
            star = ["*"] if self.attributes else []
            raise DTypeError(
                f"op {self.op_name}: its meaning must take the arguments of its rule, "
                f"({', '.join([*self.tensors, *star, *self.attributes])}), not {_form(meaning)}"
            ) from None

    def _refuse(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """DTypeError for arguments that the op does not have."""
        tensors = list(self.tensors)
        if len(args) > len(tensors) and not self.more:
            count = f"{len(tensors)} tensor{'s' * (len(tensors) != 1)}"
            raise DTypeError(
                f"{self.op_name} takes {count} ({', '.join(tensors)}), got {len(args)} positional "
                "arguments; pass attributes by keyword"
            )
        for old in KEYWORDS.keys() & kwargs.keys():
            if KEYWORDS[old] in self.attributes and old not in self.attributes:
                raise DTypeError(f"{self.op_name}: {old}= is now {KEYWORDS[old]}=")
        for key in kwargs:
            if key in tensors[: len(args)]:
                raise DTypeError(f"{self.op_name}: the tensor {key} is given twice")
            if key not in self.tensors and key not in self.attributes:
                known = [*tensors, *self.attributes]
                raise DTypeError(
                    f"{self.op_name} has no argument {key!r}{_suggestion(key, known)} "
                    f"(tensors: {', '.join(tensors)}; attributes: {', '.join(self.attributes)})"
                )

    def _sources(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sources:
        src: list[Node | None] = []
        for index, (key, default) in enumerate(self.tensors.items()):
            value = args[index] if index < len(args) else kwargs.get(key, default)
            if value is inspect.Parameter.empty:
                raise DTypeError(f"{self.op_name}: the tensor {key} is missing")
            if value is not None or default is not None:
                self._want_node(key, value)
            src.append(value)
        for index, value in enumerate(args[len(self.tensors) :]):
            self._want_node(f"{self.more}[{index}]", value)
            src.append(value)
        return tuple(src)

    def _want_node(self, key: str, value: object) -> None:
        if not isinstance(value, Node):
            raise DTypeError(
                f"{self.op_name}: {key} must be a node, not {type(value).__name__}; "
                "wrap arrays with constant(...), or feed them through input(...)"
            )

    def _attribute_values(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, attribute in self.attributes.items():
            if key not in kwargs and attribute.required:
                raise DTypeError(f"{self.op_name}: the attribute {key}= is required")
            values[key] = attribute.value(self.op_name, kwargs.get(key, attribute.default))
        return values


def signature_of(rule: Callable[..., Any]) -> inspect.Signature:
    """The signature of a shape rule, with its annotations evaluated.

    DTypeError if they cannot be evaluated, or if a parameter is neither a tensor (positional, with
    no default but None, or `*others`) nor an attribute (keyword-only).
    """
    name = rule.__name__
    try:
        signature = inspect.signature(rule, eval_str=True)
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        raise DTypeError(
            f"op {name}: cannot evaluate the annotations of its rule ({error}); they define its "
            "attributes, so import their types at run time, not only under `if TYPE_CHECKING:`"
        ) from None
    for i, p in enumerate(signature.parameters.values()):
        if p.kind is p.KEYWORD_ONLY or (i and p.kind is p.VAR_POSITIONAL):
            continue
        if p.kind is not p.POSITIONAL_OR_KEYWORD:
            raise DTypeError(f"op {name}: {p} is not allowed; name every tensor and attribute")
        if p.default not in (p.empty, None):
            raise DTypeError(
                f"op {name}: {p.name} has a default, so it is an attribute; put a * before it: "
                f"{name}(a, *, {p.name}={p.default!r})"
            )
    return signature


def located(build: Callable[P, Node]) -> Callable[P, Node]:
    """Decorator for builders that are not ops: adds the user's line to their errors.

    A call that does not match the signature raises a DTypeError that shows how to call it.
    """
    signature = inspect.signature(build)
    form = f"{build.__name__}{_form(build)}"

    @functools.wraps(build)
    def call(*args: P.args, **kwargs: P.kwargs) -> Node:
        try:
            for old in KEYWORDS.keys() & kwargs.keys():
                raise DTypeError(f"{build.__name__}: {old}= is now {KEYWORDS[old]}=")
            return build(*args, **kwargs)
        except PyggmlError as error:
            raise at_line(error, str(error)) from None
        except TypeError:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                unknown = next((key for key in kwargs if key not in signature.parameters), "")
                hint = _suggestion(unknown, signature.parameters)
                text = f"{build.__name__}: {error}{hint}; call it as {form}"
                raise at_line(DTypeError(text), text) from None
            raise  # the call is fine: an error inside the builder

    return call


def _form(function: Callable[..., Any]) -> str:
    """The parameters of a function without their types, in parentheses."""
    parameters = inspect.signature(function).parameters.values()
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))


def _suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the most similar known name, or an empty string."""
    matches = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {matches[0]}?" if matches else ""
