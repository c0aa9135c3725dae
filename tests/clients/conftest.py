"""Servers for clients of other projects: the demo model as `partinf serve` runs it, and one that calls a tool for questions of rain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from partinf.checkpoint.tokenizer import load_tokenizer
from partinf.engine import FakeRunner
from partinf.serve.chat_template import ChatTemplate
from tests.serve.support import LIMITS, fake_engine, serving
from tests.serve.test_life import process

_TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "fixtures/tokenizer_byte_level")
_LIMITS = replace(LIMITS, vocab_size=_TOKENIZER.vocab_size, max_len=4096, pages_per_shard=4096)
_TEMPLATE = ChatTemplate(
    "{% if tools %}{{ tools | tojson }} answer by <tool_call>{% endif %}{% for message in messages %}{{ message.role }}: "
    "{{ message.content or '' }}{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.city }})"
    "{% endfor %}\n{% endfor %}",
    {},
)
_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


class Rain(FakeRunner):
    """Says a call of a tool, and after a tool's answer what that means; one conversation at a time. A grammar's masks it obeys, and chooses
    what closes things if it cannot say what it wants."""

    def __init__(self) -> None:
        super().__init__(_LIMITS, self._next)
        self._script: list[int] = []
        self._start = self._seen = 0

    def _next(self, context: Sequence[int]) -> int:
        if len(context) != self._seen + 1:
            prompt = _TOKENIZER.decode(context, special=True)
            text = "It rains in Zürich." if "tool: It rains" in prompt else _CALL
            self._script, self._start = [*_TOKENIZER.encode(text, add_bos=False), *sorted(_TOKENIZER.eos_ids)[:1]], len(context)
        self._seen = len(context)
        return self._script[min(len(context) - self._start, len(self._script) - 1)]


@pytest.fixture(scope="session")
def demo_url(root: Path) -> Iterator[str]:
    with process(root, "-m", "partinf", "serve", "--model", "demo", "--slice", "cpu:1", "--port", 0) as server:
        server.wait_ready(240)
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="session")
def rain_url() -> Iterator[str]:
    with serving(fake_engine(Rain(), tokenizer=_TOKENIZER), _TOKENIZER, _TEMPLATE, names=["demo"]) as found:
        yield found.url
