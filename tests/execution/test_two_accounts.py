"""The closed form and the traced program agree exactly: collectives by kind, axes, dtype, bytes and count, and dot FLOPs.

Both describe one bucket at its padded shapes. They share no code: one is algebra over roles, the other reads the jaxpr of what runs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from partinf.buckets import split_of
from partinf.cost.pricing import Pricing
from partinf.cost.program import PLAIN
from partinf.cost.step import step_ledger
from partinf.foundation import resources
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout
from partinf.layout.files import make_layout
from partinf.model.config import ModelConfig
from partinf.model.kinds import Kind
from partinf.model.load import load_model_config
from partinf.model.weights import num_params
from partinf.plans import Bucket, CacheConfig, Plan
from partinf.transformer import attention, ffn
from partinf.transformer.account import Account, trace_account
from partinf.workload import DType
from tests.execution.assignments import FAMILIES, Assignment, all_assignments, sampled_assignments

MODEL = ModelConfig("tiny", 3, 64, 128, 8, 4, 16, 500, max_len=64)
DTYPES = {DType.BF16: "bfloat16", DType.F32: "float32"}
BUCKETS = {
    "decode": Bucket(16, 8),
    "prefill": Bucket(0, 0, 32, 8, 0),
    "chunks": Bucket(0, 0, 32, 8, 8),
    "mixed": Bucket(8, 16, 64, 16, 8),
    "sampling": Bucket(8, 8, random=True),
    "extended": Bucket(8, 8, 64, 16, 8, random=True, extended=True),
    "constrained": Bucket(8, 8, 64, 16, 8, random=True, constrained=True),
}


def ledger_of(plan: Plan, bucket: Bucket) -> tuple[Counter[tuple], float]:
    ledger = step_ledger(split_of(plan, bucket, Pricing(plan.slice, program=PLAIN)))
    names = {DType.BF16.value: "bfloat16", DType.F32.value: "float32"}  # int8 is called the same in both
    order = list(plan.axis_sizes)
    found: Counter[tuple] = Counter()
    for entry in ledger.entries:
        if entry.op is not None:
            axes = tuple(sorted(entry.axes, key=order.index))
            found[entry.op.value, axes, names.get(entry.dtype, entry.dtype), entry.bytes] += entry.count
    return found, ledger.flops + ledger.padding_flops


def traced(account: Account) -> Counter[tuple]:
    return Counter({(c.op, c.axes, c.dtype, c.num_bytes): count for c, count in account.collectives.items()})


def make_plan(mesh: str, layout: Layout, dtype: DType = DType.BF16, model: ModelConfig = MODEL, slice_name: str = "cpu:8") -> Plan:
    return Plan(model, parse_slice(slice_name, mesh), layout, weights=dtype, kv=dtype, cache=CacheConfig(4, 64, 16))


def plan_of(assignment: Assignment, dtype: DType = DType.BF16) -> Plan:
    model = dataclasses.replace(MODEL, num_kv_heads=assignment.kv_heads)
    return make_plan(assignment.mesh, assignment.layout(plain=True), dtype, model)


def check(plan: Plan, bucket: Bucket) -> None:
    plan = dataclasses.replace(plan, buckets=(bucket,))
    account = trace_account(plan, bucket)
    closed, flops = ledger_of(plan, bucket)
    program = traced(account)
    assert {"only in the ledger": closed - program, "only in the program": program - closed} == {
        "only in the ledger": Counter(),
        "only in the program": Counter(),
    }
    assert flops == account.dot_flops


@pytest.mark.parametrize("kind", BUCKETS)
@pytest.mark.parametrize("assignment", sampled_assignments(12, seed=9), ids=str)
def test_sampled_assignments(assignment: Assignment, kind: str) -> None:
    check(plan_of(assignment, DType.F32 if kind == "mixed" else DType.BF16), BUCKETS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("assignment", all_assignments(), ids=str)
def test_every_assignment(assignment: Assignment) -> None:
    """In the buckets that hold all that the others do."""
    for kind in ("prefill", "mixed", "extended"):
        check(plan_of(assignment), BUCKETS[kind])


@pytest.mark.parametrize("assignment", sampled_assignments(8, seed=4), ids=str)
def test_int8_weights(assignment: Assignment) -> None:
    """Weights are gathered as int8, their scales next to them; activations are bf16."""
    plan = dataclasses.replace(plan_of(assignment), weights=DType.INT8)
    check(plan, BUCKETS["mixed"])
    check(plan, BUCKETS["decode"])


STAGED = {
    "two stages": ("2x4", make_layout({"x": "stage", "y": "ffn"}, {"x": "none", "y": "batch"}, {"x": "none", "y": "heads"})),
    "three stages": ("3x2", make_layout({"x": "stage", "y": "embed"}, {"x": "none", "y": "heads"})),
    "gathering": (
        "2x2x2",
        make_layout(
            {"x": "embed", "y": "replica", "z": "stage"},
            {"x": "batch", "y": "none", "z": "none"},
            decode_gather="x",
            prefill_gather="x",
        ),
    ),
    "four stages over two axes": (
        "2x2x2",
        make_layout({"x": "stage", "y": "ffn", "z": "stage"}, {"x": "none", "y": "batch", "z": "none"}),
    ),
}


@pytest.mark.parametrize("kind", BUCKETS)
@pytest.mark.parametrize("name", STAGED)
def test_stages(name: str, kind: str) -> None:
    """A tick: a stage's layers once, one permute of the activations, one all-reduce of what the last stage chose."""
    mesh, layout = STAGED[name]
    model = dataclasses.replace(MODEL, num_layers=12)
    check(make_plan(mesh, layout, model=model, slice_name="cpu:6" if mesh == "3x2" else "cpu:8"), BUCKETS[kind])


