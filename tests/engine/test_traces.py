"""Recorded traces: what is read whatever tool wrote it, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from partinf.foundation.errors import InvalidInput
from partinf.foundation.limits import MAX_LEN
from partinf.simulation.arrivals import Arrival, chat_lengths, parse_arrivals, parse_lengths, read_trace

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def arrivals(tmp_path: Path, content: bytes | str, count: int | None = None) -> list[Arrival]:
    file = tmp_path / "trace.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_trace(file, count)


def offences(tmp_path: Path, content: bytes | str) -> str:
    with pytest.raises(InvalidInput) as error:
        arrivals(tmp_path, content)
    return "\n".join(error.value.offences)


@pytest.mark.parametrize(
    "content",
    [
        HEAD + "2023-11-16 18:15:46,374,44\n2023-11-16 18:15:45,5,0\n",
        "\ufeff" + HEAD + "2023-11-16 18:15:46,374,44\r\n2023-11-16 18:15:45,5,0",
        "TIMESTAMP, ContextTokens, GeneratedTokens\n2023-11-16 18:15:46, 374, 44\n\n2023-11-16 18:15:45 , 5 , 0\n",
        HEAD + '"2023-11-16T18:15:46Z",374.0,44.\n2023-11-16T19:15:45+01:00,5.0,0.0\n',
        "id,GeneratedTokens,TIMESTAMP,ContextTokens\na,44,2023-11-16 18:15:46,374\nb,0,2023-11-16 18:15:45,5\n",
    ],
)
def test_traces_of_several_writers_are_read_alike(tmp_path: Path, content: str) -> None:
    assert arrivals(tmp_path, content) == [Arrival(0.0, 5, 1), Arrival(1.0, 374, 44)]
    assert arrivals(tmp_path, content, 1) == [Arrival(0.0, 5, 1)]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("2023-11-16 18:15:46,-1,44", "line 2: 2023-11-16 18:15:46,-1,44 cannot be read: '-1' is not a number of tokens"),
        ("2023-11-16 18:15:46,1,44,9", "4 fields, where the first line names 3"),
        ("2023-11-16 18:15:46,1", "2 fields, where the first line names 3"),
        ("2023-11-16 18:15:46,1.5,44", "'1.5' is not a number of tokens"),
        ("2023-11-16 18:15:46,²,44", "'²' is not a number of tokens"),
        ("2023-11-16 18:15:46,١,44", "is not a number of tokens"),
        (f"2023-11-16 18:15:46,{MAX_LEN + 1},44", "a whole number from 0 to 16,777,216"),
        ("2023-11-16 18:15:46," + "9" * 10_000 + ",44", "is not a number of tokens"),
        (
            "2023-11-16 18:15:46,1,44\n2023-11-16 18:15:46Z,1,44",
            "line 3: 2023-11-16 18:15:46Z,1,44 cannot be read: some stamps have a",
        ),
        ("0001-01-01,1,1\n9999-01-01,1,1", "seconds from the first request to the last"),
        ("2023-11-16 18:15:46,1," + "x" * 200_000, "line 2"),
        ("", "no request in it"),
    ],
)
def test_lines_that_are_no_requests_are_named(tmp_path: Path, lines: str, words: str) -> None:
    assert words in offences(tmp_path, HEAD + lines)


def test_what_is_no_text_or_no_trace(tmp_path: Path) -> None:
    assert "byte 0xff in line 2" in offences(tmp_path, HEAD.encode() + b"2023-11-16 18:15:46,\xff,44")
    assert "column TIMESTAMP stands there twice" in offences(tmp_path, "TIMESTAMP," + HEAD + "a,b,c,d")
    assert len(offences(tmp_path, HEAD + "x,1,1\n" * 1000).splitlines()) == 10


@pytest.mark.parametrize(
    "text",
    ["gamma:1:1e-200", "gamma:1e300:1", "poisson:1e-300", "poisson:1e20", "poisson:1e400", "poisson:nan", "poisson:١", "poisson:1_0"],
)
def test_rates_by_which_no_time_can_be_drawn(text: str) -> None:
    with pytest.raises(InvalidInput, match=f"arrivals '{text}'"):
        parse_arrivals(text, chat_lengths, 5)


@pytest.mark.parametrize("text", ["gamma:1:0.001", "gamma:1:1000", "poisson:1e-6", "gamma:1e-6:1000", "poisson:1e9"])
def test_times_at_the_ends_of_the_ranges_go_upwards(text: str) -> None:
    times = [arrival.time for arrival in parse_arrivals(text, chat_lengths, 200)]
    assert times == sorted(times)
    assert times[-1] < float("inf")


def test_counts_and_lengths_out_of_range() -> None:
    with pytest.raises(InvalidInput, match="requests = 1000000001; it must be at most 1,000,000"):
        parse_arrivals("backlog", chat_lengths, 1_000_000_001)
    for text in ("fixed:16777216:1", "uniform:1-99999999999999999999:1-2", "fixed:²:1", "fixed:1:9" + "9" * 5000):
        with pytest.raises(InvalidInput, match=f"lengths '{text[:12]}"):
            parse_lengths(text)
