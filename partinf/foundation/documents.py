"""Files that users hand over, read as bytes, text, TOML or JSON, and their tables taken apart with every type checked.

One home for what every reader needs: any file may be given for any other (weights for a plan, a directory, a page that a download was
answered with, half a gigabyte of nested brackets), and each must end in `InvalidInput` with a line that says what is wrong. Nothing in
this module raises anything else, and nothing of unbounded size is made on the way. A reader opens a file with `read_toml`, `read_json`
or `read_text`, wraps what it gets in `Table`, asks for each key by its type, calls `refuse_unknown`, and raises the offences at once:

    table = Table(read_toml(path), str(path), offences)
    batch = table.whole("batch", default=1, low=1, high=MAX_BATCH)
    kind = table.choice("weights", DType, default=DType.BF16)
    table.refuse_unknown()
    raise_offences(offences)
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from partinf.foundation.errors import InvalidInput, nearest

E = TypeVar("E", bound=StrEnum)

TEXT_BYTES: Final = 64 << 20  # what a command takes as text: prompts, traces, results
TOML_BYTES: Final = 1 << 18  # files that people write; the parser takes a second for so many
MAX_NESTING: Final = 64  # of tables and lists; code that walks them recursively stays far from the interpreter's own bound

_REQUIRED: Any = object()
_MISSING: Any = object()
# A dotted key is a table within a table for every dot, and the parser takes time in proportion to the square of their number.
_LONG_KEY = re.compile(r"""(?<![\w"'-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){""" + f"{MAX_NESTING}}}")
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")
_KINDS: Final = (
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file; `git lfs pull` fetches it"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
    (b"<", "an HTML or XML page"),
)


def read_bytes(path: Path, where: str | None = None, most: int = TEXT_BYTES) -> bytes:
    """The content of a file, a pipe or a device.

    Args:
        where: how messages name it; the path by default. most: how many bytes are taken.

    Raises:
        InvalidInput: there is no such file, it is a directory, it may not be read, or it has more bytes.
    """
    name = str(path) if where is None else where
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except IsADirectoryError:
        raise InvalidInput(f"{name}: a directory; a file is needed") from None
    except FileNotFoundError:
        target = f"a link to {os.readlink(path)}, which is not there" if path.is_symlink() else "no such file"
        raise InvalidInput(f"{name}: {target}") from None
    except ValueError:
        raise InvalidInput(f"{name!r}: no such file; the name has a character that no name has") from None
    except OSError as error:
        raise InvalidInput(f"{name}: it cannot be read: {(error.strerror or str(error)).lower()}") from None
    return _bounded(data, name, most)


def read_stream(stream: BinaryIO, where: str) -> str:
    """The text of an open stream, such as standard input, in UTF-8.

    Raises:
        InvalidInput: bytes that are no UTF-8, or more of them.
    """
    return text_of(_bounded(stream.read(TEXT_BYTES + 1), where, TEXT_BYTES), where)


def read_text(path: Path, where: str | None = None, most: int = TEXT_BYTES) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Raises:
        InvalidInput: as `read_bytes`, or bytes that are no UTF-8 (which, and where).
    """
    return text_of(read_bytes(path, where, most), str(path) if where is None else where)


def read_toml(path: Path, where: str | None = None) -> dict[str, Any]:
    """The table of a TOML file.

    Raises:
        InvalidInput: as `read_text`, or what is no TOML.
    """
    return toml_of(read_text(path, where, TOML_BYTES), str(path) if where is None else where)


def read_json(path: Path, most: int = TEXT_BYTES) -> Any:
    """The value of a JSON file.

    Raises:
        InvalidInput: as `read_text`, or what is no JSON.
    """
    return json_of(read_bytes(path, most=most), str(path))


def is_file(name: str | Path) -> bool:
    """Whether there is such a file (or pipe, or device); False for whatever is no name of a file."""
    try:
        return Path(name).exists() and not Path(name).is_dir()
    except (OSError, ValueError):
        return False


def is_directory(name: str | Path) -> bool:
    """Whether there is such a directory; False for whatever is no name of one."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def text_of(data: bytes, where: str) -> str:
    """Bytes as UTF-8 text, without a byte order mark.

    Raises:
        InvalidInput: bytes that are no UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        line = data.count(b"\n", 0, start) + 1
        raise InvalidInput(f"{where}: no UTF-8 text: byte 0x{data[start]:02x} in line {line}{looks_like(data)}") from None


def toml_of(text: str, where: str) -> dict[str, Any]:
    """The table that a TOML text describes.

    Raises:
        InvalidInput: what is no TOML, tables nested deeper than `MAX_NESTING`, a text of more than `TOML_BYTES`.
    """
    if len(text) > TOML_BYTES:
        raise InvalidInput(f"{where}: more than {TOML_BYTES:,} characters, which is the most that is read of a TOML file")
    if _LONG_KEY.search(text):
        raise InvalidInput(_too_deep(where))
    try:
        found = tomllib.loads(text)
    except RecursionError:
        raise InvalidInput(_too_deep(where)) from None
    except ValueError as error:  # besides tomllib's own errors, that of numbers with thousands of digits
        raise InvalidInput(f"{where}: not a TOML file: {_first_line(error)}{looks_like(text[:64].encode(errors='replace'))}") from None
    _check_nesting(found, where)
    return found


def json_of(text: str | bytes, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        InvalidInput: what is no JSON, keys that stand twice, half a surrogate pair, nesting deeper than `MAX_NESTING`.
    """
    if isinstance(text, bytes):
        text = text_of(text, where)
    twice: list[str] = []

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            twice.extend(key for key in made if keys.count(key) > 1)
        return made

    try:
        found = json.loads(text, object_pairs_hook=table)
    except RecursionError:
        raise InvalidInput(_too_deep(where)) from None
    except ValueError as error:
        raise InvalidInput(f"{where}: not JSON: {_first_line(error)}{looks_like(text[:64].encode(errors='replace'))}") from None
    if twice:
        raise InvalidInput(f"{where}: a key stands twice in one object: {', '.join(map(shown, twice[:3]))}")
    halves = "\\ud" in text.lower()
    _check_nesting(found, where, halves)
    return found


def shown(value: Any, most: int = 60) -> str:
    """A value as a message prints it: on one line, cut where it is long."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"{'-' if value < 0 else ''}(a whole number of {int(value.bit_length() * math.log10(2)) + 1} digits)"
    if isinstance(value, dict):
        value = dict(list(value.items())[:8])
    elif isinstance(value, list | tuple):
        value = list(value[:16])
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits within, or what was nested by code
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else text[: most - 1] + "…"


class Table:
    """One table of a file, whose values are read by type; whatever is wrong joins a list of offences.

    A value that is missing or wrong is replaced by its default, or by the simplest value of its type, so that the reader goes on and
    finds the other offences; it must raise them before it uses what it read.

    Attributes:
        data: the table. where: how messages name it, `file [section]`. offences: what is wrong so far.
    """

    def __init__(self, data: Any, where: str, offences: list[str]) -> None:
        self.where, self.offences = where, offences
        self._asked: dict[str, None] = {}
        if not isinstance(data, Mapping):
            offences.append(f"{where}: {shown(data)}; expected a table")
            data = {}
        self.data: Mapping[str, Any] = data

    def __contains__(self, key: str) -> bool:
        """Whether the key is there; it counts as read."""
        self._asked[key] = None
        return key in self.data

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._of(key, default, "", "a string", lambda value: value if isinstance(value, str) else _MISSING)

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._of(key, default, False, "true or false", lambda value: value if isinstance(value, bool) else _MISSING)

    def whole(self, key: str, default: Any = _REQUIRED, low: int = 0, high: int = (1 << 63) - 1) -> Any:
        """A whole number of a range; 8.0 is none."""

        def take(value: Any) -> Any:
            return value if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high else _MISSING

        return self._of(key, default, max(low, 1) if high else low, f"a whole number {_range(low, high)}", take)

    def number(self, key: str, default: Any = _REQUIRED, low: float = 0.0, high: float = math.inf, infinite: bool = False) -> Any:
        """A finite number of a range; or infinity if `infinite`."""

        def take(value: Any) -> Any:
            if infinite and value == math.inf:
                return math.inf
            found = finite(value)
            return found if found is not None and low <= found <= high else _MISSING

        return self._of(key, default, max(low, 1.0), f"a number {_range(low, high)}", take)

    def choice(self, key: str, kind: type[E], default: Any = _REQUIRED) -> Any:
        """One of the words of an enumeration."""
        words = [member.value for member in kind]

        def take(value: Any) -> Any:
            return kind(value) if isinstance(value, str) and value in words else _MISSING

        return self._of(key, default, next(iter(kind)), f"one of {', '.join(words)}", take)

    def texts(self, key: str, default: Any = _REQUIRED) -> Any:
        """A list of strings, as a tuple."""

        def take(value: Any) -> Any:
            return tuple(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else _MISSING

        return self._of(key, default, (), "a list of strings", take)

    def subset(self, key: str, words: tuple[str, ...], default: Any = _REQUIRED) -> Any:
        """Some of these words, as a tuple in their order: a list of them, true for all, false for none."""

        def take(value: Any) -> Any:
            if isinstance(value, bool):
                return words if value else ()
            right = isinstance(value, list) and all(isinstance(one, str) and one in words for one in value)
            return tuple(word for word in words if word in value) if right else _MISSING

        return self._of(key, default, (), f"true, false, or a list of some of {', '.join(words)}", take)

    def numbers(self, key: str, low: float = 0.0, high: float = math.inf) -> tuple[float, ...]:
        """A list of finite numbers of a range, as a tuple."""

        def take(value: Any) -> Any:
            found = [finite(one) for one in value] if isinstance(value, list) else [None]
            return tuple(one for one in found) if all(one is not None and low <= one <= high for one in found) else _MISSING

        found: tuple[float, ...] = self._of(key, _REQUIRED, (), f"a list of numbers, each {_range(low, high)}", take)
        return found

    def wholes(self, key: str, default: Any = _REQUIRED, low: int = 0, high: int = (1 << 63) - 1) -> Any:
        """A list of whole numbers of a range, as a tuple."""

        def take(value: Any) -> Any:
            right = isinstance(value, list) and all(
                isinstance(one, int) and not isinstance(one, bool) and low <= one <= high for one in value
            )
            return tuple(value) if right else _MISSING

        return self._of(key, default, (), f"a list of whole numbers, each {_range(low, high)}", take)

    def words(self, key: str, default: Any = _REQUIRED) -> Any:
        """A table of strings, such as a role for every axis."""

        def take(value: Any) -> Any:
            right = isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
            return value if right else _MISSING

        return self._of(key, default, {}, "a table of strings", take)

    def table(self, key: str, default: Any = _REQUIRED) -> Any:
        """A table within; an empty one where it is missing or something else. With a default, that where the key is missing."""
        found = self._of(key, default, {}, "a table", lambda value: value if isinstance(value, dict) else _MISSING)
        return Table(found, f"{self.where} [{key}]", self.offences) if isinstance(found, dict) else found

    def tables(self, key: str) -> list[Table]:
        """The tables of a list."""

        def take(value: Any) -> Any:
            return value if isinstance(value, list) and all(isinstance(one, dict) for one in value) else _MISSING

        rows = self._of(key, _REQUIRED, [], "a list of tables", take)
        return [Table(row, f"{self.where} [{key}]", self.offences) for row in rows]

    def refuse_unknown(self, others: Iterable[str] = ()) -> None:
        """An offence, with the nearest known key, for every key that was not read and is none of `others`."""
        known = {*self._asked, *others}
        strange = [key for key in self.data if key not in known]
        self.offences += [f"{self.where}: unknown key '{shown(key)[1:-1]}'{nearest(key[:100], known)}" for key in strange]

    def _of(self, key: str, default: Any, simplest: Any, expected: str, take: Callable[[Any], Any]) -> Any:
        self._asked[key] = None
        if key not in self.data:
            if default is not _REQUIRED:
                return default
            self.offences.append(f"{self.where}: '{key}' is missing; expected {expected}")
            return simplest
        found = take(self.data[key])
        if found is not _MISSING:
            return found
        self.offences.append(f"{self.where}: {key} = {shown(self.data[key])}; expected {expected}")
        return simplest if default is _REQUIRED or default is None else default


def finite(value: Any) -> float | None:
    """A finite number as a float; None for everything else, truth values and numbers beyond the range of a float among them."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _bounded(data: bytes, where: str, most: int) -> bytes:
    if len(data) > most:
        raise InvalidInput(f"{where}: more than {most:,} bytes, which is the most that is read of such a file")
    return data


def _range(low: float, high: float) -> str:
    if high in (math.inf, (1 << 63) - 1):
        return f"of at least {low:g}"
    return f"from {low:,} to {high:,}" if isinstance(high, int) else f"from {low:g} to {high:g}"


def _check_nesting(value: Any, where: str, halves: bool = False) -> None:
    """Raise `InvalidInput` for deep nesting, and for half a surrogate pair, which no text in UTF-8 has, where one may be."""
    level: list[Any] = [[value]]
    depth = 0
    while level:
        if depth > MAX_NESTING:
            raise InvalidInput(_too_deep(where))
        inner: list[Any] = []
        for one in level:
            inside = one.values() if isinstance(one, dict) else one
            texts = [*(one if isinstance(one, dict) else ()), *inside] if halves else ()
            if any(isinstance(text, str) and _HALF_A_PAIR.search(text) for text in texts):
                raise InvalidInput(f"{where}: half a surrogate pair (\\ud800 to \\udfff) in a text")
            inner += [each for each in inside if isinstance(each, dict | list)]
        level, depth = inner, depth + 1


def _too_deep(where: str) -> str:
    return f"{where}: nested deeper than {MAX_NESTING} levels"


def looks_like(data: bytes) -> str:
    """What a file is by its first bytes, as the end of a message; empty if unknown."""
    head = data.lstrip()
    for start, kind in _KINDS:
        if head.startswith(start):
            return f"; it looks like {kind}"
    if len(data) > 9 and data[8:9] == b"{":
        return "; it looks like a safetensors file"
    return ""


def _first_line(error: ValueError) -> str:
    line = str(error).partition("\n")[0]
    return "a whole number of thousands of digits" if line.startswith("Exceeds the limit") else line