TWO_D = make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, dict.fromkeys("xyz", "batch"), dict.fromkeys("xyz", "heads"))


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_every_kind_of_head_sharing(kv_heads: int) -> None:
    check(make_plan("2x2x2", TWO_D, model=dataclasses.replace(MODEL, num_kv_heads=kv_heads, tied_embeddings=True)), BUCKETS["mixed"])


@pytest.mark.parametrize("kind", ["decode", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, kind: str) -> None:
    model = dataclasses.replace(MODEL, **FAMILIES[family])
    for gather in ("", "x", "yz", "xyz"):
        layout = make_layout(
            dict(TWO_D.storage), dict.fromkeys("xyz", "batch"), dict.fromkeys("xyz", "heads"), decode_gather=gather, prefill_gather=gather
        )
        check(make_plan("2x2x2", layout, model=model), BUCKETS[kind])


WINDOWS = {
    "two windows": {"kinds": (Kind("near", 5), Kind("far", 18), Kind("all")), "pattern": ("near", "all", "far")},
    "windows alone": {"kinds": (Kind("near", 1), Kind("far", 9)), "pattern": ("near", "far", "far")},
}


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("assignment", sampled_assignments(6, seed=21), ids=str)
def test_windows_have_tables_of_their_own(assignment: Assignment, windows: str) -> None:
    """Shorter ones, with what a window reaches: what is computed with is that, and what is brought to prompts."""
    plan = plan_of(assignment)
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, **WINDOWS[windows]))
    check(plan, BUCKETS["mixed"])
    check(plan, Bucket(0, 0, 32, 8, 16))


def shipped_models() -> list[Any]:
    """The smallest model of every family, and the others marked slow."""
    models = sorted((load_model_config(name) for name in resources.names("models") if name != "demo"), key=num_params)
    first = {model.family: model.name for model in reversed(models)}
    return [pytest.param(model.name, marks=[] if first[model.family] == model.name else [pytest.mark.slow]) for model in models]


@pytest.mark.parametrize("weights", [DType.BF16, DType.INT8])
@pytest.mark.parametrize("name", shipped_models())
def test_every_shipped_model(name: str, weights: DType) -> None:
    """Decode over batch, context and heads; prefill that gathers, in one bucket with earlier context. Heads that do not divide over two
    axes are split over one."""
    model = load_model_config(name)
    both = model.num_heads % 4 == 0
    layout = make_layout(
        {"x": "ffn", "y": "embed", "z": "ffn" if both else "embed"},
        {"x": "heads", "y": "batch", "z": "sequence"},
        {"x": "heads", "y": "batch", "z": "heads" if both else "none"},
        prefill_gather="xz",
    )
    plan = make_plan("2x2x2", layout, model=model, slice_name="v4:2x2x2")
    plan = dataclasses.replace(plan, weights=weights, prefill_from_tokens=1000)
    check(plan, Bucket(64, 128))
    check(plan, Bucket(0, 0, 1024, 2, 64))


