"""Gemma 3 27B at 32 thousand tokens: bytes of its cache as planned, sized and declared agree, and windows take little of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import pytest

from partinf.buckets import Capacity, held, runner_limits, serving_steps, with_capacity
from partinf.cost.pricing import Pricing
from partinf.engine import Engine, FirstComeFirstServed, SamplingParams
from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.partition.sharding import abstract_mesh
from partinf.planner.question import Question
from partinf.planner.search import given
from partinf.plans import Bucket, CacheConfig, Plan
from partinf.proof import proving
from partinf.proof.hlo import Frame
from partinf.simulation.cost_runner import CostRunner
from partinf.simulation.sizing import Sizing, cost_runner, sized_plan
from partinf.simulation.step_price import Price
from partinf.transformer.cache import abstract_cache, cache_bytes_per_device
from partinf.transformer.kernels import tiles as kernels
from partinf.workload import DType, Workload

GEMMA = load_model_config("gemma-3-27b")
FULL = replace(GEMMA, kinds=(), pattern=(), prefix=())
CONTEXT = 32768
HEADS = make_layout({"x": "ffn", "y": "ffn", "z": "ffn"}, dict.fromkeys("xyz", "heads"))
SPLIT = make_layout({"x": "ffn", "y": "embed", "z": "ffn"}, {"x": "heads", "y": "batch", "z": "sequence"}, dict.fromkeys("xyz", "heads"))


def plan_of(layout: Layout = HEADS, model: Any = GEMMA, slice_: str = "v4:2x2x2", mesh: str = "2x2x2") -> Plan:
    return Plan(model, parse_slice(slice_, mesh), layout, weights=DType.INT8)


def declared(plan: Plan) -> list[int]:
    """Bytes of each group on one device, from the shapes that the program is compiled for."""
    groups = abstract_cache(plan, abstract_mesh(plan), unrolled=False)
    return [
        sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(group)) for group in groups
    ]


@pytest.mark.parametrize("layout", [HEADS, SPLIT])
def test_planned_sized_and_declared_bytes_agree(layout: Layout) -> None:
    """In decode, under a fifth of what full attention holds."""
    workload = Workload(16, context_len=CONTEXT, phase="decode", weights=DType.INT8)
    plan = plan_of(layout)
    (candidate,) = given(Question(GEMMA, workload), plan.slice, [(layout, 0)])
    (whole,) = given(Question(FULL, workload), plan.slice, [(layout, 0)])
    sized, buckets = serving_steps(plan, workload)
    sized = replace(sized, buckets=buckets)
    assert candidate.memory.kv == held(sized).cache == cache_bytes_per_device(sized) == sum(declared(sized))
    assert candidate.memory.kv < whole.memory.kv / 5


@pytest.mark.parametrize("layout", [HEADS, SPLIT])
def test_what_a_server_holds_agrees_group_by_group(layout: Layout) -> None:
    capacity = Capacity(max_rows=16, max_len=CONTEXT, prefill_tokens=512)
    plan = with_capacity(plan_of(layout), capacity)
    found, limits = held(plan), runner_limits(plan)
    by_group = [size * pages for size, pages in zip(found.page_bytes, found.pages, strict=True)]
    assert by_group == declared(plan)
    assert [group.pages_per_shard // plan.num_sequence_shards for group in limits.groups] == list(found.pages)
    assert found.windows == (0, 1024)
    per_shard, ways = 16 // plan.num_shards, plan.num_sequence_shards
    own = -(-66 // ways)  # 65 pages that 1,024 positions lie on at most, and one
    assert found.pages[1] == per_shard * own + limits.chunk_pages
    assert found.peak[1] == (-(-(1 + -(-(1023 + 512 - 1) // 16) + 1) // ways), own)
    printed = str(found)
    assert "KV by group of layers: all positions " in printed
    assert f"windows of 1,024 {by_group[1] / 1e9:.2f} GB in {found.pages[1]:,} pages" in printed
    assert f"({own} per sequence, {found.peak[1][0]} during its prefill)" in printed


def test_twenty_sequences_are_simulated_in_pages_for_four() -> None:
    """Of 32 thousand positions each, on the same bytes: a page of windows has 52 of the layers, one of all positions 10."""
    together = {}
    for model, held_in_full in ((GEMMA, 20), (FULL, 4)):
        pages = held_in_full * CONTEXT // 16
        sizing = Sizing(max_rows=20, max_len=CONTEXT, prefill_tokens=512, kv_pages=pages)
        plan = plan_of(model=model, slice_="h200:8")
        limits = cost_runner(plan, Pricing(plan.slice), sizing)[0].limits
        bytes_held = held(sized_plan(plan, sizing)).cache
        runner = CostRunner(limits, lambda *steps: Price(1.0, sum(step.num_tokens for step in steps)))
        engine = Engine(runner, policy=FirstComeFirstServed(chunk_prefills=True), clock=runner.clock)
        for _ in range(20):
            engine.add_request([1] * 30_000, SamplingParams(max_tokens=2_768, ignore_eos=True))
        most = 0
        for _ in range(1_500):
            engine.step()
            most = max(most, engine.load.num_running)
        together[model.kinds != ()] = most, bytes_held
        assert engine.metrics.preemptions == 0 or model is FULL
    assert together[True][0] == 20
    assert together[False][0] == 4
    assert together[True][1] <= together[False][1]


def test_a_window_that_holds_what_is_served_is_no_group() -> None:
    plan = plan_of()
    groups = [with_capacity(plan, Capacity(max_rows=4, max_len=length)).cache_groups for length in (1024, 1040)]
    assert [len(found) for found in groups] == [1, 2]
    assert groups[0][0].layers == tuple(range(62))
    assert groups[1][0].layers == tuple(range(5, 62, 6))


def test_memory_that_holds_few_sequences_gives_windows_what_is_of_use() -> None:
    """A long context on little memory: one sequence fits, and its windows do."""
    layout = make_layout({"x": "ffn", "y": "ffn"}, {"x": "heads", "y": "heads"})
    plan = plan_of(layout, slice_="v5e:2x4", mesh="x:2,y:4")
    sized = with_capacity(plan, Capacity(max_rows=1024, max_len=0, memory_share=0.9))
    full, window = sized.cache_groups
    assert sized.max_len == min(131072, full.pages_per_shard * 16)
    assert window.pages_per_shard < 1024 * 66
    assert window.pages_per_shard <= full.pages_per_shard
    assert held(sized).slack >= 0


def test_pages_of_groups_that_there_are_not_are_refused() -> None:
    plan = replace(plan_of(), cache=CacheConfig(16, 64, 4, (64, 64)))
    with pytest.raises(InvalidInput, match=r"cache: pages of 3 groups; gemma-3-27b has 2 in contexts of 2048"):
        plan.cache_groups  # noqa: B018


def test_a_proof_takes_tiles_of_prompts_as_often_as_windows_let_it() -> None:
    """Of five layers in six no more than their window and a tile of queries reach over."""
    source = kernels.__name__.replace(".", "/") + ".py"
    bucket = Bucket(prefill_tokens=16384, prefill_slots=1)
    of_full, of_windows = (
        proving._taken(replace(plan_of(model=model), buckets=(bucket,)), bucket)([Frame(source, 1, "prefill.<locals>.queries")])
        for model in (FULL, GEMMA)
    )
    reach = (1024 + plan_of().slice.chip.platform.tiles.prompt_keys) / 16384
    assert of_full > 0.5 > reach
    assert of_windows == pytest.approx((10 * of_full + 52 * reach) / 62)
