"""Fixtures that `transformers` computed: the reference and the partitioned step give its logits, and the engine its tokens."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.buckets import Capacity, runner_limits, with_capacity
from partinf.checkpoint.hf import load_hf
from partinf.engine.engine import Engine
from partinf.engine.request import SamplingParams
from partinf.engine.runner import PageGroup
from partinf.engine.step import PageTable, PrefillChunk, RowSampling, Step
from partinf.execution.place import place_step
from partinf.execution.runner import JaxRunner
from partinf.foundation.paging import first_page
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.partition.sharding import device_mesh
from partinf.plans import Plan
from partinf.transformer import reference
from partinf.transformer.batch import pack
from partinf.transformer.params import abstract_params
from partinf.transformer.step import compile_step, empty_state
from partinf.workload import DType

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAMES = sorted(file.parent.name for file in FIXTURES.glob("*/expected.npz"))
SERVED = 64  # the longest context, of which the answers are those where a rotation depends on it
TOLERANCE = 1e-4
# Whose tokens the engine gives in every run: layers of two kinds, shared key-value heads, learned positions. The step below it runs all.
ENGINE = ("gemma3_small", "llama_gqa", "opt_small")
# Of mixtures of experts the one with biases, sinks, clamps and windows is run every time.
SLOW_MIXTURES = (
    "glm4_moe_small",
    "granite_moe_small",
    "minimax_m2_small",
    "mixtral_small",
    "olmoe_small",
    "qwen2_moe_small",
    "qwen3_moe_small",
)

# Whose features run in other tests of every run, each alone.
SLOW = ("ministral3_small", "opt_narrow_small", "persimmon_small")

# What weights, queries and pages are split over, in turn: every fixture runs, no two neighbours in the same way.
LAYOUTS = (
    make_layout({"x": "embed", "y": "ffn", "z": "ffn"}, dict.fromkeys("xyz", "batch"), dict.fromkeys("xyz", "heads")),
    make_layout({"x": "ffn", "y": "ffn", "z": "replica"}, {"x": "heads", "y": "batch", "z": "batch"}),
    make_layout(dict.fromkeys("xyz", "ffn"), {"x": "heads", "y": "heads", "z": "batch"}, decode_gather=["z"], prefill_gather=["x", "z"]),
    make_layout({"x": "embed", "y": "ffn", "z": "embed"}, {"x": "heads", "y": "heads", "z": "batch"}),
    make_layout({"x": "ffn", "y": "embed", "z": "replica"}, dict.fromkeys("xyz", "batch"), dict.fromkeys("xyz", "heads")),
    make_layout(dict.fromkeys("xyz", "ffn"), {"x": "heads", "y": "batch", "z": "none"}, decode_gather=["x"], prefill_gather=["y"]),
)


# The same with roles for experts: whole experts, their d_ff and both; rows gathered, and rows exchanged.
EXPERT_LAYOUTS = (
    make_layout(
        {"x": "replica", "y": "embed", "z": "ffn"},
        {"x": "batch", "y": "heads", "z": "heads"},
        experts={"x": "expert", "y": "ffn", "z": "expert"},
    ),
    make_layout(
        {"x": "replica", "y": "replica", "z": "ffn"},
        {"x": "batch", "y": "batch", "z": "heads"},
        decode_dispatch="exchange",
        prefill_dispatch="exchange",
        experts={"x": "expert", "y": "expert", "z": "ffn"},
    ),
    make_layout(dict.fromkeys("xyz", "ffn"), {"x": "heads", "y": "batch", "z": "none"}, experts={"x": "ffn", "y": "expert", "z": "embed"}),
)
EXPERT_LAYOUTS_2D = (
    make_layout({"x": "replica", "y": "ffn"}, {"x": "batch", "y": "heads"}, experts={"x": "expert", "y": "ffn"}),
    make_layout({"x": "ffn", "y": "embed"}, {"x": "heads", "y": "batch"}, experts={"x": "expert", "y": "embed"}),
)
LAYOUTS_2D = (
    make_layout({"x": "ffn", "y": "embed"}, {"x": "batch", "y": "heads"}),
    make_layout({"x": "replica", "y": "ffn"}, {"x": "batch", "y": "batch"}, {"x": "heads", "y": "none"}),
    make_layout({"x": "embed", "y": "embed"}, {"x": "heads", "y": "batch"}, decode_gather=["x"]),
    make_layout({"x": "ffn", "y": "embed"}, {"x": "heads", "y": "heads"}, {"x": "batch", "y": "heads"}),
    make_layout({"x": "embed", "y": "ffn"}, {"x": "batch", "y": "heads"}),
    make_layout({"x": "ffn", "y": "ffn"}, {"x": "batch", "y": "heads"}, decode_gather=["y"]),
)


def over(layouts: tuple[Layout, ...], of_experts: tuple[Layout, ...], slow: list[str]) -> list[Any]:
    """The fixtures, each under one of the layouts in turn; mixtures of experts under those that have roles for experts."""
    mixtures = [name for name in NAMES if load_model_config(FIXTURES / name).experts is not None]
    dense = [name for name in NAMES if name not in mixtures]
    pairs = [*zip(dense, itertools.cycle(layouts), strict=False), *zip(mixtures, itertools.cycle(of_experts), strict=False)]
    return [pytest.param(name, layout, marks=[pytest.mark.slow] if name in slow else []) for name, layout in pairs]


def make_plan(name: str, slice_name: str, layout: Layout, **capacity: object) -> Plan:
    plan = Plan(load_model_config(FIXTURES / name), parse_slice(slice_name), layout, weights=DType.F32, kv=DType.F32)
    return with_capacity(plan, Capacity(**{"max_rows": 8, "max_len": SERVED, "prefill_tokens": 80, "random": False} | capacity))


def load(plan: Plan, name: str, mesh: jax.sharding.Mesh) -> dict:
    return load_hf(FIXTURES / name, plan.model, abstract_params(plan, mesh, unrolled=False))


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_gives_their_logits(name: str) -> None:
    plan = make_plan(name, "cpu:1", make_layout({"x": "replica"}, {"x": "none"}))
    params = load(plan, name, device_mesh(plan))
    expected = np.load(FIXTURES / name / "expected.npz")
    logits = jax.jit(reference.forward, static_argnums=(1, 3))(params, plan.model, jnp.asarray(expected["tokens"]), SERVED)
    np.testing.assert_allclose(np.asarray(logits), expected["logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name, layout", over(LAYOUTS, EXPERT_LAYOUTS, slow=["cohere2_small", *SLOW, *SLOW_MIXTURES]))
def test_the_partitioned_step_gives_their_logits(name: str, layout: Layout) -> None:
    """Prefixes of every length in one prefill each would be 40 programs; the last position of growing chunks covers all with one."""
    plan = make_plan(name, "cpu:2x2x2", layout, page_size=4, prefill_tokens=56)
    mesh, limits = device_mesh(plan), runner_limits(plan)
    params = load(plan, name, mesh)
    bucket = next(bucket for bucket in plan.buckets if bucket.prefill_pages)
    step = compile_step(plan, mesh, bucket, unrolled=False, with_logits=True)
    state = empty_state(plan, mesh, unrolled=False)
    expected = np.load(FIXTURES / name / "expected.npz")
    for start, end in zip((0, 1, 7, 17, 30), (1, 7, 17, 30, 40), strict=True):
        chunks = []
        for slot, row in enumerate(expected["tokens"]):
            tables = tuple(_table(group, slot, start, end, plan) for group in limits.groups)
            shard = limits.prefill_shards_of(slot % plan.num_shards)[0]
            tokens = tuple(int(token) for token in row[start:end])
            chunks.append(PrefillChunk(slot, slot % plan.num_shards, tokens, start, tables, True, RowSampling(), shard))
        placed = place_step(Step((), tuple(chunks)), bucket, plan, limits)
        state, out = step(params, state, pack([placed.batch]))
        for sequence, row in enumerate(placed.prefill_rows):
            got = np.asarray(out.logits)[row, : plan.model.vocab_size]
            np.testing.assert_allclose(got, expected["logits"][sequence, end - 1], atol=TOLERANCE, rtol=0)


def _table(group: PageGroup, slot: int, start: int, end: int, plan: Plan) -> PageTable:
    """The pages of a sequence in one group of the cache, on the shard that owns its slot; slots on one shard take turns. Of a window it has
    half of the shard's, which hold more than a chunk and the window before it, and are written anew once that has passed them."""
    shard, place, size = slot % plan.num_shards, slot // plan.num_shards, plan.cache.page_size
    first = first_page(start, group.window, size) if group.window else 0
    each = group.pages_per_shard // 2 if group.window else 16
    ids = (shard * group.pages_per_shard + place * each + page % each for page in range(first, -(-end // size)))
    return PageTable(tuple(ids), first)


@pytest.mark.parametrize("name, layout", over(LAYOUTS_2D, EXPERT_LAYOUTS_2D, slow=[name for name in NAMES if name not in ENGINE]))
def test_the_engine_gives_their_tokens(name: str, layout: Layout) -> None:
    plan = make_plan(name, "cpu:4x2", layout, page_size=4, prefill_tokens=56)
    runner = JaxRunner(plan, load(plan, name, device_mesh(plan)))
    expected = np.load(FIXTURES / name / "expected.npz")
    assert expected["greedy_margin"].min() > 10 * TOLERANCE  # so the tokens are decided
    outputs = Engine(runner, check_invariants=True).generate(expected["tokens"].tolist(), SamplingParams(max_tokens=16))
    assert [list(output.tokens) for output in outputs] == expected["greedy"].tolist()
