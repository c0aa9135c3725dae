"""Groups of the cache on devices: layers with a window have few pages, whose contents are what the window sees, whatever else runs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.buckets import Capacity, held, with_capacity
from partinf.cost.memory import kv_bytes
from partinf.engine import Engine, FirstComeFirstServed, Policy, RequestOutput, SamplingParams
from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
from partinf.engine.policies.ranked import Eviction, Pages
from partinf.execution.runner import JaxRunner
from partinf.execution.score import Scorer
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout
from partinf.layout.files import make_layout
from partinf.model.config import ModelConfig
from partinf.model.kinds import Kind
from partinf.partition.sharding import device_mesh
from partinf.plans import Plan
from partinf.transformer import reference
from partinf.transformer.cache import cache_bytes_per_device
from partinf.workload import DType
from tests.execution.harness import TOLERANCE, host_params, place_params
from tests.execution.test_pipeline import ESTIMATES

# Five layers with a window to one without, as in Gemma 3.
PATTERN = {"kinds": (Kind("near", 4), Kind("all", 0)), "pattern": ("near",) * 5 + ("all",)}
MODEL = ModelConfig("five to one", 6, 32, 32, 4, 2, 8, 250, max_len=256, **PATTERN)
PAGE = 2


def runner_of(mesh: str, layout: Layout, capacity: Capacity, model: ModelConfig = MODEL, num_host_pages: int = 0) -> JaxRunner:
    plan = Plan(model, parse_slice(f"cpu:{mesh}"), layout, weights=DType.F32, kv=DType.F32)
    plan = with_capacity(plan, capacity)
    plan = replace(plan, buckets=plan.buckets[-1:])  # the one that holds all steps
    devices = device_mesh(plan)
    return JaxRunner(plan, place_params(plan, devices, host_params(model), unrolled=False), devices, num_host_pages)


@cache
def likeliest(model: ModelConfig) -> Callable[..., jax.Array]:
    """(parameters, rows of tokens) → after every token the one that the reference takes."""
    return jax.jit(lambda params, rows: jnp.argmax(reference.forward(params, model, rows), axis=-1))


def check(model: ModelConfig, outputs: list[RequestOutput], longest: int) -> None:
    """Every token is the one that the reference takes after those before it."""
    tokens = [[*output.prompt, *output.tokens] for output in outputs]
    rows = np.asarray([row + [0] * (longest - len(row)) for row in tokens])
    found = np.asarray(likeliest(model)(host_params(model), rows))
    for row, best, output in zip(tokens, found, outputs, strict=True):
        first = len(output.prompt)
        assert row[first:] == best[first - 1 : len(row) - 1].tolist()


@pytest.mark.slow
def test_twenty_sequences_run_in_the_memory_of_four() -> None:
    """Of 256 positions each, on bytes that hold four with full attention."""
    layout, full = make_layout({"x": "replica"}, {"x": "none"}), replace(MODEL, kinds=(), pattern=())
    capacity = Capacity(20, 256, prefill_tokens=16, page_size=PAGE, kv_pages=20 * 256 // PAGE, random=False)
    runner = runner_of("1", layout, capacity)
    plan, slice_ = runner.plan, runner.plan.slice
    allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(runner._state.kv))
    assert allocated == cache_bytes_per_device(plan) == held(plan).cache
    assert allocated == kv_bytes(MODEL, layout, slice_, 20, 256, DType.F32, (16, 8), PAGE)
    assert allocated <= kv_bytes(full, layout, slice_, 4, 256, DType.F32, page_size=PAGE)
    alone = kv_bytes(MODEL, layout, slice_, 1, 256, DType.F32, page_size=PAGE)
    assert alone < kv_bytes(full, layout, slice_, 1, 256, DType.F32, page_size=PAGE) / 5
    rng = random.Random(0)
    prompts = [rng.choices(range(250), k=rng.randint(20, 40)) for _ in range(20)]
    engine = Engine(runner, policy=FirstComeFirstServed(chunk_prefills=True), lag=1, check_invariants=True)
    together = 0
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(max_tokens=256 - len(prompt), ignore_eos=True))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        together = max(together, engine.load.num_running)
    assert together == 20
    assert engine.metrics.preemptions == 0
    check(MODEL, outputs, 256)


POLICIES: dict[str, Policy] = {
    "fcfs": FirstComeFirstServed(chunk_prefills=True),
    "mlfq": MultiLevelFeedbackQueue(ESTIMATES, 2, pages=Pages(Eviction.REACTIVE, None)),
}
ALL_WAYS = make_layout(
    {"x": "stage", "y": "ffn", "z": "ffn"}, {"x": "none", "y": "sequence", "z": "batch"}, {"x": "none", "y": "heads", "z": "heads"}
)
SMALL = replace(MODEL, name="five to one, small", num_layers=12, kinds=(Kind("near", 6), Kind("all")))


@cache
def all_ways() -> JaxRunner:
    """Two stages, pages split over two devices, requests over two; pages for less than half of the sequences that run together."""
    capacity = Capacity(8, 40, prefill_tokens=8, page_size=4, kv_pages=14, random=False)
    return runner_of("2x2x2", ALL_WAYS, capacity, SMALL, num_host_pages=60)


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_are_those_of_the_reference_whatever_happens_to_pages(policy: str) -> None:
    """Preempted or swapped, after a prefix that is found, on pages split over shards, in stages of a pipeline."""
    runner = all_ways()
    engine = Engine(runner, policy=POLICIES[policy], lag=1, prefix_caching=policy == "fcfs", check_invariants=True)
    shared = [7 * n % 250 for n in range(17)]
    prompts = [(shared if n % 2 else []) + [3 + n, 5, 7, 9 + n, 11, 13][: 3 + n % 4] for n in range(10)]
    params = [SamplingParams(max_tokens=12 + n % 5, ignore_eos=True) for n in range(10)]
    outputs = engine.generate(prompts, params)
    check(SMALL, outputs, 40)
    metrics = engine.metrics
    if policy == "fcfs":
        again = engine.generate(prompts[1:2], params[1:2])
        check(SMALL, again, 40)
        assert again[0].num_cached == 16
        assert metrics.preemptions > 0
    else:
        assert metrics.swapped_out_pages > 0
    parts = [group.num_free for group in engine._scheduler.pool.groups]
    assert parts == [group.pages_per_shard * runner.limits.num_shards for group in runner.limits.groups]


def test_texts_are_scored_on_a_window_s_few_pages() -> None:
    """Longer than all that their windows' pages hold, in chunks."""
    layout = make_layout({"x": "replica"}, {"x": "none"})
    runner = runner_of("1", layout, Capacity(4, 40, prefill_tokens=8, page_size=4, random=False), SMALL)
    texts = [[7 * n % 250 for n in range(1, 40)], [11 * n % 250 for n in range(1, 23)]]
    scorer = Scorer(runner.plan, runner.params, runner.mesh)
    found = scorer.score(texts)
    rows = np.asarray([text + [0] * (40 - len(text)) for text in texts])
    logprobs = np.asarray(jax.nn.log_softmax(jax.jit(reference.forward, static_argnums=1)(host_params(SMALL), SMALL, rows)))
    for text, of_text, scores in zip(texts, logprobs, found.logprobs, strict=True):
        np.testing.assert_allclose(scores, [of_text[place, token] for place, token in enumerate(text[1:])], atol=TOLERANCE["f32"])
    assert scorer._most == [10, 4]
