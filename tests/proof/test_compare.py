"""What the compiler changed is classified and priced."""

from __future__ import annotations

from collections import Counter

import pytest

from partinf.proof.compare import Key, differences
from partinf.proof.proving import refused_bytes
from partinf.proof.report import Collective


def compiled(op: str, axes: str, num_bytes: int, count: int, requested: str = "", merged: int = 1) -> Collective:
    seconds = price(op, tuple(axes), num_bytes)
    return Collective(op, tuple(axes), "bfloat16", num_bytes, count, seconds, 0.0, "ffn.py:1 ffn", requested or op, merged)


def price(op: str, axes: tuple[str, ...], num_bytes: int) -> float:
    """One second per byte, twice for an all-reduce."""
    return num_bytes * (2.0 if op == "all-reduce" else 1.0)


def planned(*entries: tuple[str, str, int, int]) -> Counter[Key]:
    return Counter({Key(op, tuple(axes), "bfloat16", num_bytes): count for op, axes, num_bytes, count in entries})


def test_equal_programs_have_no_differences() -> None:
    assert differences(planned(("all-gather", "yz", 64, 118)), [compiled("all-gather", "yz", 64, 118)], price) == ()


def test_a_scatter_that_became_a_reduce_costs_the_difference() -> None:
    found = differences(planned(("reduce-scatter", "x", 64, 118)), [compiled("all-reduce", "x", 64, 118, "reduce-scatter")], price)
    assert [(d.kind, d.count, d.seconds) for d in found] == [("reduce-scatter turned all-reduce", 118, 118 * 64.0)]


@pytest.mark.parametrize("size, count, kind", [(128, 1, "merged collectives"), (160, 1, "padding"), (16, 2, "other collective")])
def test_other_pieces_of_the_same_kind(size: int, count: int, kind: str) -> None:
    (found,) = differences(planned(("all-gather", "x", 64, 2)), [compiled("all-gather", "x", size, count)], price)
    assert (found.kind, found.seconds) == (kind, size * count - 128)


def test_what_has_no_explanation_is_listed() -> None:
    found = differences(planned(("all-to-all", "x", 64, 1)), [compiled("collective-permute", "y", 32, 3)], price)
    assert {(d.kind, d.count, d.seconds) for d in found} == {("eliminated", 1, -64.0), ("other collective", 3, 96.0)}


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required (33.20G) exceeds available HBM (30.75G).",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.20G of 30.75G hbm. Exceeded hbm capacity by 2.45G.",
    ],
)
def test_the_figures_of_a_refusal(message: str) -> None:
    assert refused_bytes(message) == (int(33.20 * 2**30), int(30.75 * 2**30))
    assert refused_bytes("RESOURCE_EXHAUSTED: no figures") == (0, 0)
