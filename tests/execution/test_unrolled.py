"""Layers that are compiled one by one: they give what the reference gives, are traced once, and a bound says when they are."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from partinf.buckets import split_of
from partinf.cost.pricing import Pricing
from partinf.hardware.platform import TPU
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.partition.sharding import abstract_mesh
from partinf.plans import Bucket, Plan
from partinf.transformer.batch import stacked
from partinf.transformer.params import abstract_params
from partinf.transformer.step import abstract_state, build_step
from tests.execution.assignments import BLOCKS
from tests.execution.harness import MODEL, TOLERANCE, largest_error, make_plan

LAYOUT = make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, {"x": "batch", "y": "heads", "z": "batch"})


@pytest.mark.parametrize("family", ["llama", "local and global"])
def test_unrolled_layers_give_what_the_reference_gives(family: str) -> None:
    model = replace(MODEL, name=f"unrolled-{family}", **BLOCKS.get(family, {}))
    assert largest_error(make_plan("2x2x2", LAYOUT, model), unrolled=True) < TOLERANCE["f32"]


def test_layers_of_a_kind_are_traced_once() -> None:
    plan, bucket = make_plan("2x2x2", LAYOUT, replace(MODEL, num_layers=5)), Bucket(8, 6)
    mesh = abstract_mesh(plan)
    step = build_step(plan, mesh, bucket, unrolled=True, plain=True)
    traced = jax.make_jaxpr(step)(abstract_params(plan, mesh, True), abstract_state(plan, mesh, True), stacked(bucket, plan))
    (inner,) = (equation.params["jaxpr"] for equation in traced.jaxpr.eqns if equation.primitive.name == "shard_map")
    calls = [equation.params["jaxpr"] for equation in inner.eqns if equation.params.get("name") == "one"]
    assert len(calls) == 5
    assert len({id(call) for call in calls}) == 1


@pytest.mark.parametrize(("model", "programs", "unrolled"), [("llama-3-70b", 1, True), ("llama-3-70b", 3, False), ("llama-3-8b", 6, False)])
def test_a_bound_on_programs_and_layers(model: str, programs: int, unrolled: bool) -> None:
    """The platform's bound counts; all are unrolled on CPUs, and none on GPUs. What is priced is what is compiled."""
    buckets = tuple(Bucket(8, pages) for pages in range(1, programs + 1))
    roles = {"x": "ffn", "y": "ffn"}, {"x": "none", "y": "heads"}
    found = []
    for name in ("cpu:2x4", "h100:8", "v5e:2x4"):
        slice_ = parse_slice(name, "x:2,y:4" if name == "h100:8" else "")
        plan = Plan(load_model_config(model), slice_, make_layout(*roles), buckets=buckets)
        found.append(plan.unrolled)
        priced = split_of(plan, buckets[0], Pricing(slice_)).pricing.program
        assert priced.unrolled == (plan.unrolled and slice_.chip.platform.fetches_ahead)
    assert found == [True, False, unrolled]


def test_stages_share_one_program() -> None:
    staged = make_plan("2x4", make_layout({"x": "stage", "y": "ffn"}, {"x": "none", "y": "heads"}))
    assert not staged.unrolled
    assert TPU.unrolled_layers > staged.model.num_layers
