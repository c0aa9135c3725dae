"""Flags read into values, so that everything that is wrong on a command line is reported at once.

argparse stops at the first value that it cannot convert, so commands declare every flag as text and read it here, with its range. What is
wrong joins one list, to which a command adds what it finds itself; `check` raises it before anything is made or touched. A flag that takes
one value and is given again is wrong, too: one of the values would be dropped, and it is unclear which was meant.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from partinf.foundation.errors import T, collect, nearest, raise_offences
from partinf.foundation.limits import number_of, whole_of

E = TypeVar("E", bound=StrEnum)
FORMATS = ("table", "json")
_MOST = (1 << 63) - 1  # stands for no bound
ANY = (-_MOST, _MOST)
"""The range of a number whose own range is known to what takes it."""


class Flags:
    """The values of a command's flags, by the names that argparse gives them.

    A value that is wrong is replaced by the number of its range that is nearest to 0, or the first of its words, so that reading goes on.

    Attributes:
        args: the texts. offences: what is wrong so far.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        given: dict[str, list[tuple[str, str]]] = getattr(args, _GIVEN, {})
        self._spelt = {name: values[-1][0] for name, values in given.items()}
        self.offences = [_again(values) for values in given.values() if len(values) > 1]

    def flag(self, name: str) -> str:
        """How the flag is spelt."""
        return self._spelt.get(name, f"--{name.replace('_', '-')}")

    def given(self, name: str) -> bool:
        """Whether a flag of one value stands on the command line."""
        return name in getattr(self.args, _GIVEN, ())

    def whole(self, name: str, low: int = 0, high: int = _MOST) -> int:
        """A whole number of a range, in decimal digits."""
        found = self.optional_whole(name, low, high)
        return max(low, 0) if found is None else found

    def optional_whole(self, name: str, low: int = 0, high: int = _MOST) -> int | None:
        """The same for a flag that may be absent."""
        text = getattr(self.args, name)
        value = None if text is None else whole_of(text)
        if text is None or (value is not None and low <= value <= high):
            return value
        self.refuse(name, f"a whole number is needed{_between(low, high)}")
        return None

    def number(self, name: str, low: float = 0.0, high: float = _MOST, above: bool = False) -> float:
        """A finite number of a range, which does not hold its lower end if `above`."""
        found = self.optional_number(name, low, high, above)
        return max(low, 0.0) if found is None else found

    def optional_number(self, name: str, low: float = 0.0, high: float = _MOST, above: bool = False) -> float | None:
        """The same for a flag that may be absent."""
        text = getattr(self.args, name)
        value = None if text is None else number_of(text)
        if text is None or (value is not None and low <= value <= high and not (above and value == low)):
            return value
        positive = above and not low
        self.refuse(
            name, f"a positive number is needed{_between(-_MOST, high)}" if positive else f"a number is needed{_between(low, high)}"
        )
        return None

    def word(self, name: str, words: Collection[str]) -> str:
        """One of some words; of many, the nearest is named."""
        found = self.optional_word(name, words)
        return next(iter(words)) if found is None else found

    def optional_word(self, name: str, words: Collection[str]) -> str | None:
        """The same for a flag that may be absent."""
        text: str | None = getattr(self.args, name)
        if text is None or text in words:
            return text
        close = nearest(text, words)
        self.refuse(name, f"valid: {', '.join(words)}" + (close if close.startswith("; did") else ""))
        return None

    def member(self, name: str, kind: type[E]) -> E:
        """A member of an enumeration."""
        return kind(self.word(name, [one.value for one in kind]))

    def optional_member(self, name: str, kind: type[E]) -> E | None:
        """The same for a flag that may be absent."""
        found = self.optional_word(name, [one.value for one in kind])
        return None if found is None else kind(found)

    def target(self, name: str) -> Path | None:
        """A file that will be written, in a directory that is there; None where the flag is absent."""
        text = getattr(self.args, name)
        if text is None:
            return None
        path = Path(text)
        try:
            folder, there = path.absolute().parent, path.absolute().parent.is_dir()
            if path.is_dir():
                self.refuse(name, "a directory; a file is needed")
        except (OSError, ValueError):
            self.refuse(name, "not a file name")
            return path
        if not there:
            self.refuse(name, f"there is no directory {folder}")
        return path

    def collect(self, make: Callable[[], T]) -> T | None:
        """What `make` returns; None where it raises `InvalidInput`, whose offences join the others."""
        return collect(self.offences, make)

    def refuse(self, name: str, why: str) -> None:
        """Add an offence about a flag's value."""
        self.offences.append(f"{self.flag(name)} {getattr(self.args, name)}: {why}")

    def check(self, others: Iterable[str] = ()) -> None:
        """Raise every offence so far, and others.

        Raises:
            InvalidInput: if there is any offence.
        """
        raise_offences([*self.offences, *others])

    def need(self, value: T | None) -> T:
        """The value, or every offence so far: where it is None, one of them says why."""
        self.check()
        assert value is not None
        return value


def register(parser: argparse.ArgumentParser) -> None:
    """Let the parser's flags of one value notice that they are given again, for `Flags` to refuse."""
    parser.register("action", None, _Once)
    parser.register("action", "store", _Once)


_GIVEN = "given_flags"


class _Once(argparse.Action):
    """Stores the one value of a flag, and keeps how often it was given."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if option is not None:
            text = " ".join(values) if isinstance(values, list) else str(values)
            _give(namespace, self.dest, option, f"{option} {text}")
        setattr(namespace, self.dest, values)


class OnOff(argparse.BooleanOptionalAction):
    """A flag `--this` or `--no-this`, of which one may be given, once."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if option is not None:
            _give(namespace, self.dest, self.option_strings[0], option)
        super().__call__(parser, namespace, values, option)


def _give(namespace: argparse.Namespace, name: str, spelt: str, words: str) -> None:
    vars(namespace).setdefault(_GIVEN, {}).setdefault(name, []).append((spelt, words))


def _again(given: list[tuple[str, str]]) -> str:
    words = [each for _, each in given]
    return f"{given[0][0]} is given {len(given)} times: {' · '.join(words)}; give it once"


def _between(low: float, high: float) -> str:
    least, most = (f"{bound:,}" if isinstance(bound, int) else f"{bound:g}" for bound in (low, high))
    if low > -_MOST and high < _MOST:
        return f", from {least} to {most}"
    return f", at least {least}" if low > -_MOST else f", at most {most}" if high < _MOST else ""
