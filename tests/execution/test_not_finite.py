"""NaN in one request reaches no other: in attention of every form, in look-ups, in pages that are used again, on the model.

A model with one row of embeddings that holds NaN serves mixed requests. Those that hold the row's token fail; all others must be answered
as they are alone, while the others are there and after.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.buckets import Capacity, with_capacity
from partinf.checkpoint.hf import load_hf
from partinf.engine import Engine, FinishReason, FirstComeFirstServed, RequestOutput, SamplingParams
from partinf.engine.estimates import Estimates
from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
from partinf.engine.policies.ranked import Eviction, Pages
from partinf.execution.runner import JaxRunner
from partinf.execution.score import Scorer
from partinf.foundation import resources
from partinf.foundation.errors import NotFinite
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.partition.quantize import quantize
from partinf.partition.sharding import device_mesh
from partinf.plans import Plan
from partinf.transformer import cache as kv_cache
from partinf.transformer.attention import _contained
from partinf.transformer.cache import KeysValues
from partinf.transformer.forward import _picked
from partinf.transformer.kernels import cpu
from partinf.transformer.kernels import tiles as kernels
from partinf.transformer.kernels.tiles import Tiles
from partinf.transformer.params import abstract_params
from partinf.workload import DType
from tests.execution.harness import TOLERANCE

POISON = 70  # the token whose embedding holds NaN
NATIVE = Tiles(64, 128, 1 << 18, native=True)
TILES = {
    "plain": None,
    "tiles": Tiles(16, 8, 4 * 8 * 6),
    "unskipped": Tiles(16, 8, 1 << 20, skip=False),
    "native": NATIVE,
    "paged": Tiles(16, 8, 1 << 20, paged=True, interpret=True),
}
HEADS, GROUPS, SIZE, PAGE, POOL = 6, 2, 16, 16, 12
needs_kernels = pytest.mark.skipif("not cpu.available()", reason="no C++ compiler")


def both(rng: np.random.Generator, *shape: int) -> jax.Array:
    """Keys and values [tokens, 2, K, Q] as a step makes them, one in five of them no number."""
    new = rng.standard_normal((*shape, 2, GROUPS, SIZE)).astype(np.float32)
    bad = rng.random((*shape, 2, GROUPS)) < 0.1
    new[bad, 3] = rng.choice([np.nan, np.inf, -np.inf, 3.4e38], size=int(bad.sum()))
    return jnp.asarray(new)


def half_of(pages: jax.Array, int8: bool) -> Any:
    return quantize(pages, (-1,)) if int8 else pages


def contained(new: Any) -> jax.Array:
    new = jnp.asarray(new)
    return _contained(new[:, 0], new[:, 1])


def test_keys_say_what_values_may_not() -> None:
    new = both(np.random.default_rng(0), 40)
    found, given = np.asarray(contained(new)), np.asarray(new)
    bad = ~(np.abs(given) <= 3.39e38).all(axis=(1, 3))
    assert bad.any()
    assert (np.isnan(found[:, 0]).any(axis=-1) == bad).all()
    np.testing.assert_array_equal(found.swapaxes(1, 2)[~bad], given.swapaxes(1, 2)[~bad])
    for kind in (jnp.bfloat16, jnp.float32):
        assert np.isfinite(np.asarray(contained(new)[:, 1].astype(kind), np.float32)).all()


@pytest.mark.parametrize("int8", [False, True], ids=["f32", "int8"])
@pytest.mark.parametrize("form", [pytest.param(form, marks=needs_kernels if form == "native" else ()) for form in TILES])
def test_only_lanes_that_see_it_are_hit(form: str, int8: bool) -> None:
    rng = np.random.default_rng(1)
    pool = both(rng, POOL, PAGE).transpose(2, 0, 3, 1, 4)  # [2, POOL, K, PAGE, Q]
    dirty = np.asarray(contained(pool.transpose(1, 3, 0, 2, 4).reshape(-1, 2, GROUPS, SIZE)))
    dirty = dirty.reshape(POOL, PAGE, 2, GROUPS, SIZE).transpose(2, 0, 3, 1, 4)
    lost = np.isnan(dirty[0]).any(axis=-1)  # [POOL, K, PAGE]
    position = np.array([0, 3, 15, 16, 40, 47, -1])
    table = np.stack([rng.permutation(POOL)[:3] for _ in position])
    q = rng.standard_normal((len(position), HEADS, SIZE)).astype(np.float32)

    def run(keys: np.ndarray) -> np.ndarray:
        pages = KeysValues(*(half_of(jnp.asarray(part), int8) for part in (keys, dirty[1])))

        def decode(q: jax.Array, table: jax.Array, position: jax.Array) -> jax.Array:
            read = lambda ids: kv_cache.read((pages,), 0, ids)  # noqa: E731
            return kernels.decode(q, read, table, position, TILES[form], kv_cache.stored((pages,), 0, table)).out

        return np.asarray(jax.jit(decode)(q, table, position))

    found, clean = run(dirty[0]), run(np.nan_to_num(dirty[0]))
    for lane, last in enumerate(position[:-1]):
        seen = lost[table[lane]].swapaxes(0, 1).reshape(GROUPS, -1)[:, : last + 1].any(axis=1).repeat(HEADS // GROUPS)
        assert np.isnan(found[lane][seen]).all()
        np.testing.assert_array_equal(found[lane][~seen], clean[lane][~seen])
    assert np.isfinite(found[-1]).all()
    assert np.isnan(found).any()


@pytest.mark.parametrize("earlier", [None, "f32", "int8"])
@pytest.mark.parametrize("form", [pytest.param(form, marks=needs_kernels if form == "native" else ()) for form in TILES if form != "paged"])
def test_only_prompts_that_see_it_are_hit(form: str, earlier: str | None) -> None:
    """Prompts of one step stand side by side; slot 1 holds NaN now, slot 2 stored it before, others share their tiles."""
    rng = np.random.default_rng(2)
    lengths, starts = (5, 6, 7, 20), np.array([20, 0, 17, 33] if earlier else [0] * 4)
    owner = np.array([slot for slot, length in enumerate(lengths) for _ in range(length)] + [-1, -1])
    position = np.array([starts[slot] + i for slot, length in enumerate(lengths) for i in range(length)] + [0, 0])
    new = rng.standard_normal((len(owner), 2, GROUPS, SIZE)).astype(np.float32)
    new[[7, -1], 1, 0, 3], stored = np.nan, rng.standard_normal((POOL, PAGE, 2, GROUPS, SIZE)).astype(np.float32)
    table = rng.permutation(POOL).reshape(4, 3)
    stored[table[2, 0], 3, 0, 1] = np.inf
    stored[table[0, 1], 4:] = stored[table[3, 2], 1:] = np.nan  # behind what is stored of these
    q = rng.standard_normal((len(owner), HEADS, SIZE)).astype(np.float32)

    def run(new: np.ndarray, stored: np.ndarray) -> np.ndarray:
        halves = contained(new).swapaxes(0, 2)  # [K, 2, T, Q]
        flat = contained(stored.reshape(-1, 2, GROUPS, SIZE)).reshape(stored.shape).transpose(2, 0, 3, 1, 4)
        pages = KeysValues(*(half_of(part, earlier == "int8") for part in flat))

        def prefill(q: jax.Array, table: jax.Array, starts: jax.Array) -> jax.Array:
            read = lambda ids: kv_cache.read((pages,), 0, ids)  # noqa: E731
            context = kernels.Context(read, table, jnp.arange(4), starts, kv_cache.stored((pages,), 0, table)) if earlier else None
            fresh = kernels.Fresh(KeysValues(halves[:, 0], halves[:, 1]), jnp.asarray(owner), jnp.asarray(position))
            return kernels.prefill(q, fresh.owner, fresh.position, fresh, context, TILES[form]).out

        return np.asarray(jax.jit(prefill)(q, table, starts))

    found, clean = run(new, stored), run(np.nan_to_num(new), np.nan_to_num(stored, posinf=0))
    hit = np.zeros((len(owner), GROUPS), bool)
    hit[(owner == 1) & (position >= 2), 0] = True
    if earlier:
        hit[owner == 2, 1] = True
    hit = hit.repeat(HEADS // GROUPS, axis=1)[:-2]  # of padding nothing is read
    assert np.isnan(found[:-2][hit]).all()
    np.testing.assert_array_equal(found[:-2][~hit], clean[:-2][~hit])


def test_rows_are_picked_one_by_one() -> None:
    x = np.random.default_rng(3).standard_normal((6, 8)).astype(np.float32)
    x[1, 2], x[4, 0] = np.nan, np.inf
    picked = np.zeros((4, 6), bool)
    picked[[0, 1, 2], [0, 1, 5]] = True
    found = np.asarray(_picked(jnp.asarray(picked), jnp.asarray(x)))
    np.testing.assert_array_equal(found[[0, 2, 3]], [x[0], x[5], np.zeros(8, np.float32)])
    assert np.isnan(found[1]).any()


def test_a_channel_that_is_not_finite_stays_none() -> None:
    array = np.random.default_rng(4).standard_normal((5, 8)).astype(np.float32)
    array[1, 3], array[2, 3], array[3] = np.nan, np.inf, 0
    for found in (quantize(array, (-1,)), quantize(jnp.asarray(array), (-1,))):
        assert np.isnan(np.asarray(found.scale)).tolist() == [False, True, True, False, False]
        assert (np.asarray(found.values)[3] == 0).all()


@dataclass(frozen=True)
class Case:
    """Where the poisoned model runs, and how it keeps keys and values; `native`: with the CPU's own kernels."""

    slice_name: str
    layout: Layout
    kv: DType = DType.F32
    native: bool = True


