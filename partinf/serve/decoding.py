"""A request's JSON into its type, with every offence found and named by the parameter that it is about.

msgspec checks a field against its type and bounds, and stops at the first that is wrong; so the fields are converted one by one.
"""

from __future__ import annotations

import functools
import re
from typing import Any, TypeVar, get_type_hints

import msgspec

from partinf.errors import nearest
from partinf.serve.errors import Offence, invalid

T = TypeVar("T", bound="Body")

_NAMED = 20  # unknown parameters that are answered by name
_SHOWN = 60  # characters of a wrong value that an error repeats
_PATH = re.compile(r" - at `(?:key` in `)?\$(.*)`$")


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a request. A parameter that is null counts as absent."""

    @classmethod
    def refused(cls) -> dict[str, tuple[object, ...]]:
        """Parameters of OpenAI's that are not supported, each with the values that ask for nothing."""
        return {}


def decode(kind: type[T], body: bytes) -> tuple[T, list[Offence]]:
    """The body as `kind`, and the offences of those parameters that were left out of it for being wrong.

    Raises:
        ApiError: what is no JSON object, or lacks a parameter that is required; with all offences.
    """
    try:
        given = msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise invalid([Offence(f"the body is not JSON that can be read: {error}")], code="invalid_json") from None
    if not isinstance(given, dict):
        raise invalid([Offence("the body is JSON, but no object")], code="invalid_json")
    values: dict[str, Any] = {}
    offences = _unknown(kind, given)
    missing = False
    for name, form, required in _fields(kind):
        value = given.get(name)
        if value is not None:
            try:
                values[name] = msgspec.convert(value, form, str_keys=True)
                continue
            except (msgspec.ValidationError, RecursionError) as error:
                offences.append(_wrong(name, value, str(error)))
        elif required:
            offences.append(Offence(f"{name} is missing; it is required", name))
        missing = missing or required
    if missing:
        raise invalid(offences)
    return kind(**values), offences


@functools.cache  # resolving annotations takes longer than all the rest of a request
def _fields(kind: type[Body]) -> list[tuple[str, Any, bool]]:
    """Name and type of every parameter, and whether it is required."""
    types = get_type_hints(kind, include_extras=True)
    return [(field.name, types[field.name], field.required) for field in msgspec.structs.fields(kind)]


def _unknown(kind: type[Body], given: dict[str, Any]) -> list[Offence]:
    known, refused = set(kind.__struct_fields__), kind.refused()
    offences = []
    for name, idle in refused.items():
        value = given.get(name)
        if value is not None and value not in idle:
            offences.append(Offence(f"{name} is not supported", name))
    strange = [name for name in given if name not in known and name not in refused]
    for name in strange[:_NAMED]:  # looking for the nearest name takes time
        offences.append(Offence(f"{_short(name)} is no parameter of this endpoint{nearest(name[:_SHOWN], known)}", name[:_SHOWN]))
    if len(strange) > _NAMED:
        offences.append(Offence(f"{len(strange) - _NAMED} more names are no parameters of this endpoint"))
    return offences


def _wrong(name: str, value: object, message: str) -> Offence:
    """msgspec's message with the path as the client would write it: `messages[0].role`."""
    match = _PATH.search(message)
    where = "" if match is None else match.group(1)
    what = message if match is None else message[: match.start()]
    given = "" if where else f", not {_short(value)}"
    return Offence(f"{name}{where}: {what[:1].lower()}{what[1:]}{given}", f"{name}{where}")


def _short(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
