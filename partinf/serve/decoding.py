"""A request's JSON into its type, with every offence found and named by the parameter that it is about.

msgspec checks a field against its type and bounds, and stops at the first that is wrong; so the fields are converted one by one. A name
that is not known is an error, because ignoring it would answer another request, unless it requests nothing: null does not,
and neither does the value that a parameter has by itself.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any, TypeVar, get_type_hints

import msgspec

from partinf.foundation.errors import nearest
from partinf.serve.errors import Offence, Quoting, invalid

T = TypeVar("T", bound="Body")
Idle = dict[str, tuple[object, ...]]

# What a body may hold: each takes many times the memory of its characters, and time of the interpreter, which all requests share.
_CONTAINERS = 1 << 16  # lists and objects
_STRINGS = 1 << 18
_VALUES = 1 << 20  # besides the ids of prompts that can be answered
_NAMED = 20  # unknown parameters that are answered by name
_SHOWN = 60  # characters of a wrong value that an error repeats
_PATH = re.compile(r" - at `(?:key` in `)?\$(.*)`$")
_QUOTED = re.compile(r"'.*'", re.DOTALL)
_HALF_A_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


class Fields(msgspec.Struct, frozen=True, kw_only=True):
    """An object within a request."""

    @classmethod
    def refused(cls) -> Idle:
        """What other servers know of it and this one does not support, each with the values that ask for nothing, besides null."""
        return {}


class Body(Fields, frozen=True, kw_only=True):
    """The body of a request. A parameter that is null counts as absent."""

    @classmethod
    def inner(cls, given: dict[str, Any]) -> Iterator[tuple[str, type[Fields], Any]]:
        """The objects in a body that have fields of their own: parameter by which errors name them, type, value of any kind."""
        yield from ()

    @classmethod
    def advice(cls, path: str) -> str:
        """What to write where something of the wrong type stands, `messages[0].content[1].text` for example; may be empty."""
        return ""


def decode(kind: type[T], body: bytes, num_ids: int = 0) -> tuple[T, list[Offence]]:
    """The body as `kind`, and the offences of those parameters that were left out of it for being wrong.

    Args:
        num_ids: token ids that prompts may hold.

    Raises:
        ApiError: what is no JSON object, holds too many values to be looked at, or lacks a parameter that is required; with all offences.
    """
    _check_amount(body, _VALUES + num_ids)
    try:
        given = msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise invalid([Offence(f"the body is not JSON that can be read: {_why(body, error)}")], code="invalid_json") from None
    if not isinstance(given, dict):
        raise invalid([Offence("the body is JSON, but no object")], code="invalid_json")
    values: dict[str, Any] = {}
    offences = _unknown(kind, given, "")
    for where, form, value in kind.inner(given):
        if isinstance(value, dict) and not _names(form).issuperset(value):
            offences += _unknown(form, value, where)
    missing = False
    for name, form, required in _fields(kind):
        value = given.get(name)
        if value is not None:
            try:
                values[name] = msgspec.convert(value, form, str_keys=True)
                continue
            except (msgspec.ValidationError, RecursionError) as error:
                offences.append(_wrong(kind, name, value, str(error)))
        elif required:
            offences.append(Offence(f"{name} is missing; it is required", name))
        missing = missing or required
    if missing:
        raise invalid(offences)
    return kind(**values), offences


def _check_amount(body: bytes, most: int) -> None:
    """Raise a 400 for a body of very many values. Only where it may be one its strings are separated from the rest, which takes time."""
    bounds = {'"': 2 * _STRINGS, "[": _CONTAINERS, "{": _CONTAINERS, ",": most}
    if all(body.count(sign.encode()) <= bound for sign, bound in bounds.items()):
        return
    body = body.replace(rb"\\", b"").replace(rb"\"", b"")
    strings = body.count(b'"') // 2
    if strings <= _STRINGS:
        body = b"".join(body.split(b'"')[::2])
        containers, values = body.count(b"[") + body.count(b"{"), body.count(b",")
        if containers <= _CONTAINERS and values <= most:
            return
    raise invalid(
        [Offence(f"the body holds too much: {_CONTAINERS} lists and objects, {_STRINGS} strings and {most} values are read")], "too_large"
    )


@functools.cache  # resolving annotations takes longer than all the rest of a request
def _fields(kind: type[Body]) -> list[tuple[str, Any, bool]]:
    """Name and type of every parameter, and whether it is required."""
    types = get_type_hints(kind, include_extras=True)
    return [(field.name, types[field.name], field.required) for field in msgspec.structs.fields(kind)]


def _unknown(kind: type[Fields], given: dict[str, Any], where: str) -> list[Offence]:
    """What asks for something that is not known or not supported; `where` is empty for the body itself."""
    known, refused = _names(kind), kind.refused()
    given_names = [name for name, value in given.items() if value is not None and name not in known]
    strange = [name for name in given_names if name not in refused]
    wanted = [name for name in given_names if name in refused and given[name] not in refused[name]]
    offences = [Offence(f"{_within(where, name)} is not supported", where or name) for name in wanted]
    one, many = ("no field of it", "no fields of it") if where else ("no parameter of this endpoint", "no parameters of this endpoint")
    for name in strange[:_NAMED]:  # looking for the nearest name takes time
        short = name[:_SHOWN]
        offences.append(Offence(f"{_within(where, _short(name))} is {one}{nearest(short, known)}", where or short))
    if len(strange) > _NAMED:
        offences.append(Offence(f"{len(strange) - _NAMED} more names are {many}", where or None))
    return offences


@functools.cache
def _names(kind: type[Fields]) -> frozenset[str]:
    tag = kind.__struct_config__.tag_field
    return frozenset(kind.__struct_fields__) | ({tag} if tag else set())


def _within(where: str, name: str) -> str:
    return f"{where}: {name}" if where else name


def _why(body: bytes, error: Exception) -> str:
    """What is wrong with a body that is no JSON."""
    if ("truncated" in str(error) or "surrogate" in str(error)) and (half := _HALF_A_PAIR.search(body)) is not None:
        return f"a string holds {half.group().decode()}, which is half of a surrogate pair and no character"
    return str(error)


def _wrong(kind: type[Body], name: str, value: object, message: str) -> Offence:
    """msgspec's message with the path as the client would write it: `messages[0].role`."""
    match = _PATH.search(message)
    where = "" if match is None else match.group(1)
    what = message if match is None else message[: match.start()]
    given = "" if where else f", not {_short(value)}"
    what = f"{name}{where}: {what[:1].lower()}{what[1:]}"
    return Quoting(f"{what}{given}{kind.advice(f'{name}{where}')}", f"{name}{where}", _QUOTED.sub("…", what))


def _short(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
