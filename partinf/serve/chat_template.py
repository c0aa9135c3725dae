"""A model's own chat template: messages in, one text out.

Templates are programs that come with a model, so they run in jinja's sandbox. They are written for transformers: they may call
`raise_exception` and `strftime_now`, use `break`, `continue` and `generation` blocks, and expect `tojson` to leave characters as they are.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from partinf.errors import InvalidInput

TEMPLATE_FILE, SETTINGS_FILE = "chat_template.jinja", "tokenizer_config.json"


class TemplateRefusal(Exception):
    """The template does not take these messages; the text is the template's own."""


class ChatTemplate:
    """A compiled template and the special tokens that it may name (`bos_token`, `eos_token`, …)."""

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None, where: str = "chat template") -> None:
        """
        Raises:
            InvalidInput: a template that jinja cannot read.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._tokens = dict(tokens or {})
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidInput(f"{where}: line {error.lineno}: {error.message}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, more: Mapping[str, Any] | None = None
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: each with `role` and `content`. more: further variables of the template, by name.

        Raises:
            TemplateRefusal: the template refuses the messages, or cannot cope with them.
        """
        variables = self._tokens | dict(more or {}) | {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(variables)
        except TemplateRefusal:
            raise
        except Exception as error:  # the template's code: whatever it does to these messages
            raise TemplateRefusal(f"the model's chat template cannot render these messages ({type(error).__name__})") from error


def load_chat_template(directory: Path | None, file: Path | None = None) -> ChatTemplate | None:
    """The template of a model directory: chat_template.jinja, or else what tokenizer_config.json holds; None where there is none.

    Args:
        file: a template to use instead of the model's.

    Raises:
        InvalidInput: a file that cannot be read, or no template in it.
    """
    settings = _settings(directory)
    tokens = {key: name for key in settings if key.endswith("_token") and (name := _name(settings[key])) is not None}
    if file is None and directory is not None and (directory / TEMPLATE_FILE).is_file():
        file = directory / TEMPLATE_FILE
    if file is not None:
        try:
            return ChatTemplate(file.read_text(encoding="utf-8"), tokens, str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"chat template {file}: {error}") from error
    source = settings.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, Mapping)}
        source = named.get("default")
    return ChatTemplate(source, tokens, f"{directory}/{SETTINGS_FILE}: chat_template") if isinstance(source, str) else None


def _settings(directory: Path | None) -> dict[str, Any]:
    path = None if directory is None else directory / SETTINGS_FILE
    if path is None or not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise InvalidInput(f"{path}: not JSON ({error}); expected an object") from error
    return settings if isinstance(settings, dict) else {}


def _name(token: Any) -> str | None:
    """A special token as tokenizer_config.json has it: a string, or an object with `content`."""
    name = token.get("content") if isinstance(token, Mapping) else token
    return name if isinstance(name, str) else None


def _refuse(message: Any) -> None:
    raise TemplateRefusal(str(message))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks what the model said, for training; rendering keeps what is inside."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