FEW_HEADS = {"x": "none", "y": "heads", "z": "heads"}


@pytest.mark.parametrize("roles", ["batch", "heads", "sequence"])
def test_palm_540b_on_64_chips(roles: str) -> None:
    """Its 48 heads split over y and z alone, 16 ways; over all 64 chips they would have to be padded."""
    layout = make_layout(
        {"x": "embed", "y": "ffn", "z": "ffn"},
        {"batch": dict.fromkeys("xyz", "batch"), "heads": FEW_HEADS, "sequence": {"x": "sequence", "y": "heads", "z": "sequence"}}[roles],
        FEW_HEADS,
        prefill_gather="xyz",
    )
    plan = make_plan("4x4x4", layout, model=load_model_config("palm-540b"), slice_name="v4:4x4x4")
    check(plan, Bucket(64, 128))
    check(plan, Bucket(64, 128, random=True, extended=True))
    check(plan, Bucket(0, 0, 2048, 1, 0))
    check(plan, Bucket(0, 0, 2048, 1, 128))
    check(dataclasses.replace(plan, prefill_from_tokens=1), Bucket(0, 0, 4096, 2, 0))


@pytest.mark.parametrize("weights", [DType.BF16, DType.INT8])
@pytest.mark.parametrize("gather", ["", "x", "xy", "xyz"])
def test_llama_3_70b_on_64_chips(gather: str, weights: DType) -> None:
    layout = make_layout(
        {"x": "embed", "y": "ffn", "z": "ffn"},
        dict.fromkeys("xyz", "batch"),
        dict.fromkeys("xyz", "heads"),
        decode_gather=gather,
        prefill_gather=gather,
    )
    plan = make_plan("4x4x4", layout, model=load_model_config("llama-3-70b"), slice_name="v4:4x4x4")
    plan = dataclasses.replace(plan, weights=weights)
    check(plan, Bucket(256, 32))
    check(plan, Bucket(0, 0, 4096, 2, 0))


def _drop_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    from partinf.transformer import linear

    monkeypatch.setattr(linear.lax, "psum", lambda x, axes: x)


def _double_a_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ffn.move

    def twice(x, frame, source, target):  # type: ignore[no-untyped-def]
        return original(original(original(x, frame, source, target), frame, target, source), frame, source, target)

    monkeypatch.setattr(ffn, "move", lambda x, f, s, t: original(x, f, s, t) if s.unreduced else twice(x, f, s, t))


def _wrong_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    original = attention._from_group

    def other(out, group, routes):  # type: ignore[no-untyped-def]
        return original(out, dataclasses.replace(group, batch=("y", "z"), heads=("x",)), routes)

    monkeypatch.setattr(attention, "_from_group", other)


def _wrong_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax.numpy as jnp

    original = ffn.activate
    monkeypatch.setattr(ffn, "activate", lambda hidden, model: original(hidden, model).astype(jnp.float32))


def _drop_the_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "weighted", lambda out, mass, axes, sizes, sinks: out)


def test_parts_that_are_not_weighted_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan("2x2x2", make_layout(dict(TWO_D.storage), {"x": "sequence", "y": "heads", "z": "sequence"}))
    check(plan, BUCKETS["decode"])
    _drop_the_mass(monkeypatch)
    assert traced(trace_account(plan, BUCKETS["decode"])) != ledger_of(plan, BUCKETS["decode"])[0]


@pytest.mark.parametrize("mutate", [_drop_a_sum, _double_a_gather, _wrong_axis, _wrong_dtype])
def test_the_comparison_can_fail(mutate, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    plan = make_plan("2x2x2", TWO_D)
    check(plan, BUCKETS["decode"])
    mutate(monkeypatch)
    try:
        program = traced(trace_account(plan, BUCKETS["decode"]))
    except (TypeError, ValueError):  # a wrong shape or dtype may already fail to trace
        return
    assert program != ledger_of(plan, BUCKETS["decode"])[0]
