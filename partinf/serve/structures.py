"""What clients ask of the form of an answer, compiled: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from partinf.checkpoint.tokenizer import Tokenizer
from partinf.engine.constraint import Grammar
from partinf.engine.runner import RunnerLimits
from partinf.foundation.errors import InvalidInput, Overloaded
from partinf.serve.errors import Offence
from partinf.serve.forced_calls import forced, forced_schema
from partinf.serve.protocol import ChatBody, SamplingBody
from partinf.structured import Isolated, Structure, missing

_AT_ONCE = 2  # structures that are compiled: each takes up to some seconds of a core, behind all else that runs
_SECONDS = 10.0  # that one waits for its turn
_WAYS = ("json", "regex", "choice", "grammar", "json_object")


class Structures:
    """Compiles what requests ask for, off the event loop, few at a time. To be closed."""

    def __init__(self, limits: RunnerLimits, tokenizer: Tokenizer | None) -> None:
        self._tokenizer, self._vocab_size = tokenizer, limits.vocab_size
        self._grammars: Isolated | None = None
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="partinf-structures")
        self._lock = threading.Lock()
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._missing: str | None = None
        if not limits.constrained:
            self._missing = "structured output is not supported here: the steps were compiled without it"
        elif tokenizer is None:
            self._missing = "structured output needs a tokenizer, and this model has none"
        else:
            self._missing = missing()

    async def compile(self, body: SamplingBody, offences: list[Offence]) -> Grammar | None:
        """What the answer is held to; None where nothing is requested, or it is wrong, for the reasons that joined the offences.

        Raises:
            Overloaded: too many are being compiled already.
        """
        wanted = _wanted(body, offences)
        if wanted is None:
            return None
        where, structure = wanted
        if self._missing is not None:
            offences.append(Offence(f"{where}: {self._missing}", where))
            return None
        try:
            async with asyncio.timeout(_SECONDS):
                await self._turns.acquire()
        except TimeoutError:
            raise Overloaded("too many structures wait to be compiled", retry_after=_SECONDS) from None
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._compile, structure)
        except InvalidInput as error:
            offences += [Offence(f"{where}: {offence}", where) for offence in error.offences]
            return None
        finally:
            self._turns.release()

    def close(self) -> None:
        """End all processes; answers whose masks they find out fail."""
        self._threads.shutdown(wait=False)
        if self._grammars is not None:
            self._grammars.close()

    def _compile(self, structure: Structure) -> Grammar:
        with self._lock:  # reading a vocabulary takes some tenths of a second, once
            if self._grammars is None:
                assert self._tokenizer is not None
                self._grammars = Isolated(self._tokenizer, self._vocab_size)
        return self._grammars(structure)


def _wanted(body: SamplingBody, offences: list[Offence]) -> tuple[str, Structure] | None:
    """The one structure that a body asks for, with the parameter that does."""
    ways = list(_ways(body, offences))
    if len(ways) > 1:
        names = " and ".join(where for where, _ in ways)
        offences.append(Offence(f"{names} are given; an answer has one form, give one of them", ways[-1][0]))
        return None
    return ways[0] if ways else None


def _ways(body: SamplingBody, offences: list[Offence]) -> Iterator[tuple[str, Structure]]:
    """Everything that a body asks for, with the parameter that does; what is wrong joins the offences."""
    form, outputs = body.response_format, body.structured_outputs
    wanted: list[tuple[str, object]] = []
    if form is not None and form.type == "json_object":
        wanted.append(("response_format", True))
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            offences.append(Offence("response_format.json_schema is missing; it is required", "response_format.json_schema"))
        else:
            wanted.append(("response_format.json_schema", form.json_schema.schema))
    if outputs is not None:
        given = [(name, getattr(outputs, name)) for name in _WAYS]
        wanted += [(f"structured_outputs.{name}", value) for name, value in given if value not in (None, False)]
        if not wanted:
            offences.append(Offence(f"structured_outputs asks for nothing; give one of {', '.join(_WAYS)}", "structured_outputs"))
    if isinstance(body, ChatBody) and forced(body):
        try:
            yield "tool_choice", Structure.json_schema(forced_schema(body))
        except InvalidInput as error:
            offences += [Offence(f"tool_choice: {offence}", "tool_choice") for offence in error.offences]
    spaces = outputs is None or not outputs.disable_any_whitespace
    for where, value in wanted:
        try:
            yield where, _structure(where.rpartition(".")[2], value, spaces)
        except InvalidInput as error:
            offences += [Offence(f"{where}: {offence}", where) for offence in error.offences]


def _structure(way: str, value: object, spaces: bool) -> Structure:
    if value is True:
        return Structure.json_object(spaces)
    if isinstance(value, list):
        return Structure.choice(value)
    if isinstance(value, dict) or way == "json":
        return Structure.json_schema(value, spaces)  # type: ignore[arg-type]
    return Structure.regex(str(value)) if way == "regex" else Structure.grammar(str(value))
