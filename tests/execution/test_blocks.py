"""What blocks of newer families change, each feature partitioned against the reference and in both accounts."""

from __future__ import annotations

import dataclasses

import pytest

from partinf.layout import make_layout
from tests.execution import test_two_accounts as accounts
from tests.execution.assignments import BLOCKS
from tests.execution.harness import MODEL, TOLERANCE, largest_error, make_plan

MIXED = make_layout(
    {"x": "embed", "y": "ffn", "z": "ffn"},
    {"x": "sequence", "y": "heads", "z": "batch"},
    {"x": "heads", "y": "heads", "z": "none"},
    prefill_gather=["x", "y"],
)


@pytest.mark.parametrize("head_dim", [8, 16])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block(block: str, head_dim: int) -> None:
    model = dataclasses.replace(MODEL, name=f"{block} {head_dim}", head_dim=head_dim, **BLOCKS[block])
    assert largest_error(make_plan("2x2x2", MIXED, model)) < TOLERANCE["f32"]


@pytest.mark.parametrize("block", BLOCKS)
def test_both_accounts_of_every_block(block: str) -> None:
    model = dataclasses.replace(accounts.MODEL, **BLOCKS[block])
    accounts.check(accounts.make_plan("2x2x2", MIXED, model=model), accounts.BUCKETS["mixed"])
