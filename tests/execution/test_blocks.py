"""What blocks of newer families change, feature by feature: partitioned = reference, over role assignments, and both accounts agree."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from partinf.layout.files import make_layout
from partinf.transformer.compiler_partitioned import compile_partitioned
from partinf.workload import DType
from tests.execution import test_two_accounts as accounts
from tests.execution.assignments import (
    BLOCKS,
    LEAST_ALIKE,
    LOCAL_AND_GLOBAL,
    Assignment,
    assignments_of,
    least_alike,
    sampled_assignments,
)
from tests.execution.harness import MODEL, TOLERANCE, largest_error, make_plan

SAMPLED = [pytest.param(*pair, id=" ".join(map(str, pair))) for pair in zip(BLOCKS, sampled_assignments(len(BLOCKS), seed=21), strict=True)]
MANY = [(block, assignment) for block in BLOCKS for assignment in sampled_assignments(32, seed=22)]
EVERY = [(family, one) for family in LEAST_ALIKE for one in assignments_of(family)]
random.Random(26).shuffle(EVERY)  # what a run has seen that is ended early is of all kinds
MIXED = make_layout(
    {"x": "embed", "y": "ffn", "z": "ffn"},
    {"x": "sequence", "y": "heads", "z": "batch"},
    {"x": "heads", "y": "heads", "z": "none"},
    prefill_gather=["x", "y"],
)


def check(block: str, assignment: Assignment, **options: Any) -> None:
    name = f"{block} kv{assignment.kv_heads} d{assignment.head_dim}"
    model = dataclasses.replace(
        MODEL, **{"name": name, "num_kv_heads": assignment.kv_heads, "head_dim": assignment.head_dim} | BLOCKS[block]
    )
    dtype = options.pop("dtype", DType.F32)
    assert largest_error(make_plan(assignment.mesh, assignment.layout(), model, dtype=dtype), **options) < TOLERANCE[dtype.value]


@pytest.mark.parametrize(("block", "assignment"), SAMPLED)
def test_sampled_assignments(block: str, assignment: Assignment) -> None:
    """Layers of two kinds one by one, those of three in a loop."""
    check(block, assignment, unrolled=BLOCKS[block] is LOCAL_AND_GLOBAL)


@pytest.mark.slow
@pytest.mark.parametrize(("block", "assignment"), MANY, ids=str)
def test_many_assignments(block: str, assignment: Assignment) -> None:
    check(block, assignment)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "assignment"), EVERY, ids=[" ".join(map(str, pair)) for pair in EVERY])
def test_every_assignment_of_families(family: str, assignment: Assignment) -> None:
    """Of the three that are least like each other, read from their configurations."""
    model = least_alike(family, assignment.kv_heads, assignment.head_dim)
    assert largest_error(make_plan(assignment.mesh, assignment.layout(), model)) < TOLERANCE["f32"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [DType.BF16, DType.INT8])
@pytest.mark.parametrize("block", BLOCKS)
def test_few_bits_stay_close(block: str, dtype: DType) -> None:
    for assignment in sampled_assignments(4, seed=23):
        check(block, assignment, dtype=dtype)


@pytest.mark.parametrize("block", BLOCKS)
def test_both_accounts(block: str) -> None:
    for changed in ({}, {"num_kv_heads": 1}):
        model = dataclasses.replace(accounts.MODEL, **BLOCKS[block] | changed)
        accounts.check(accounts.make_plan("2x2x2", MIXED, model=model), accounts.BUCKETS["mixed"])


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_layers_one_by_one(block: str) -> None:
    for assignment in sampled_assignments(3, seed=24):
        check(block, assignment, unrolled=True)


@pytest.mark.slow
@pytest.mark.parametrize("unrolled", [False, True])
def test_kinds_as_the_compiler_partitions_them(unrolled: bool) -> None:
    assignment = Assignment("4x2", (("ffn", False), ("embed", False)), ("batch", "heads"), ("heads", "heads"))
    check("norms after, three kinds", assignment, unrolled=unrolled, compiler=compile_partitioned)


def test_stages_of_whole_periods() -> None:
    layout = make_layout({"x": "stage", "y": "ffn", "z": "embed"}, {"x": "none", "y": "heads", "z": "batch"})
    model = dataclasses.replace(MODEL, name="staged", num_layers=4, **LOCAL_AND_GLOBAL)
    assert largest_error(make_plan("2x2x2", layout, model)) < TOLERANCE["f32"]
