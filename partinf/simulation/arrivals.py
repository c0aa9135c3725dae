"""Requests that come over time: when, how long the prompt, how long the answer. Drawn from a seed, or read from a recorded trace."""

from __future__ import annotations

import csv
import io
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from partinf.foundation import documents
from partinf.foundation.documents import shown
from partinf.foundation.errors import InvalidInput, raise_offences
from partinf.foundation.limits import (
    MAX_LEN,
    MAX_RATE,
    MAX_REQUESTS,
    MAX_SECONDS,
    MAX_VARIATION,
    MIN_RATE,
    MIN_VARIATION,
    not_whole,
    number_of,
    outside,
    whole_of,
)

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_COUNT = re.compile(r"([0-9]{1,18})(\.0*)?")
_LISTED = 10

# Quantiles of a public table of ShareGPT lengths after FastServe's filter: prompt ≤ 1024 tokens, prompt and answer together ≤ 2048.
_CHAT_RANKS = (0.0, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)
_CHAT_INPUT = (4, 15, 23, 61, 297, 667, 878, 949, 1009, 1024)
_CHAT_OUTPUT = (4, 33, 62, 179, 399, 608, 816, 906, 994, 1024)
_CHAT_TOTAL = 2048


@dataclass(frozen=True)
class Arrival:
    """One request.

    Attributes:
        time: seconds from the start. input_len: prompt tokens. output_len: tokens that it generates.
    """

    time: float
    input_len: int
    output_len: int


Lengths = Callable[[random.Random], tuple[int, int]]
"""Draws (input_len, output_len)."""


def uniform_lengths(input_range: tuple[int, int], output_range: tuple[int, int]) -> Lengths:
    """Both uniform, ends included."""
    return lambda rng: (rng.randint(*input_range), rng.randint(*output_range))


def chat_lengths(rng: random.Random) -> tuple[int, int]:
    """Lengths of conversations: both drawn from a table of quantiles, independently, again while they are too long together."""
    while True:
        lens = _quantile(_CHAT_INPUT, rng.random()), _quantile(_CHAT_OUTPUT, rng.random())
        if sum(lens) <= _CHAT_TOTAL:
            return lens


def parse_lengths(text: str) -> Lengths:
    """Read `uniform:32-512:1-128`, `fixed:512:64` or `chat`.

    Raises:
        InvalidInput: anything else, or lengths below 1.
    """
    kind, *parts = text.split(":")
    if kind == "chat" and not parts:
        return chat_lengths
    try:
        if kind == "fixed" and len(parts) == 2:
            ranges = [(_length(part), _length(part)) for part in parts]
        elif kind == "uniform" and len(parts) == 2:
            ranges = [(_length(low), _length(high)) for low, _, high in (part.partition("-") for part in parts)]
        else:
            raise ValueError
    except ValueError:
        raise InvalidInput(f"lengths '{text}': valid: chat, fixed:INPUT:OUTPUT, uniform:LOW-HIGH:LOW-HIGH (prompt, answer)") from None
    if any(not 1 <= low <= high for low, high in ranges):
        raise InvalidInput(f"lengths '{text}': lengths are at least 1, and ranges go upwards")
    if sum(high for _, high in ranges) > MAX_LEN:
        raise InvalidInput(f"lengths '{text}': prompt and answer have at most {MAX_LEN:,} tokens together")
    return uniform_lengths(ranges[0], ranges[1])


def parse_arrivals(text: str, lengths: Lengths, num_requests: int | None, seed: int = 0) -> list[Arrival]:
    """Read `poisson:RATE`, `gamma:RATE:CV`, `backlog` (all at once) or `trace:FILE`, and make the requests, in order of time.

    Args:
        lengths: of drawn requests; a trace brings its own.
        num_requests: how many; None is 1000, or the whole trace.

    Raises:
        InvalidInput: anything else, rates that are not positive, or a file that is no trace.
    """
    count = 1000 if num_requests is None else num_requests
    kind, _, rest = text.partition(":")
    if kind == "trace" and rest:
        return read_trace(Path(rest), num_requests)
    raise_offences(not_whole("requests", count, 1, MAX_REQUESTS))
    parts = rest.split(":") if rest else []
    numbers = [value for part in parts if (value := number_of(part)) is not None and value > 0]
    if (kind, len(parts)) not in {("poisson", 1), ("gamma", 2), ("backlog", 0)} or len(numbers) < len(parts):
        raise InvalidInput(
            f"arrivals '{text}': valid: poisson:RATE, gamma:RATE:CV (requests per second and coefficient of variation, both positive), "
            "backlog, trace:FILE"
        )
    ranges = (("rate", MIN_RATE, MAX_RATE), ("coefficient of variation", MIN_VARIATION, MAX_VARIATION))
    given = zip(numbers, ranges, strict=False)
    raise_offences(line for value, (name, low, high) in given for line in outside(f"arrivals '{text}': {name}", value, low, high))
    rng = random.Random(seed)
    if kind == "backlog":
        times: Iterator[float] = itertools.repeat(0.0)
    else:
        times = itertools.accumulate(gaps(rng, *numbers))
    lens = random.Random(f"{seed}/lengths")  # the same requests at every rate
    return [Arrival(time, *lengths(lens)) for time in itertools.islice(times, count)]


