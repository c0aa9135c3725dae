"""An engine's tokens of a mixture of experts do not depend on batch, policy, preemption or mesh, as far as the reference decides them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partinf.buckets import Capacity, with_capacity
from partinf.engine import Engine, SamplingParams
from partinf.engine.estimates import Estimates
from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
from partinf.engine.policies.ranked import Eviction, Pages
from partinf.execution.runner import JaxRunner
from partinf.hardware.slices import parse_slice
from partinf.layout import Layout
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
PROMPTS = [[3 + n, 5, 7, 9 + n] for n in range(6)]
COUNT = 14


def runner_on(slice_name: str, layout: Layout, unrolled: bool) -> JaxRunner:
    plan = Plan(MODEL, parse_slice(slice_name), layout, weights=DType.F32, kv=DType.F32)
    plan = with_capacity(plan, Capacity(max_rows=8, max_len=32, prefill_tokens=32, page_size=4, max_prompt_len=16, random=False))
    plan = replace(plan, cache=replace(plan.cache, pages_per_shard=12))
    mesh = device_mesh(plan)
    return JaxRunner(plan, place_params(plan, mesh, host_params(MODEL), unrolled), mesh, 0)


def num_decided(tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> int:
    """So many tokens after the prompt are decided: neither the choice of one nor of the experts of any before it, in any layer, hangs on
    less than the tolerance."""
    routers: list[Any] = []
    routed = reference._routed

    def watched(layer: Any, of: Any, x: jax.Array) -> jax.Array:
        scores = jax.nn.softmax(jnp.einsum("ble,xe->blx", x, layer["router"]), axis=-1)
        best = jax.lax.top_k(scores, of.per_token + 1)[0]
        routers.append(best[0, :, -2] - best[0, :, -1])
        return routed(layer, of, x)

    with monkeypatch.context() as patched:
        patched.setattr(reference, "_routed", watched)
        logits = reference.forward(host_params(MODEL), MODEL, jnp.asarray([tokens]))[0]
    best = jax.lax.top_k(logits, 2)[0]
    margins = np.minimum(np.min(np.stack(routers), axis=0), np.asarray(best[:, 0] - best[:, 1]))
    undecided = np.flatnonzero(margins < TOLERANCE["f32"])
    prompt = len(tokens) - COUNT
    later = undecided[undecided >= prompt - 1]
    return COUNT if not later.size else int(later[0]) - (prompt - 1)


@pytest.mark.slow
def test_tokens_are_the_same_in_any_company_on_any_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=COUNT, ignore_eos=True)
    tokens = [reference.greedy(host_params(MODEL), MODEL, prompt, COUNT) for prompt in PROMPTS]
    decided = [num_decided([*prompt, *after], monkeypatch) for prompt, after in zip(PROMPTS, tokens, strict=True)]
    assert sum(decided) > 0.9 * COUNT * len(PROMPTS)
    wanted = [after[:count] for after, count in zip(tokens, decided, strict=True)]

    def check(found: list[Any]) -> None:
        assert [list(one.tokens)[:count] for one, count in zip(found, decided, strict=True)] == wanted

    for slice_name, layout, unrolled in (("cpu:1", ALONE, True), ("cpu:2x2", DATA_PARALLEL, False)):
        runner = runner_on(slice_name, layout, unrolled)
        check([Engine(runner).generate([prompt], params)[0] for prompt in PROMPTS])
        check(Engine(runner).generate(PROMPTS, params))
        estimates = Estimates(first_iteration=lambda tokens: 0.01, decode=0.01)
        engine = Engine(runner, policy=MultiLevelFeedbackQueue(estimates, 4, pages=Pages(Eviction.RECOMPUTE, None)), check_invariants=True)
        check(engine.generate(PROMPTS, params))
        assert engine.metrics.preemptions > 0 or slice_name != "cpu:1"
