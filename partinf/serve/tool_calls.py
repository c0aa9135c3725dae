"""Calls of tools in a model's text, while it comes: which formats there are, and where calls begin and end in it.

A model writes calls as its template taught it to; a client gets them separately from the text, the arguments piece by piece. What looks
like a call and turns out to be none stays text. A whole answer is read like a stream of one piece.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from partinf.engine.detokenize import longest_beginning

_BLANKS = " \t\r\n"
_NAMED = re.compile(r"([\w.-]+)(?:\[CALL_ID\]([\w-]+))?(?:\[ARGS\])?\s*")
_NAMING = re.compile(r"[\w.-]+(?:\[\w*\]?[\w-]*)*\s*")  # what may become that
_MOST_NAME = 256  # characters before the arguments of a call that is named outside of them


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls.

    Attributes:
        marker: stands before calls. end: stands after one; empty where nothing does. between: what besides blanks may stand around calls.
        bare: with what a text begins that is calls without the marker; empty where there are none.
        python: calls are Python's, `[f(a=1), g()]`; otherwise JSON. named: the name may stand before an object of arguments.
        special: the marker is a special token, which texts leave out by default.
        id_len: characters of a call's id, where templates expect so many.
        marks: what a template of this format holds. foreign: and what one of another format does.
    """

    marker: str
    end: str = ""
    between: str = ""
    bare: str = ""
    python: bool = False
    named: bool = False
    special: bool = False
    id_len: int = 29
    marks: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()


FORMATS = {
    "pythonic": ToolFormat(
        "<|python_start|>", "<|python_end|>", "[],", bare="[", python=True, special=True, marks=("func_name1(", "<|python_start|>")
    ),
    "mistral": ToolFormat("[TOOL_CALLS]", between="[],", named=True, special=True, id_len=9, marks=("[TOOL_CALLS]",)),
    "hermes": ToolFormat("<tool_call>", "</tool_call>", marks=("<tool_call>",), foreign=("<function=", "<arg_key>")),
    "llama3_json": ToolFormat("<|python_tag|>", between=";", bare="{", special=True, marks=("<|python_tag|>", '{"name": function name,')),
}
"""By vLLM's names."""


def format_of(template: str) -> ToolFormat | None:
    """The format in which a chat template writes calls; None where it is not known."""
    for form in FORMATS.values():
        if any(mark in template for mark in form.marks) and not any(mark in template for mark in form.foreign):
            return form
    return None


@dataclass
class CallPart:
    """What is new of a call: `name` with the first piece of it, then more of the arguments."""

    index: int
    name: str | None
    arguments: str


