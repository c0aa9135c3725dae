"""Layers that are compiled one by one: they give what the reference gives, are traced once, and a bound says when they are."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from partinf.hardware.platform import PLATFORMS, TPU
from partinf.layout import make_layout
from partinf.model.load import load_model_config
from partinf.partition.sharding import abstract_mesh, device_mesh
from partinf.plans import Bucket
from partinf.transformer import params
from partinf.transformer.batch import stacked
from partinf.transformer.params import abstract_params, prefers_unrolled
from partinf.transformer.step import abstract_state, build_step
from partinf.workload import DType
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
def test_a_bound_on_programs_and_layers(monkeypatch: pytest.MonkeyPatch, model: str, programs: int, unrolled: bool) -> None:
    """The devices' bound counts; all are unrolled on CPUs, and none on GPUs."""
    plan = replace(make_plan("2x2x2", LAYOUT), model=load_model_config(model), weights=DType.BF16)
    plan = replace(plan, buckets=tuple(Bucket(8, pages) for pages in range(1, programs + 1)))
    found = []
    for name in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(params, "platform_of", lambda mesh, name=name: PLATFORMS[name])
        found.append(prefers_unrolled(plan, device_mesh(plan)))
    assert found == [True, False, unrolled]


def test_stages_share_one_program() -> None:
    staged = make_plan("2x4", make_layout({"x": "stage", "y": "ffn"}, {"x": "none", "y": "heads"}))
    assert not prefers_unrolled(staged, device_mesh(staged))
    assert TPU.unrolled_layers > staged.model.num_layers
