"""Figures as people read them: four digits, thousands apart, no exponent, and a unit that leaves few digits."""

from __future__ import annotations


def figures(value: float) -> str:
    """`0.1234`, `12.3`, `14,130`: four significant digits, never an exponent for what is large."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def column_figures(value: float) -> str:
    """The same for a column, trailing zeros kept: `33.70` above `33.38`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit in which a column of times like this one is read, and how many seconds it is: ms up to ten seconds, then s."""
    return ("s", 1.0) if seconds >= 10 else ("ms", 1e-3)


def readable_seconds(seconds: float) -> str:
    """`28.3 ms`."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{figures(seconds / scale)} {unit}"
    return f"{seconds * 1e6:.1f} µs"


def readable_bytes(size: float) -> str:
    """`18.3 MB`."""
    if size < 0:
        return f"-{readable_bytes(-size)}"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size < 1000 * scale else f"{size / scale:,.0f} {unit}"
    return f"{size:.0f} B"


def counted(count: int, what: str) -> str:
    """`1 layout`, `1,540 layouts`."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")