@dataclass
class Part:
    """What a stretch of text adds to a message."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPart] = field(default_factory=list)


class CallReader:
    """Tells calls from the text around them.

    Attributes:
        count: of the calls so far.
    """

    def __init__(self, form: ToolFormat, tools: Collection[str], parallel: bool = True) -> None:
        """
        Args:
            tools: names of those that there are: a text that only looks like a call of another one stays text where calls have no marker.
            parallel: tell of all calls, or of the first alone.
        """
        self.count = 0
        self._form, self._tools, self._parallel = form, tools, parallel
        self._pending = ""
        self._raw = ""  # read since the last call, or since calls may have begun: text, if none begins
        self._began = self._after = self._marked = False
        self._call: _JsonCall | _PythonCall | None = None
        self._mode: Callable[[Part, bool], bool] = self._text

    def push(self, text: str, part: Part) -> None:
        """Read on; what is found joins the part."""
        self._pending += text
        while self._mode(part, False):
            pass

    def finish(self, part: Part) -> None:
        """No more text comes."""
        while self._mode(part, True):
            pass

    def _emit(self, text: str, part: Part) -> None:
        if self._after:  # blanks around calls are no text
            text = text.lstrip()
        if text:
            self._after = False
            part.content += text

    def _text(self, part: Part, last: bool) -> bool:
        """Outside of calls: give out text up to the next marker. True where there may be more to do at once."""
        form, pending = self._form, self._pending
        if form.bare and not self._began:
            lead = pending.lstrip()
            if not lead and not last:
                return False
            self._began = bool(lead)
            if lead.startswith(form.bare):
                self._raw, self._marked, self._mode = pending[: len(pending) - len(lead)], False, self._region
                self._pending = lead
                return True
        at = pending.find(form.marker)
        if at >= 0:
            self._emit(pending[:at].rstrip(), part)
            self._began = self._marked = True
            self._raw, self._pending, self._mode = (
                pending[len(pending[:at].rstrip()) : at] + form.marker,
                pending[at + len(form.marker) :],
                self._region,
            )
            return True
        if last:
            self._emit(pending, part)
            self._pending = ""
            return False
        sure = pending[: len(pending) - longest_beginning(pending, form.marker)].rstrip()
        self._emit(sure, part)
        self._pending = pending[len(sure) :]
        return False

    def _region(self, part: Part, last: bool) -> bool:
        """Where a call may begin."""
        form = self._form
        at, pending, marks = 0, self._pending, tuple(filter(None, (form.end, form.marker)))
        while at < len(pending):
            found = next((mark for mark in marks if pending.startswith(mark, at)), None)
            if found is None and not last and any(len(mark) > len(pending) - at and mark.startswith(pending[at:]) for mark in marks):
                self._pass(at)
                return False
            if found is None and pending[at] not in _BLANKS + form.between:
                break
            at += len(found or " ")
            if found and found == form.end:
                self._pass(at)
                return self._to_text(part)
        self._pass(at)
        if not self._pending:
            return self._to_text(part) if last else False
        name = _NAMED.match(self._pending)
        opening = self._pending.find("(" if form.python else "{")
        if not form.python and opening == 0:
            self._call = _JsonCall(None)
        elif (
            (form.named or form.python)
            and opening < 0
            and not last
            and len(self._pending) < _MOST_NAME
            and _NAMING.fullmatch(self._pending)
        ):
            return False
        elif form.python and name and name.end() == opening:
            self._call = _PythonCall()
        elif form.named and name and name.end() == opening:
            self._raw += self._pending[:opening]
            self._pending = self._pending[opening:]
            self._call = _JsonCall(name.group(1))
        else:
            return self._to_text(part)
        self._mode = self._inside
        return True

    def _pass(self, count: int) -> None:
        """So many characters stand between calls."""
        self._raw, self._pending = self._raw + self._pending[:count], self._pending[count:]

    def _inside(self, part: Part, last: bool) -> bool:
        """In a call."""
        call = self._call
        assert call is not None
        self._pending = call.feed(self._pending)
        self._tell(call, part)
        if not (call.complete or last):
            return False
        if call.announced:
            self.count += 1
            self._raw, self._after = "", True
            self._mode = self._region
        else:
            self._raw += call.text
            self._to_text(part)
        return True

    def _tell(self, call: _JsonCall | _PythonCall, part: Part) -> None:
        """What is new of a call, once it is sure to be one."""
        if call.name is None or not (self._marked or (call.name in self._tools and call.has_arguments)):
            return
        more = call.take()
        if more or not call.announced:
            if self._parallel or not self.count:
                part.calls.append(CallPart(self.count, None if call.announced else call.name, more))
            call.announced = True

    def _to_text(self, part: Part) -> bool:
        """No call begins here: what was read since the last one is text."""
        if self._raw.strip(_BLANKS + self._form.between).removesuffix(self._form.end or "\0").strip():
            self._emit(self._raw, part)
        elif not self.count:
            self._emit(self._raw.removesuffix(self._form.end or "\0"), part)
        self._raw, self._mode = "", self._text
        return True


class _JsonCall:
    """A call in JSON: an object with a name and arguments, or, where the name is known, the object of the arguments itself."""

    def __init__(self, name: str | None) -> None:
        self.text, self.name, self.complete, self.announced = "", name, False, False
        self._whole = name is not None
        self._at = self._depth = self._sent = 0
        self._quoted = self._escaped = False
        self._start = -1  # of the string, or of the value, that is being read
        self._key: str | None = None
        self._word: str | None = None  # the last string of the object itself
        self._span: tuple[int, int] | None = (0, -1) if self._whole else None  # of the arguments, open while the end is negative

    @property
    def has_arguments(self) -> bool:
        return self._span is not None

    def feed(self, text: str) -> str:
        """Read on; what is left after the end of the call."""
        self.text += text
        while self._at < len(self.text) and not self.complete:
            self._read(self._at, self.text[self._at])
            self._at += 1
        if not self.complete:
            return ""
        rest, self.text = self.text[self._at :], self.text[: self._at]
        return rest

    def _read(self, at: int, sign: str) -> None:
        if self._quoted:
            if self._escaped or sign == "\\":
                self._escaped = not self._escaped
            elif sign == '"':
                self._quoted = False
                if self._depth == 1:
                    self._end_of_string(at + 1)
        elif sign == '"':
            self._quoted = True
            if self._depth == 1:
                self._start = at
                self._begin_value(at)
        elif sign in "{[":
            self._depth += 1
            if self._depth == 2:
                self._begin_value(at)
        elif sign in "}]":
            self._depth -= 1
            if self._depth <= 1:
                self._end_value(at if self._depth < 1 and not self._whole else at + 1)
            self.complete = self._depth <= 0
        elif self._depth == 1 and sign == ":":
            self._key = self._word
        elif self._depth == 1 and sign == ",":
            self._end_value(at)
            self._key = None
        elif self._depth == 1 and sign not in _BLANKS:
            self._begin_value(at)

    def _begin_value(self, at: int) -> None:
        if self._key in ("arguments", "parameters") and self._span is None:
            self._span = (at, -1)

    def _end_value(self, end: int) -> None:
        ours = self._depth <= 0 if self._whole else self._key in ("arguments", "parameters")
        if self._span is not None and self._span[1] < 0 and ours:
            self._span = (self._span[0], end)

    def _end_of_string(self, end: int) -> None:
        if self._key is None:
            self._word = _string(self.text[self._start : end])
            return
        if self._key == "name" and self.name is None:
            self.name = _string(self.text[self._start : end]) or None
        self._end_value(end)

    def take(self) -> str:
        """The arguments since the last time. A string that holds them is read, and what is no object is none."""
        if self._span is None:
            rest = "{}" if self.complete and not self._sent else ""
            self._sent += len(rest)
            return rest
        start, end = self._span
        if self.text[start : start + 1] != "{":
            if end < 0 or self._sent:
                return ""
            self._sent = end
            value = self.text[start:end].strip()
            return _string(value) or "{}" if value.startswith('"') else "{}"
        until = len(self.text) if end < 0 else end
        more = self.text[max(start, self._sent) : until]
        self._sent = until
        return more


def _string(text: str) -> str | None:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


_WORDS = {"true": True, "false": False, "null": None}  # which models write as JSON has them


class _Words(ast.NodeTransformer):
    """Puts the values of `_WORDS` in their places."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_WORDS[node.id]) if node.id in _WORDS else node


class _PythonCall:
    """A call as Python writes it, `f(a=1, b="x")`, sent when it is complete."""

    def __init__(self) -> None:
        self.text, self.complete, self.announced = "", False, False
        self.name: str | None = None
        self._arguments = ""
        self._at = self._depth = 0
        self._quote = ""
        self._escaped = False

    @property
    def has_arguments(self) -> bool:
        return self.name is not None

    def feed(self, text: str) -> str:
        """Read on; what is left after the end of the call."""
        self.text += text
        while self._at < len(self.text) and not self.complete:
            self._read(self.text[self._at])
            self._at += 1
        if not self.complete:
            return ""
        rest, self.text = self.text[self._at :], self.text[: self._at]
        self._parse()
        return rest

    def _read(self, sign: str) -> None:
        if self._quote:
            if self._escaped or sign == "\\":
                self._escaped = not self._escaped
            elif sign == self._quote:
                self._quote = ""
        elif sign in "\"'":
            self._quote = sign
        elif sign in "([{":
            self._depth += 1
        elif sign in ")]}":
            self._depth -= 1
            self.complete = self._depth <= 0

    def _parse(self) -> None:
        """Name and arguments; neither where it is no call of literal keywords."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that Python does not know
                call = ast.parse(self.text.strip(), mode="eval").body
            if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
                return
            found = {str(word.arg): ast.literal_eval(_Words().visit(word.value)) for word in call.keywords}
            self._arguments, self.name = json.dumps(found, ensure_ascii=False, allow_nan=False), ast.unparse(call.func)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return

    def take(self) -> str:
        more, self._arguments = self._arguments, ""
        return more
