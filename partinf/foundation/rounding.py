"""Whole numbers rounded up: how many parts hold so many things, and the next multiple."""

from __future__ import annotations


def ceil_div(count: int, size: int) -> int:
    """The least number of parts of `size` that hold `count`, `⌈count / size⌉`."""
    return -(-count // size)


def round_up(count: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple
