"""Chat templates: a conversation as the text that the model was trained on.

A template comes from the model's file, so it is not trusted. It runs in jinja2's immutable sandbox,
which refuses access to Python's internals and changes to the variables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from pyggml.errors import GGUFError, MissingPackageError, TemplateError
from pyggml.extras import package
from pyggml.generate.tokenizer import Tokenizer

KEY = "tokenizer.chat_template"
SAFE = (3, 1, 6)  # earlier versions of jinja2 have sandboxes with holes


class ChatTemplate:
    """The chat template of an open GGUF file. It needs the extra `text`.

    template = ChatTemplate(file.fields, tokenizer)
    template.render([{"role": "user", "content": "Hello"}])

    Filters and functions are those of transformers' apply_chat_template. GGUFError for a file
    without a template or with a syntax error in it.
    """

    def __init__(self, fields: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        text = fields.get(KEY)
        if not isinstance(text, str):
            raise GGUFError(
                f"key '{KEY}' is missing: the file does not say how a conversation is written; "
                "continue plain text instead"
            )
        texts = tokenizer.vocabulary.texts
        tokens = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
        self._tokens = {name: "" if id_ is None else texts[id_] for name, id_ in tokens.items()}
        self._jinja = _jinja()
        try:
            self._template = _environment().from_string(text)
        except self._jinja.TemplateSyntaxError as error:
            raise GGUFError(f"key '{KEY}': line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation. Encode it with `add_special=False, parse_special=True`.

        messages   such as {"role": "user", "content": "Hello"}
        add_generation_prompt   end with the beginning of an answer
        variables  others that the template reads, such as tools= or enable_thinking=
        TemplateError if the template refuses the messages, or if the sandbox stops it.
        """
        try:
            text: str = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **(self._tokens | variables),
            )
        except self._jinja.exceptions.SecurityError as error:
            raise TemplateError(f"key '{KEY}': the template is not safe to run: {error}") from error
        except Exception as error:  # a template can raise anything
            message = str(error) or type(error).__name__
            raise TemplateError(f"key '{KEY}': the template stopped: {message}") from error
        return text


def _jinja() -> Any:
    """jinja2, in a version whose sandbox has no known hole."""
    jinja = package("jinja2", "a chat template")
    version = tuple(int(part) for part in jinja.__version__.split(".")[:3])
    if version < SAFE:
        raise MissingPackageError(
            f"jinja2 {jinja.__version__} lets templates out of its sandbox; a chat template needs "
            f"{'.'.join(map(str, SAFE))} or newer: pip install -U jinja2"
        )
    return jinja


def _environment() -> Any:
    """jinja2's immutable sandbox, with what templates for transformers expect."""
    sandbox = package("jinja2.sandbox", "a chat template")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation()]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["dict"] = lambda *pairs, **items: dict(*pairs, **items)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _generation() -> type:
    """An extension for {% generation %}, which marks an answer and does not change the text."""
    nodes = package("jinja2.nodes", "a chat template")

    class Generation(package("jinja2.ext", "a chat template").Extension):  # type: ignore[misc]
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            lineno = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=lineno)

    return Generation


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that jinja2's own filter has."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise ValueError(message)
