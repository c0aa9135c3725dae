"""Rounding up, and that it is written once."""

from __future__ import annotations

import ast
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import partinf
from partinf.foundation.rounding import ceil_div, round_up

# Where a quotient may be rounded up by hand, and why.
ELSEWHERE = {"checkpoint/tokenizer/length.py": "of an array of counts by an array of sizes"}


@given(st.integers(-1000, 1000), st.integers(1, 50))
def test_parts_and_multiples(count: int, size: int) -> None:
    assert (ceil_div(count, size) - 1) * size < count <= ceil_div(count, size) * size
    assert round_up(count, size) == ceil_div(count, size) * size


def test_no_other_module_rounds_up_by_hand() -> None:
    package = Path(partinf.__file__).parent
    found = {}
    for path in package.rglob("*.py"):
        quotients = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.UnaryOp)
            and isinstance(node.op, ast.USub)
            and isinstance(node.operand, ast.BinOp)
            and isinstance(node.operand.op, ast.FloorDiv)
        ]
        if quotients:
            found[path.relative_to(package).as_posix()] = quotients
    assert found.keys() == ELSEWHERE.keys() | {"foundation/rounding.py"}, found