def gaps(rng: random.Random, rate: float, cv: float = 1.0) -> Iterator[float]:
    """Times between arrivals: gamma distributed with mean 1/rate and this coefficient of variation; exponential where that is 1."""
    shape = 1 / cv**2
    while True:
        yield rng.expovariate(rate) if cv == 1 else rng.gammavariate(shape, 1 / (rate * shape))


def read_trace(path: Path, num_requests: int | None = None) -> list[Arrival]:
    """Read a recorded trace with the columns of the Azure traces, TIMESTAMP, ContextTokens, GeneratedTokens; other columns are left alone.

    Counts are whole numbers (also as 1.0); 0 counts as 1. Stamps have a zone all of them or none of them.

    Raises:
        InvalidInput: no such file, other columns, or lines that cannot be read (the first ten).
    """
    where = f"trace {path}"
    rows = csv.reader(io.StringIO(documents.read_text(path, where), newline=""), skipinitialspace=True)
    offences: list[str] = []
    found: list[tuple[datetime, int, int]] = []
    try:
        places = _columns([name.strip() for name in next(rows, [])], where)
        for fields in rows:
            if not fields:
                continue
            if len(found) == MAX_REQUESTS:
                raise InvalidInput(f"{where}: more than {MAX_REQUESTS:,} requests, which is the most that is served; cut the file")
            try:
                found.append(_request(fields, places, found))
            except ValueError as error:
                offences.append(f"{where}, line {rows.line_num}: {','.join(fields)[:80]} cannot be read: {error}")
                if len(offences) == _LISTED:
                    break
    except csv.Error as error:
        offences.append(f"{where}, line {rows.line_num}: {error}")
    if offences or not found:
        raise InvalidInput(offences or f"{where}: no request in it")
    found.sort(key=lambda row: row[0])
    start = found[0][0]
    arrivals = [Arrival((when - start).total_seconds(), *lens) for when, *lens in found[:num_requests]]
    raise_offences(outside(f"{where}: seconds from the first request to the last", arrivals[-1].time, 0, MAX_SECONDS))
    return arrivals


def _columns(names: list[str], where: str) -> dict[str, int]:
    """Column → its place; one entry more says how many fields a line has."""
    missing = [column for column in _COLUMNS if column not in names]
    if missing:
        raise InvalidInput(f"{where}: no column {', '.join(missing)}; a trace has {', '.join(_COLUMNS)}")
    twice = [column for column in _COLUMNS if names.count(column) > 1]
    if twice:
        raise InvalidInput(f"{where}: column {', '.join(twice)} stands there twice")
    return {column: names.index(column) for column in _COLUMNS} | {"": len(names)}


def _request(fields: list[str], places: Mapping[str, int], before: Sequence[tuple[datetime, int, int]]) -> tuple[datetime, int, int]:
    """Stamp and counts of a line. ValueError: why it has none."""
    if len(fields) != places[""]:
        raise ValueError(f"{len(fields)} fields, where the first line names {places['']}")
    stamp, *counts = (fields[places[column]].strip() for column in _COLUMNS)
    try:
        when = datetime.fromisoformat(stamp)
    except ValueError:
        raise ValueError(f"{shown(stamp)} is no time in ISO format") from None
    if before and (when.tzinfo is None) != (before[0][0].tzinfo is None):
        raise ValueError("some stamps have a time zone and some have none, so that their order is unknown")
    prompt, answer = (max(1, _count(text)) for text in counts)
    return when, prompt, answer


def _length(text: str) -> int:
    found = whole_of(text)
    if found is None:
        raise ValueError
    return found


def _count(text: str) -> int:
    match = _COUNT.fullmatch(text)
    if match is None or not int(match[1]) <= MAX_LEN:
        raise ValueError(f"{shown(text)} is not a number of tokens; expected a whole number from 0 to {MAX_LEN:,}")
    return int(match[1])


def _quantile(values: tuple[int, ...], rank: float) -> int:
    """The value at a rank in 0..1, linear between the table's entries."""
    index = max(i for i, low in enumerate(_CHAT_RANKS[:-1]) if low <= rank)
    share = (rank - _CHAT_RANKS[index]) / (_CHAT_RANKS[index + 1] - _CHAT_RANKS[index])
    return round(values[index] + share * (values[index + 1] - values[index]))
