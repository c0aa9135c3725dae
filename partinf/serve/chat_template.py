"""A model's own chat template: messages in, one text out.

Templates are programs that come with a model, so they run in jinja's sandbox. They are written for transformers: they may call
`raise_exception` and `strftime_now`, use `break`, `continue` and `generation` blocks, expect `tojson` to leave characters as they are, and
find `tools` and `documents` as None where there are none. The sandbox bounds neither time nor memory; `template_processes` does.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from partinf.foundation.documents import read_bytes, read_text
from partinf.foundation.errors import InvalidInput, raise_offences
from partinf.serve.content_form import content_form

TEMPLATE_FILE, SETTINGS_FILE, TOKENS_FILE = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"
PROCESSOR_FILE = "chat_template.json"  # where processors kept theirs before they had a file of its own
MOST_CHARACTERS = 1 << 23


class TemplateRefusal(Exception):
    """The template does not take these messages; the text is the template's own."""


class ChatTemplate:
    """A compiled template and the special tokens that it may name (`bos_token`, `eos_token`, …).

    Attributes:
        source: the template's text. tokens: by the names of their variables. where: the file that it comes from, for messages.
        form: in which it reads contents. knows_tools: whether it shows tools to the model.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None, where: str = "chat template") -> None:
        """
        Raises:
            InvalidInput: a template that jinja cannot read.
        """
        self.source = source.removeprefix("\ufeff")  # some editors put a byte order mark before a text
        self.tokens = dict(tokens or {})
        self.where = where
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._environment = environment
        try:
            self._parsed = environment.parse(self.source)
            self.form = content_form(self._parsed)
            self.knows_tools = any(name.name == "tools" and name.ctx == "load" for name in self._parsed.find_all(jinja2.nodes.Name))
            unknown = list(self._unknown())
        except jinja2.TemplateSyntaxError as error:
            raise InvalidInput(f"{where}: line {error.lineno}: {error.message}") from error
        except RecursionError as error:
            raise InvalidInput(f"{where}: it is nested too deeply to be read") from error
        raise_offences(f"{where}: line {line}: no {kind} named {name!r}" for line, kind, name in unknown)

    def _unknown(self) -> Iterator[tuple[int, str, str]]:
        """Unknown filters and tests, with their lines."""
        for node in self._parsed.find_all(jinja2.nodes.Filter):
            if node.name not in self._environment.filters:
                yield node.lineno, "filter", node.name
        for test in self._parsed.find_all(jinja2.nodes.Test):
            if test.name not in self._environment.tests:
                yield test.lineno, "test", test.name

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        """Compiled at the first use: jinja works out constants then, `9 ** (9 ** 9)` as well."""
        return self._environment.from_string(self.source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        more: Mapping[str, Any] | None = None,
        most: int = MOST_CHARACTERS,
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: each with `role` and `content`. more: further variables of the template, by name. most: characters of the prompt.

        Raises:
            TemplateRefusal: the template refuses the messages, cannot cope with them, or makes too much of them.
        """
        absent = {"tools": None, "documents": None}
        variables = absent | self.tokens | dict(more or {}) | {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return "".join(_bounded(self._template.generate(variables), most))
        except (TemplateRefusal, MemoryError):
            raise
        except Exception as error:  # the template's code: whatever it does to these messages
            raise TemplateRefusal(f"the model's chat template cannot render these messages ({type(error).__name__})") from error


def _bounded(pieces: Iterator[str], most: int) -> Iterator[str]:
    """The pieces of a prompt as long as they are not too many and can be written down."""
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > most:
            raise TemplateRefusal(f"the model's chat template makes a prompt of more than {most} characters of these messages")
        if not piece.isascii():
            _check_unicode(piece)
        yield piece


def _check_unicode(piece: str) -> None:
    try:
        piece.encode()
    except UnicodeEncodeError as error:
        half = ascii(piece[error.start])[1:-1]
        raise TemplateRefusal(f"the model's chat template writes {half}, half of a surrogate pair, which is no character") from None


def load_chat_template(directory: Path | None, file: Path | None = None) -> ChatTemplate | None:
    """The template of a model directory; None where there is none.

    It is what chat_template.jinja, tokenizer_config.json or chat_template.json holds, the first that is there. Of several by name it is
    the one called `default`.

    Args:
        file: a template to use instead of the model's.

    Raises:
        InvalidInput: a file that cannot be read, or no template in it.
    """
    settings = _settings(directory, SETTINGS_FILE)
    tokens = _tokens(_settings(directory, TOKENS_FILE)) | _tokens(settings)
    if file is None and directory is not None and (directory / TEMPLATE_FILE).is_file():
        file = directory / TEMPLATE_FILE
    if file is not None:
        return ChatTemplate(read_text(file, f"chat template {file}"), tokens, str(file))
    for name in (SETTINGS_FILE, PROCESSOR_FILE):
        held = settings if name == SETTINGS_FILE else _settings(directory, name)
        if (found := _held(held.get("chat_template"), tokens, f"{directory}/{name}: chat_template")) is not None:
            return found
    return None


def _held(source: Any, tokens: Mapping[str, str], where: str) -> ChatTemplate | None:
    """The template that a value of a JSON file holds."""
    if source is None or isinstance(source, str):
        return None if source is None else ChatTemplate(source, tokens, where)
    if isinstance(source, list) and all(isinstance(entry, Mapping) for entry in source):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in source}
        if isinstance(named.get("default"), str):
            return ChatTemplate(named["default"], tokens, f"{where}, of {', '.join(map(str, named))} the one called default")
        raise InvalidInput(
            f"{where} holds {', '.join(map(str, named)) or 'no template'}, and none called default; give --chat-template FILE"
        )
    raise InvalidInput(f"{where} is a JSON {type(source).__name__}; a text, or a list of texts by name is needed")


def _settings(directory: Path | None, name: str) -> dict[str, Any]:
    """The object in a file. A template may hold anything, half a surrogate pair too, so long as it does not write it."""
    path = None if directory is None else directory / name
    if path is None or not path.is_file():
        return {}
    try:
        settings = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: not JSON ({error}); expected an object") from None
    return settings if isinstance(settings, dict) else {}


def _tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name, which a file has as a string, or as an object with `content`."""
    given = {
        key: token.get("content") if isinstance(token, Mapping) else token for key, token in settings.items() if key.endswith("_token")
    }
    return {key: token for key, token in given.items() if isinstance(token, str)}


def _refuse(message: Any) -> None:
    raise TemplateRefusal(str(message))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks what the model wrote, for training; rendering keeps what is inside."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
