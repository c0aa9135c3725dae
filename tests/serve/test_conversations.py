"""What a chat template gets of a conversation over HTTP, and that a template without end harms no other request."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.serve.chat_template import ChatTemplate, load_chat_template
from partinf.serve.content_form import ContentForm
from partinf.serve.template_processes import TemplateBounds
from tests.serve.support import DEMO, Serving, fake_engine, serving
from tests.serve.test_life import BODY, process

WALKING = "<s>{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
PLAIN = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}"
BOTH = """<s>{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p['text'] }}{% endfor %}
{%- endif %}{% endfor %}"""
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"


@contextlib.contextmanager
def chatting(source: str, **options: Any) -> Iterator[Serving]:
    with serving(fake_engine(), load_tokenizer(DEMO), ChatTemplate(source, {"bos_token": "<s>"}), **options) as found:
        yield found


def chat(found: Serving, *messages: dict[str, Any], **more: Any) -> tuple[int, Any]:
    status, content, _ = found.post("/v1/chat/completions", {"model": "demo", "messages": messages, "max_tokens": 1} | more)
    return status, content


@pytest.mark.parametrize("source", [WALKING, PLAIN, BOTH])
def test_contents_as_text_and_as_parts_say_the_same(source: str) -> None:
    text = "copy: a b ="
    with chatting(source) as found:
        for content in (text, [{"type": "text", "text": text}], [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]):
            status, answer = chat(found, {"role": "user", "content": content})
            assert (status, answer["usage"]["prompt_tokens"]) == (200, 5)


@pytest.mark.parametrize(
    "source, walks, tests",
    [
        (PLAIN, False, False),
        (WALKING, True, False),
        (BOTH, True, True),
        ("{% for m in messages[1:] %}{% set c = m['content'] | trim %}{% for p in c %}{{ p }}{% endfor %}{% endfor %}", True, False),
        ("{% macro f(c) %}{% if c is string %}{% endif %}{% for p in c %}{% endfor %}{% endmacro %}{{ f(m.content) }}", True, True),
        ("{% macro show(c) %}{% for p in c %}{% endfor %}{% endmacro %}{{ show(c=messages[0].get('content')) }}", True, False),
        ("{{ messages[0]['content'][0]['text'] }}", True, False),
        ("{% for line in messages[0].content.split('x') %}{% endfor %}", False, False),
        ("{% for t in tools %}{% if t.arguments is string %}{% endif %}{% endfor %}{{ messages[0].content }}", False, False),
    ],
)  # fmt: skip
def test_the_form_that_a_template_reads(source: str, walks: bool, tests: bool) -> None:
    assert ChatTemplate(source).form == ContentForm(walks, tests)


def test_what_transformers_gives() -> None:
    template = ChatTemplate(
        "{{ tools is none }} {{ documents is none }} {% if tools is not none %}TOOLS{% endif %}{{ reasoning is defined }}"
    )
    assert template.render([]) == "True True False"
    assert template.render([], more={"tools": [1]}) == "False True TOOLSFalse"


def test_arguments_of_tool_calls_are_objects() -> None:
    source = """<s>{% for m in messages %}{% for c in m.tool_calls %}
{%- for k, v in c.function.arguments|items %}copy: {{ k }} {{ v }}{% endfor %}{% endfor %}{% endfor %}"""

    def calling(arguments: object) -> dict[str, Any]:
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
        }

    with chatting(source) as found:
        for arguments in ('{"a": "b"}', {"a": "b"}):
            status, answer = chat(found, calling(arguments))
            assert (status, answer["usage"]["prompt_tokens"]) == (200, 4)
        for arguments in ('{"a": ', "[1]", "3", "[" * 100_000):
            status, answer = chat(found, calling(arguments))
            assert (status, answer["error"]["param"]) == (400, "messages[0].tool_calls[0].function.arguments")
        assert chat(found, calling(""))[0] == 200


def test_half_of_a_surrogate_pair_in_a_template(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "<s>\ud83d{{ messages[0].content }}"}))
    template = load_chat_template(tmp_path)
    assert template is not None
    with chatting(template.source) as found:
        status, answer = chat(found, {"role": "user", "content": "copy: a ="})
        assert (status, answer["error"]["param"]) == (400, "messages")
        assert r"\ud83d" in answer["error"]["message"]


def test_half_of_a_surrogate_pair_in_a_request(fake: Serving) -> None:
    for text in (r'"\ud83d"', r'"\udc00 x"', r'"x\ud83d\ud83dx"'):
        status, answer, _ = fake.post("/v1/completions", b'{"model": "demo", "prompt": ' + text.encode() + b"}")
        assert status == 400
        assert "half of a surrogate pair" in answer["error"]["message"]
    assert fake.post("/v1/completions", rb'{"model": "demo", "prompt": "copy: a =\ud83d\ude00", "max_tokens": 1}')[0] == 200


def test_a_part_within_a_part(fake: Serving) -> None:
    part = {"type": "text", "text": {"type": "text", "text": "x"}}
    status, answer = chat(fake, {"role": "user", "content": [part]})
    assert (status, answer["error"]["param"]) == (400, "messages[0].content[0].text")
    assert 'a list of parts {"type": "text", "text": "…"}' in answer["error"]["message"]


def test_a_template_without_end_blocks_no_other_client() -> None:
    with chatting(ENDLESS, template_bounds=TemplateBounds(seconds=0.8)) as found, concurrent.futures.ThreadPoolExecutor() as pool:
        hostile = [pool.submit(chat, found, {"role": "user", "content": "x"}) for _ in range(3)]
        while not all(one.done() for one in hostile):
            started = time.monotonic()
            assert found.get("/health")[0] == 200
            assert found.post("/v1/completions", {"model": "demo", "prompt": "copy: a =", "max_tokens": 2})[0] == 200
            assert time.monotonic() - started < 2
        for one in hostile:
            status, answer = one.result()
            assert (status, answer["error"]["param"]) == (400, "messages")


def test_the_first_signal_ends_a_server_with_a_template_without_end(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "endless.jinja"
    file.write_text(ENDLESS)
    with process(root, "-m", "tests.serve.served_process", 0, 5, 0, file) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        server.wait_ready()
        answer = pool.submit(server.ask, "POST", "/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": "x"}]})
        time.sleep(0.7)
        assert server.ask("POST", "/v1/completions", BODY | {"max_tokens": 2})[0] == 200
        started = time.monotonic()
        server.child.send_signal(signal.SIGTERM)
        code, _ = server.end()
        assert code == 0
        assert time.monotonic() - started < 6
        assert answer.exception() is not None or answer.result()[0] in (400, 503)
