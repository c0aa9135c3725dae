"""An engine's tokens of a mixture of experts do not depend on batch, policy, preemption or mesh, as far as the reference decides them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.buckets import Capacity, with_capacity
from partinf.engine import Engine, FirstComeFirstServed, RequestOutput, SamplingParams
from partinf.engine.estimates import Estimates
from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
from partinf.engine.policies.ranked import Eviction, Pages
from partinf.execution.runner import JaxRunner
from partinf.execution.score import Scorer
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.partition.sharding import device_mesh
from partinf.plans import Plan
from partinf.transformer import reference
from partinf.workload import DType
from tests.execution.harness import TOLERANCE, host_params, place_params
from tests.execution.mixtures import DENSE_FIRST, model_of

MODEL = model_of("plain", ffn_dim=32, num_layers=3, max_len=64, **DENSE_FIRST)
ALONE = make_layout({"x": "replica"}, {"x": "batch"})
DATA_PARALLEL = make_layout(
    {"x": "replica", "y": "replica"},
    {"x": "batch", "y": "batch"},
    prefill_dispatch="exchange",
    experts={"x": "expert", "y": "ffn"},
)
SHARED = [11, 2, 6, 4, 19, 8, 3, 7]  # two pages
PROMPTS = [[3 + n, 5, 7, 9 + n] for n in range(6)]
MORE = [*PROMPTS, *([*SHARED, 4 + n, 2 * n] for n in range(10))]
COUNT = 14
PARAMS = SamplingParams(max_tokens=COUNT, ignore_eos=True)
MESHES = {"cpu:1": (ALONE, True), "cpu:2x2": (DATA_PARALLEL, False)}


@cache
def runner_on(slice_name: str) -> JaxRunner:
    """Eight rows, twice as many sequences that may hold pages, and pages for half of these."""
    layout, unrolled = MESHES[slice_name]
    plan = Plan(MODEL, parse_slice(slice_name), layout, weights=DType.F32, kv=DType.F32)
    capacity = Capacity(8, 32, prefill_tokens=16, page_size=4, max_residents=16, random=False)
    plan = with_capacity(plan, capacity)
    plan = replace(plan, cache=replace(plan.cache, pages_per_shard=12))
    mesh = device_mesh(plan)
    return JaxRunner(plan, place_params(plan, mesh, host_params(MODEL), unrolled), mesh, num_host_pages=80)


@cache
def decided() -> list[list[int]]:
    """The reference's tokens of each prompt of `MORE`, as far as it decides them: neither the choice of one nor of the experts of any
    before it, in any layer, hangs on less than the tolerance."""
    tokens = [reference.greedy(host_params(MODEL), MODEL, prompt, COUNT) for prompt in MORE]
    with pytest.MonkeyPatch.context() as patched:
        counts = [_num_decided([*prompt, *after], patched) for prompt, after in zip(MORE, tokens, strict=True)]
    assert sum(counts) > 0.9 * COUNT * len(MORE)
    return [after[:count] for after, count in zip(tokens, counts, strict=True)]


def _num_decided(tokens: list[int], patched: pytest.MonkeyPatch) -> int:
    routers: list[Any] = []
    routed = reference._routed

    def watched(layer: Any, of: Any, x: jax.Array) -> jax.Array:
        scores = jax.nn.softmax(jnp.einsum("ble,xe->blx", x, layer["router"]), axis=-1)
        best = jax.lax.top_k(scores, of.per_token + 1)[0]
        routers.append(best[0, :, -2] - best[0, :, -1])
        return routed(layer, of, x)

    patched.setattr(reference, "_routed", watched)
    logits = reference.forward(host_params(MODEL), MODEL, jnp.asarray([tokens]))[0]
    patched.setattr(reference, "_routed", routed)
    best = jax.lax.top_k(logits, 2)[0]
    margins = np.minimum(np.min(np.stack(routers), axis=0), np.asarray(best[:, 0] - best[:, 1]))
    undecided = np.flatnonzero(margins < TOLERANCE["f32"])
    prompt = len(tokens) - COUNT
    later = undecided[undecided >= prompt - 1]
    return COUNT if not later.size else int(later[0]) - (prompt - 1)


def check(found: list[RequestOutput]) -> None:
    """Outputs of the first prompts of `MORE`."""
    wanted = decided()[: len(found)]
    assert [list(one.tokens)[: len(tokens)] for one, tokens in zip(found, wanted, strict=True)] == wanted


def queue(eviction: Eviction) -> MultiLevelFeedbackQueue:
    estimates = Estimates(first_iteration=lambda tokens: 0.01, decode=0.01)
    return MultiLevelFeedbackQueue(estimates, 4, pages=Pages(eviction, None))


@pytest.mark.slow
@pytest.mark.parametrize("slice_name", MESHES)
def test_tokens_are_the_same_in_any_company_on_any_mesh(slice_name: str) -> None:
    runner = runner_on(slice_name)
    check([Engine(runner).generate([prompt], PARAMS)[0] for prompt in PROMPTS])
    check(Engine(runner).generate(PROMPTS, PARAMS))
    engine = Engine(runner, policy=queue(Eviction.RECOMPUTE), check_invariants=True)
    check(engine.generate(MORE, PARAMS))
    assert engine.metrics.preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize("slice_name", MESHES)
def test_tokens_are_the_same_when_pages_are_swapped(slice_name: str) -> None:
    engine = Engine(runner_on(slice_name), policy=queue(Eviction.REACTIVE), lag=1, check_invariants=True)
    check(engine.generate(MORE, PARAMS))
    assert engine.metrics.swapped_out_pages > 0


@pytest.mark.slow
@pytest.mark.parametrize("slice_name", MESHES)
def test_tokens_are_the_same_after_a_prefix_that_is_found(slice_name: str) -> None:
    engine = Engine(runner_on(slice_name), policy=FirstComeFirstServed(), prefix_caching=True, check_invariants=True)
    check(engine.generate(MORE, PARAMS))
    (again,) = engine.generate([MORE[-1]], PARAMS)
    assert again.num_cached == len(SHARED)
    assert list(again.tokens)[: len(decided()[-1])] == decided()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("slice_name", MESHES)
def test_scores_are_those_of_the_reference(slice_name: str) -> None:
    """Of texts longer than a step and shorter ones, which share steps."""
    runner = runner_on(slice_name)
    texts = [[7 * n % 250 for n in range(1, 31)], [11 * n % 250 for n in range(1, 14)], SHARED]
    found = Scorer(runner.plan, runner.params, runner.mesh).score(texts)
    for text, scores in zip(texts, found.logprobs, strict=True):
        logprobs = jax.nn.log_softmax(reference.forward(host_params(MODEL), MODEL, jnp.asarray([text]))[0])
        np.testing.assert_allclose(scores, [logprobs[place, token] for place, token in enumerate(text[1:])], atol=TOLERANCE["f32"])
