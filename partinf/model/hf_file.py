"""One `config.json` being read: its values by type, with every offence collected until the end."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from partinf.foundation.documents import finite

_MOST_LINES = 20  # of keys that are not known: another kind of file has hundreds


def as_written(value: Any) -> str:
    """A value as it stands in the file, on one line, cut where it is long."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:79] + "…"


def same(value: Any, wanted: Any) -> bool:
    """Equality of JSON, where true is not 1."""
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


class HfFile:
    """A `config.json`, or an object within one.

    Attributes:
        data: its object. where: how messages name it. within: what stands before the names of its keys in messages.
        offences: what is wrong so far, shared with nested objects; a value that is wrong is read as its default.
    """

    def __init__(self, data: Mapping[str, Any], where: str, within: str = "", offences: list[str] | None = None) -> None:
        self.data, self.where, self.within = data, where, within
        self.offences: list[str] = [] if offences is None else offences

    def inside(self, data: Mapping[str, Any], key: str) -> HfFile:
        """The object under a key."""
        return HfFile(data, self.where, f"{self.within}{key}: ", self.offences)

    def offend(self, line: str) -> None:
        self.offences.append(f"{self.where}: {self.within}{line}")

    def whole(self, key: str, default: int | None = None) -> int | None:
        """A whole number; `default` where the file does not have the key, and an offence where there is none."""
        if key not in self.data and default is not None:
            return default
        value = self.data.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        self.offend(f"{key} = {as_written(value)}; a whole number is needed")
        return None

    def number(self, key: str, default: float) -> float:
        if key not in self.data:
            return default
        found = finite(self.data[key])
        if found is None:
            self.offend(f"{key} = {as_written(self.data[key])}; a number is needed")
            return default
        return found

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key, default)
        if isinstance(value, bool):
            return value
        self.offend(f"{key} = {as_written(value)}; true or false is needed")
        return default

    def unknown(self, known: Collection[str]) -> None:
        """An offence for every key that is not known. Null asks for nothing."""
        strange = [key for key, value in self.data.items() if key not in known and value is not None]
        for key in strange[:_MOST_LINES]:
            value = as_written(self.data[key])
            self.offend(
                f"{as_written(key)[1:-1]} = {value} is not known to partinf and may change the result; delete the key if it does not"
            )
        if strange[_MOST_LINES:]:
            self.offend(f"{len(strange) - _MOST_LINES} more keys are not known")
