"""Requests that come over time: when, how long the prompt, how long the answer. Drawn from a seed, or read from a recorded trace."""

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from partinf.errors import InvalidInput

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

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
            ranges = [(int(part), int(part)) for part in parts]
        elif kind == "uniform" and len(parts) == 2:
            ranges = [(int(low), int(high)) for low, _, high in (part.partition("-") for part in parts)]
        else:
            raise ValueError
    except ValueError:
        raise InvalidInput(f"lengths '{text}': valid: chat, fixed:INPUT:OUTPUT, uniform:LOW-HIGH:LOW-HIGH (prompt, answer)") from None
    if any(not 1 <= low <= high for low, high in ranges):
        raise InvalidInput(f"lengths '{text}': lengths are at least 1, and ranges go upwards")
    return uniform_lengths(ranges[0], ranges[1])


def parse_arrivals(text: str, lengths: Lengths, num_requests: int | None, seed: int = 0) -> list[Arrival]:
    """Read `poisson:RATE`, `gamma:RATE:CV`, `backlog` (all at once) or `trace:FILE`, and make the requests, in order of time.

    Args:
        lengths: of drawn requests; a trace brings its own.
        num_requests: how many; None is 1000, or the whole trace.

    Raises:
        InvalidInput: anything else, rates that are not positive, or a file that is no trace.
    """
    kind, _, rest = text.partition(":")
    if kind == "trace" and rest:
        return read_trace(Path(rest), num_requests)
    try:
        numbers = [float(part) for part in rest.split(":")] if rest else []
    except ValueError:
        numbers = [-1.0]
    if (kind, len(numbers)) not in {("poisson", 1), ("gamma", 2), ("backlog", 0)} or any(not number > 0 for number in numbers):
        raise InvalidInput(
            f"arrivals '{text}': valid: poisson:RATE, gamma:RATE:CV (requests per second and coefficient of variation, both positive), "
            "backlog, trace:FILE"
        )
    rng = random.Random(seed)
    if kind == "backlog":
        times: Iterator[float] = itertools.repeat(0.0)
    else:
        times = itertools.accumulate(gaps(rng, numbers[0], numbers[1] if kind == "gamma" else 1.0))
    lens = random.Random(f"{seed}/lengths")  # the same requests at every rate
    return [Arrival(time, *lengths(lens)) for time in itertools.islice(times, num_requests or 1000)]


def gaps(rng: random.Random, rate: float, cv: float = 1.0) -> Iterator[float]:
    """Times between arrivals: gamma distributed with mean 1/rate and this coefficient of variation; exponential where that is 1."""
    shape = 1 / cv**2
    while True:
        yield rng.expovariate(rate) if cv == 1 else rng.gammavariate(shape, 1 / (rate * shape))


def read_trace(path: Path, num_requests: int | None = None) -> list[Arrival]:
    """Read a recorded trace with the columns of the Azure traces, TIMESTAMP, ContextTokens, GeneratedTokens.

    Raises:
        InvalidInput: no such file, other columns, or lines that cannot be read (the first ten).
    """
    if not path.is_file():
        raise InvalidInput(f"trace {path}: no such file")
    offences: list[str] = []
    rows: list[tuple[datetime, int, int]] = []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise InvalidInput(f"trace {path}: no column {', '.join(missing)}; a trace has {', '.join(_COLUMNS)}")
        for number, row in enumerate(reader, start=2):
            try:
                when = datetime.fromisoformat(row["TIMESTAMP"])
                rows.append((when, max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"]))))
            except (TypeError, ValueError):
                offences.append(f"trace {path}, line {number}: {','.join(str(row[column]) for column in _COLUMNS)} cannot be read")
    if offences or not rows:
        raise InvalidInput(offences[:10] or f"trace {path}: no request in it")
    rows.sort(key=lambda row: row[0])
    start = rows[0][0]
    return [Arrival((when - start).total_seconds(), *lens) for when, *lens in rows[:num_requests]]


def _quantile(values: tuple[int, ...], rank: float) -> int:
    """The value at a rank in 0..1, linear between the table's entries."""
    index = max(i for i, low in enumerate(_CHAT_RANKS[:-1]) if low <= rank)
    share = (rank - _CHAT_RANKS[index]) / (_CHAT_RANKS[index + 1] - _CHAT_RANKS[index])
    return round(values[index] + share * (values[index + 1] - values[index]))
