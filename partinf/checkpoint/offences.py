"""Readable lists of what is wrong with many named tensors.

A configuration with the wrong number of layers makes hundreds of offences that differ in one number. They are one offence to the reader:
names that differ only in their numbers and share a complaint become one line with ranges.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Shapes = Mapping[str, tuple[int, ...]]
_MOST_LINES = 50  # of one kind: a directory of another model has a complaint for every tensor
_NUMBER = re.compile(r"(?<=[./])\d+(?=[./])")


def _ranges(numbers: Iterable[int]) -> str:
    """`0-2,5` for 0, 1, 2, 5."""
    ordered = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def condense(complaints: Iterable[tuple[str, str]]) -> list[str]:
    """One sentence per complaint (name, text), where names that differ in their numbers alone, of layers and experts, share a sentence."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, text in complaints:
        groups.setdefault((_NUMBER.sub("#", name), text), []).append(name)
    lines = []
    for (pattern, text), names in groups.items():
        count = "" if len(names) == 1 else f" ({len(names)} tensors)"
        columns = zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True)
        for numbers in map(_ranges, columns):
            pattern = pattern.replace("#", numbers if numbers.isdecimal() else f"[{numbers}]", 1)
        lines.append(f"{pattern}: {text}{count}")
    return lines if len(lines) <= _MOST_LINES else [*lines[:_MOST_LINES], f"{len(lines) - _MOST_LINES} more lines of this kind"]


def compare_shapes(found: Shapes, expected: Shapes, found_in: str, expected_by: str) -> list[str]:
    """Offences of one tree of arrays against another, both given as path → shape."""
    complaints = []
    for path, shape in expected.items():
        if path not in found:
            complaints.append((path, f"missing in {found_in}; {expected_by} expects shape {shape}"))
        elif found[path] != shape:
            complaints.append((path, f"found shape {found[path]} in {found_in}; {expected_by} expects {shape}"))
    for path, shape in found.items():
        if path not in expected:
            complaints.append((path, f"found in {found_in} with shape {shape}; {expected_by} has no such leaf"))
    return condense(complaints)