ONE = make_layout({"x": "replica"}, {"x": "none"})
HEADS_OF_BATCHES = make_layout({"x": "embed", "y": "ffn"}, {"x": "batch", "y": "heads"}, {"x": "heads", "y": "heads"})
SEQUENCES = make_layout({"x": "ffn", "y": "ffn"}, {"x": "sequence", "y": "batch"}, {"x": "sequence", "y": "heads"})
STAGES = make_layout({"x": "stage", "y": "ffn"}, {"x": "none", "y": "heads"})
CASES = {
    "one": Case("cpu:1", ONE),
    "one, without kernels": Case("cpu:1", ONE, native=False),
    "one, int8": Case("cpu:1", ONE, DType.INT8),
    "one, bf16": Case("cpu:1", ONE, DType.BF16),
    "batch and heads": Case("cpu:2x2", HEADS_OF_BATCHES),
    "batch and heads, without kernels": Case("cpu:2x2", HEADS_OF_BATCHES, native=False),
    "sequence": Case("cpu:2x2", SEQUENCES),
    "sequence, int8, without kernels": Case("cpu:2x2", SEQUENCES, DType.INT8, native=False),
    "stages": Case("cpu:3x2", STAGES),
}
MAX_LEN = 28


@cache
def poisoned(name: str) -> JaxRunner:
    """The demo with NaN in one row of its embeddings, few pages, and one program for everything."""
    case = CASES[name]
    plan = Plan(load_model_config("demo"), parse_slice(case.slice_name), case.layout, weights=DType.F32, kv=case.kv)
    plan = with_capacity(plan, Capacity(max_rows=8, max_len=MAX_LEN, prefill_tokens=16, page_size=4, extended=True))
    plan = replace(plan, buckets=plan.buckets[-1:], cache=replace(plan.cache, pages_per_shard=24 // plan.num_shards))
    mesh = device_mesh(plan)
    params = load_hf(resources.find("models", "demo"), plan.model, abstract_params(plan, mesh, False))
    embed = np.array(params["embed"])
    embed[POISON, 0] = np.nan
    params["embed"] = jax.device_put(embed, params["embed"].sharding)
    with pytest.MonkeyPatch.context() as patched:
        if not case.native:
            patched.setattr(cpu, "available", lambda: False)
        runner = JaxRunner(plan, params, mesh, 40)
        runner.warm_up()
    return runner


Case = tuple[list[int], SamplingParams]


def mixed(count: int, rng: random.Random) -> list[Case]:
    """Requests of many kinds, a third of them with the poisoned token somewhere; many share their beginnings."""
    beginnings = [[rng.randrange(3, 60) for _ in range(rng.randint(4, 12))] for _ in range(4)]
    beginnings.append([*beginnings[0][:4], POISON, *beginnings[0][:7]])
    several: list[Case] = []
    for number in range(count):
        prompt = rng.choice(beginnings)[: rng.randint(1, 12)] + [rng.randrange(3, 60) for _ in range(rng.randint(1, 6))]
        if rng.random() < 0.2:
            prompt.insert(rng.randrange(len(prompt) + 1), POISON)
        how = dict[str, Any](max_tokens=rng.randint(1, 9), seed=number, n=rng.choice((1, 1, 1, 3)), logprobs=True, ignore_eos=True)
        if rng.random() < 0.5:
            how |= {"temperature": rng.choice((0.7, 1.5, 1e30)), "top_k": rng.choice((0, 5)), "top_p": rng.choice((1.0, 0.9, 1e-38))}
        if rng.random() < 0.3:
            how |= {"frequency_penalty": 0.5, "repetition_penalty": 1.3, "logit_bias": {11: 1.0, POISON: rng.choice((-100.0, 3.0))}}
        several.append((prompt, SamplingParams(**how, prompt_logprobs=rng.random() < 0.2, top_logprobs=rng.choice((0, 0, 3)))))
    return several


def finite(output: RequestOutput) -> bool:
    """Whether everything that a client is given is a number, and every token one of the vocabulary."""
    tops = [value for top in output.top_logprobs or () for _, value in top]
    given = [value for value in (*(output.logprobs or ()), *(output.prompt_logprobs or ()), *tops) if value is not None]
    return bool(np.isfinite(given).all()) and all(0 <= token < 96 for token in output.tokens)


def check_answer(output: RequestOutput, alone: RequestOutput, kv: DType) -> None:
    """One answer among others: failed if it fed the poisoned token and only then, and as it is alone.

    With a narrow cache tokens depend a little on what a step computes and what it reads back; there log-probabilities are compared, as far
    as the tokens are the same.
    """
    fed = (*output.prompt, *output.tokens[:-1])
    failed = output.finish_reason is FinishReason.FAILED
    assert failed == isinstance(output.error, NotFinite)
    assert failed == (POISON in fed) or (failed and output.tokens[-1:] == (POISON,))
    assert finite(output)
    same = next((place for place, (a, b) in enumerate(zip(output.tokens, alone.tokens, strict=False)) if a != b), None)
    if kv is DType.F32:
        assert (output.tokens, output.finish_reason) == (alone.tokens, alone.finish_reason)
    shared = min(len(output.tokens), len(alone.tokens)) if same is None else same
    atol, rtol = (1e-3, 0.0) if kv is DType.F32 else (TOLERANCE[kv.value], 0.05)  # the demo's reach -20, far from the harness's order of 1
    np.testing.assert_allclose(output.logprobs[:shared], alone.logprobs[:shared], atol=atol, rtol=rtol)


def check_mixed(name: str, count: int, seed: int) -> tuple[int, int]:
    """Serve them together, with preemption, swapping, cached prefixes and a step ahead; returns how many failed, and how many did not."""
    runner, rng = poisoned(name), random.Random(seed)
    several = mixed(count, rng)
    alone = [Engine(runner).generate([prompt], params) for prompt, params in several]
    policy = MultiLevelFeedbackQueue(Estimates(lambda tokens: 1e-4, 1e-4), 5, pages=Pages(Eviction.REACTIVE, None))
    for each in (policy, FirstComeFirstServed(chunk_prefills=True)):
        engine = Engine(runner, policy=each, lag=1, prefix_caching=True, check_invariants=True)
        found: dict[str, list[RequestOutput]] = {}
        coming = [(str(number), *one) for number, one in enumerate(several)]
        coming += [(f"{name} again", prompt, params) for name, prompt, params in coming[: count // 4] if POISON not in prompt]
        names = [name for name, _, _ in coming]
        coming.reverse()
        while coming or engine.has_work:
            for _ in range(min(len(coming), rng.randrange(4))):
                request_id, prompt, params = coming.pop()
                engine.add_request(prompt, params, request_id)
            for output in engine.step():
                found.setdefault(output.id, []).append(output)
        for request_id in names:
            for one, output in zip(alone[int(request_id.split()[0])], sorted(found[request_id], key=lambda o: o.sample), strict=True):
                check_answer(output, one, CASES[name].kv)
        counts = engine.metrics
        assert counts.preemptions + counts.swap_outs > 0
        assert counts.cached_tokens > 0
        pool = engine._scheduler.pool
        assert pool.num_free_pages == runner.limits.num_shards * runner.limits.pages_per_shard
    outputs = [output for each in alone for output in each]
    return sum(output.finish_reason is FinishReason.FAILED for output in outputs), len(outputs)


def test_mixed_requests_are_answered_as_alone() -> None:
    failed, all_of_them = check_mixed("sequence", 24, 1)
    assert 0 < failed < all_of_them / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many_mixed_requests_are_answered_as_alone(name: str) -> None:
    failed, all_of_them = check_mixed(name, 200, 2)
    print(f"{name}: {all_of_them} samples of 200 requests, {failed} failed")  # shown with pytest -s
    assert 0 < failed < all_of_them / 2


def test_a_text_without_scores_is_named_and_no_other() -> None:
    runner = poisoned("sequence")
    plan = replace(runner.plan, buckets=(replace(runner.plan.buckets[0], extended=False, random=False),))
    scorer = Scorer(plan, runner.params, runner.mesh)
    good, bad = [3, 5, 7, 9, 11, 13, 2, 4], [1, 5, POISON, 7, 9, 11]
    scores = scorer.score([bad, good, bad, good[:4]])
    assert set(scores.errors) == {0, 2}
    assert "after 3 tokens" in str(scores.errors[0])
    alone = scorer.score([good])
    assert list(map(len, scores.logprobs)) == [2, 7, 2, 3]
    np.testing.assert_allclose(scores.logprobs[1], alone.logprobs[0], atol=1e-5)
    np.testing.assert_allclose(scores.logprobs[3], alone.logprobs[0][:3], atol=1e-5)
