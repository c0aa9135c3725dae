"""Chat templates as models bring them: found, rendered as transformers does, and kept in their sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from partinf.foundation.errors import InvalidInput
from partinf.serve.chat_template import ChatTemplate, TemplateRefusal, load_chat_template

MESSAGES = [{"role": "user", "content": "a <b> ü"}, {"role": "assistant", "content": "c"}]


def test_tokens_blocks_and_the_prompt_for_an_answer() -> None:
    source = """{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'skip' %}
        {%- continue %}
    {%- endif %}
    <{{ message['role'] }}>{{ message['content'] | trim }}
    {%- generation %}{% endgeneration %}
    {% if loop.index == 2 %}{% break %}{% endif %}
{%- endfor %}
{% if add_generation_prompt %}<assistant>{{ eos_token }}{% endif %}"""
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    messages = [{"role": "skip", "content": "no"}, {"role": "user", "content": " x "}, {"role": "user", "content": "never"}]
    assert template.render(messages) == "<s>    <user>x<assistant></s>"
    assert template.render(messages, add_generation_prompt=False) == "<s>    <user>x"


def test_the_functions_of_transformers() -> None:
    assert ChatTemplate("{{ messages | tojson }}").render(MESSAGES) == json.dumps(MESSAGES, ensure_ascii=False)
    assert ChatTemplate("{{ messages[0] | tojson(indent=2) }}").render(MESSAGES) == json.dumps(MESSAGES[0], ensure_ascii=False, indent=2)
    year = ChatTemplate("{{ strftime_now('%Y') }}").render([])
    assert (len(year), year.isdigit()) == (4, True)
    with pytest.raises(TemplateRefusal, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(MESSAGES)
    assert ChatTemplate("{{ think }}").render([], more={"think": "no", "self": 1}) == "no"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{% for i in range(10000000000) %}{% endfor %}",
        "{{ messages[0]['content'] + 1 }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_what_a_template_may_not(source: str) -> None:
    with pytest.raises(TemplateRefusal, match="cannot render"):
        ChatTemplate(source).render(MESSAGES)


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert load_chat_template(None) is None
    assert load_chat_template(tmp_path) is None
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"bos_token": {"content": "<B>"}, "chat_template": "{{ bos_token }}1"}))
    found = load_chat_template(tmp_path)
    assert found is not None
    assert found.render([]) == "<B>1"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "2"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert load_chat_template(tmp_path).render([]) == "2"  # type: ignore[union-attr]
    (tmp_path / "chat_template.jinja").write_text("3")
    assert load_chat_template(tmp_path).render([]) == "3"  # type: ignore[union-attr]
    (tmp_path / "mine").write_text("4")
    assert load_chat_template(tmp_path, tmp_path / "mine").render([]) == "4"  # type: ignore[union-attr]


def test_which_form_was_found(tmp_path: Path) -> None:
    """Of several files and names the one that counts, and which that was; a byte order mark is no part of a template."""
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<B>", "eos_token": {"content": "<E>"}}))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ bos_token }}{{ eos_token }}"}))

    def found() -> tuple[str, str]:
        template = load_chat_template(tmp_path)
        assert template is not None
        return template.render([]), template.where.replace(str(tmp_path), "")

    assert found() == ("<B><E>", "/chat_template.json: chat_template")
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"bos_token": "<C>", "chat_template": "{{ bos_token }}{{ eos_token }}"}))
    assert found() == ("<C><E>", "/tokenizer_config.json: chat_template")
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "\ufeff2"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert found() == ("2", "/tokenizer_config.json: chat_template, of tool_use, default the one called default")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf3")
    assert found() == ("3", "/chat_template.jinja")


@pytest.mark.parametrize(
    "held, message",
    [
        ([{"name": "tool_use", "template": "no"}], "holds tool_use, and none called default"),
        ([], "holds no template"),
        (3, "is a JSON int"),
        ({"default": "x"}, "is a JSON dict"),
        ("{{ 'x' | no_such_filter }}", "line 1: no filter named 'no_such_filter'"),
        ("{{ 'x' is no_such_test }}", "line 1: no test named 'no_such_test'"),
        ("{{ x" + ".y" * 5000 + " }}", "nested too deeply"),
        ("{{ " + "(" * 5000 + " }}", "nested too deeply"),
    ],
)
def test_what_is_no_template(tmp_path: Path, held: object, message: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": held}))
    with pytest.raises(InvalidInput, match=message):
        load_chat_template(tmp_path)


def test_templates_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("line\n{% for %}")
    with pytest.raises(InvalidInput, match=r"chat_template\.jinja: line 2"):
        load_chat_template(tmp_path)
    with pytest.raises(InvalidInput, match="no-such-file"):
        load_chat_template(tmp_path, tmp_path / "no-such-file")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InvalidInput, match="not JSON"):
        load_chat_template(tmp_path)
