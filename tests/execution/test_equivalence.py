"""Partitioned = reference, over role assignments × meshes, in prefill, chunked prefill, mixed steps and decode."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from partinf.foundation.errors import InvalidInput
from partinf.layout.files import make_layout
from partinf.plans import Bucket
from partinf.transformer.step import check_bucket
from partinf.workload import DType
from tests.execution.assignments import FAMILIES, Assignment, all_assignments, sampled_assignments
from tests.execution.harness import MODEL, TOLERANCE, largest_error, make_plan


@pytest.mark.parametrize("assignment", sampled_assignments(24, seed=2), ids=str)
def test_sampled_assignments_equal_the_reference(assignment: Assignment) -> None:
    check(assignment)


@pytest.mark.slow
@pytest.mark.parametrize("assignment", all_assignments(), ids=str)
def test_every_assignment_equals_the_reference(assignment: Assignment) -> None:
    check(assignment)


def check(assignment: Assignment) -> None:
    name = f"kv{assignment.kv_heads} d{assignment.head_dim}"
    model = dataclasses.replace(MODEL, name=name, num_kv_heads=assignment.kv_heads, head_dim=assignment.head_dim)
    assert largest_error(make_plan(assignment.mesh, assignment.layout(), model)) < TOLERANCE["f32"]


MIXED = make_layout(
    {"x": "embed", "y": "ffn", "z": "ffn"},
    {"x": "batch", "y": "batch", "z": "heads"},
    {"x": "heads", "y": "heads", "z": "none"},
    prefill_gather=["x", "y"],
)


@pytest.mark.parametrize("family", [pytest.param(one, marks=pytest.mark.slow) if one == "gelu" else one for one in FAMILIES])
def test_every_family(family: str) -> None:
    """The blocks of PaLM, GPT-2 and GPT-3, OPT and Qwen 3, with random biases and norms."""
    model = dataclasses.replace(MODEL, name=family, **FAMILIES[family])
    assert largest_error(make_plan("2x2x2", MIXED, model)) < TOLERANCE["f32"]
    assert largest_error(make_plan("2x2x2", MIXED, model, prefill_from_tokens=1)) < TOLERANCE["f32"]


@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_every_kind_of_head_sharing(kv_heads: int) -> None:
    model = dataclasses.replace(MODEL, name=f"kv{kv_heads}", num_kv_heads=kv_heads)
    assert largest_error(make_plan("2x2x2", MIXED, model)) < TOLERANCE["f32"]


def test_heads_that_an_axis_splits_within_a_kv_head() -> None:
    layout = make_layout({"x": "ffn", "y": "ffn"}, {"x": "heads", "y": "none"}, {"x": "none", "y": "heads"})
    model = dataclasses.replace(MODEL, name="kv4", num_kv_heads=4)
    assert largest_error(make_plan("2x4", layout, model)) < TOLERANCE["f32"]


def test_steps_with_many_tokens_run_the_prefill_phase() -> None:
    assert largest_error(make_plan("2x2x2", MIXED, prefill_from_tokens=1)) < TOLERANCE["f32"]


STAGED = {
    "two stages, tensor axes": ("2x2x2", {"x": "stage", "y": "embed", "z": "ffn"}, {"x": "none", "y": "batch", "z": "heads"}, ""),
    "two stages, gathering": ("2x2x2", {"x": "embed", "y": "replica", "z": "stage"}, {"x": "batch", "y": "none", "z": "none"}, "x"),
    "four stages, copies": ("4x2", {"x": "stage", "y": "replica"}, {"x": "none", "y": "batch"}, ""),
    "four stages over two axes": ("2x2x2", {"x": "stage", "y": "ffn", "z": "stage"}, {"x": "none", "y": "heads", "z": "none"}, ""),
}


@pytest.mark.parametrize("name", STAGED)
def test_stages(name: str) -> None:
    """As many steps in flight as stages, each one stage behind the one before."""
    mesh, storage, attention, gather = STAGED[name]
    model = dataclasses.replace(MODEL, name="four layers", num_layers=4)
    plan = make_plan(mesh, make_layout(storage, attention, decode_gather=gather, prefill_gather=gather), model)
    assert largest_error(plan) < TOLERANCE["f32"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [DType.F32, DType.INT8])
@pytest.mark.parametrize("assignment", [one for one in sampled_assignments(48, seed=6) if one.mesh == "2x2x2"], ids=str)
def test_stages_with_any_roles(assignment: Assignment, dtype: DType) -> None:
    """One axis of three makes two stages; the others keep whatever roles they have."""
    roles = assignment.layout()
    gather = [[axis for axis in roles.phase(label).gather if axis != "x"] for label in ("decode", "prefill")]
    attention = [dict(roles.phase(label).attention) | {"x": "none"} for label in ("decode", "prefill")]
    layout = make_layout(dict(roles.storage) | {"x": "stage"}, *attention, *gather)
    model = dataclasses.replace(MODEL, name="four layers", num_layers=4)
    assert largest_error(make_plan("2x2x2", layout, model, dtype=dtype)) < TOLERANCE[dtype.value]


def test_untied_embeddings_and_unrolled_layers() -> None:
    model = dataclasses.replace(MODEL, name="untied", tied_embeddings=False)
    assert (
        largest_error(make_plan("4x2", make_layout({"x": "ffn", "y": "embed"}, {"x": "batch", "y": "heads"}), model), unrolled=True) < 1e-4
    )


@pytest.mark.parametrize("head_dim", [8, 16])
def test_bfloat16_stays_close(head_dim: int) -> None:
    model = dataclasses.replace(MODEL, name=f"d{head_dim}", head_dim=head_dim)
    assert largest_error(make_plan("2x2x2", MIXED, model, dtype=DType.BF16)) < TOLERANCE["bf16"]


@pytest.mark.parametrize(("dtype", "kv"), [(DType.INT8, DType.BF16), (DType.BF16, DType.INT8), (DType.INT8, DType.INT8)])
@pytest.mark.parametrize(("gathered", "head_dim"), [(False, 8), (True, 8), (True, 16)])
def test_int8_stays_close(dtype: DType, kv: DType, gathered: bool, head_dim: int) -> None:
    model = dataclasses.replace(MODEL, name=f"d{head_dim}", head_dim=head_dim)
    plan = make_plan("2x2x2", MIXED, model, dtype=dtype, kv=kv, prefill_from_tokens=1 if gathered else 1 << 30)
    assert largest_error(plan) < TOLERANCE["int8"]


@pytest.mark.parametrize("kv_heads", [1, 6])
def test_padded_heads_change_nothing(kv_heads: int) -> None:
    """Six heads over eight devices, padded to eight; multiquery and multihead."""
    model = dataclasses.replace(MODEL, name=f"six{kv_heads}", num_heads=6, num_kv_heads=kv_heads)
    layout = make_layout(dict.fromkeys("xyz", "ffn"), {"x": "heads", "y": "heads", "z": "batch"})
    assert largest_error(make_plan("2x2x2", layout, model, padded_heads=8)) < TOLERANCE["f32"]


SEQUENCE_SPLIT = make_layout(
    {"x": "embed", "y": "ffn", "z": "ffn"},
    {"x": "sequence", "y": "sequence", "z": "heads"},
    {"x": "batch", "y": "sequence", "z": "heads"},
    decode_gather=["y"],
    prefill_loop={"axis": "z", "ring": "halves"},
)


@pytest.mark.parametrize(
    ("changed", "options", "tolerance"),
    [
        ({}, {"kv": DType.INT8}, "int8"),
        ({}, {"dtype": DType.BF16}, "bf16"),
        ({"head_dim": 16}, {"kv": DType.INT8}, "int8"),
        ({"head_dim": 16}, {"dtype": DType.BF16}, "bf16"),
        ({}, {"dtype": DType.INT8, "prefill_from_tokens": 1}, "int8"),
        ({"num_heads": 6, "num_kv_heads": 6}, {"padded_heads": 8}, "f32"),
        (FAMILIES["palm"], {"prefill_from_tokens": 1}, "f32"),
        (FAMILIES["gpt"], {}, "f32"),
        (FAMILIES["qwen3"], {"prefill_from_tokens": 1}, "f32"),
    ],
    ids=["int8 KV", "bf16", "int8 KV by kernels", "bf16 by kernels", "int8 weights", "padded heads", "palm", "gpt", "qwen3"],
)
def test_a_context_split_over_axes(changed: dict[str, Any], options: dict[str, Any], tolerance: str) -> None:
    """The pages of a sequence over x and y, heads over z; prompts gather what x splits and read in place what y splits."""
    model = dataclasses.replace(MODEL, name=f"split {changed}", **changed)
    options = {"dtype": DType.F32} | options
    plan = make_plan("2x2x2", SEQUENCE_SPLIT, model, **{"kv": options["dtype"]} | options)
    assert largest_error(plan) < TOLERANCE[tolerance]


def test_pages_that_sequence_axes_do_not_divide_are_refused_all_at_once() -> None:
    layout = make_layout({"x": "ffn", "y": "replica"}, {"x": "sequence", "y": "batch"}, {"x": "heads", "y": "sequence"})
    plan = make_plan("4x2", layout)
    plan = dataclasses.replace(plan, cache=dataclasses.replace(plan.cache, pages_per_shard=63))
    with pytest.raises(InvalidInput) as caught:
        check_bucket(plan, Bucket(8, 6, 16, 8, 4))
    assert [offence.rpartition("; ")[2] for offence in caught.value.offences] == [
        "a multiple of 4 is needed",
        "a multiple of 8 is needed",
        "a multiple of 4 is needed",
    ]
