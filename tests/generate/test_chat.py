"""Chat templates: what they render, and what the sandbox refuses."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pyggml.errors import GGUFError, MissingPackageError, TemplateError
from pyggml.generate.chat import ChatTemplate
from tests.generate.vocabularies import bpe, tokenizer

jinja2 = pytest.importorskip("jinja2", reason="needs the extra 'text'")
pytest.importorskip("tokenizers", reason="needs the extra 'text'")

HELLO = [{"role": "user", "content": "hello <é>"}]


@pytest.fixture
def render(tmp_path: Path) -> Any:
    """render(template, messages=HELLO, **variables)."""
    tok = tokenizer(tmp_path, bpe())

    def of(text: str, messages: Any = HELLO, **variables: Any) -> str:
        fields = {"tokenizer.chat_template": text}
        return ChatTemplate(fields, tok).render(messages, **variables)

    return of


def test_a_conversation(render: Any) -> None:
    template = (
        "{{ bos_token }}{% for message in messages %}\n"
        "    {% if loop.index > 9 %}{% break %}{% endif %}\n"
        "<{{ message.role }}>{{ message['content'] }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}<answer>{% endif %}"
    )
    assert render(template) == "<s><user>hello <é>\n<answer>"
    assert render(template, add_generation_prompt=False) == "<s><user>hello <é>\n"


def test_functions_of_transformers(render: Any) -> None:
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "hello <é>"}]'
    assert render("{{ tools | tojson(indent=1) }}", tools=[1]) == "[\n 1\n]"
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert render("{% generation %}a{{ dict(b=1).b }}{% endgeneration %}c") == "a1c"
    with pytest.raises(TemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages|attr('__class__')|attr('__base__') }}",
        "{{ messages[0]['__class__'].__name__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ dict.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ ('{0.__class__}'|attr('format'))(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__ }}",
        "{% set x = namespace %}{{ x.mro() }}",
    ],
)
def test_a_hostile_template_is_refused(render: Any, template: str) -> None:
    with pytest.raises(TemplateError, match=r"tokenizer\.chat_template"):
        raise_if_harmless(render(template))


def raise_if_harmless(text: str) -> None:
    """An attribute that the sandbox hides is undefined, and renders as nothing."""
    if not text:
        raise TemplateError("tokenizer.chat_template")


def test_a_template_cannot_change_the_messages(render: Any) -> None:
    messages = [dict(HELLO[0])]
    with pytest.raises(TemplateError, match="not safe to run"):
        render("{{ messages[0].update(role='system') }}", messages)
    assert messages == HELLO


def test_wrong_templates(render: Any, tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"tokenizer\.chat_template' is missing"):
        ChatTemplate({}, tokenizer(tmp_path, bpe()))
    with pytest.raises(GGUFError, match="line 2: "):
        render("a\n{% for %}")
    with pytest.raises(TemplateError, match="'dict object' has no attribute 'x'"):
        render("{{ messages[0].x.y }}")


def test_an_old_jinja2_is_refused(render: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja2, "__version__", "3.1.5")
    with pytest.raises(MissingPackageError, match=re.escape("needs 3.1.6 or newer")):
        render("")
