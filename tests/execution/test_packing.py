"""Whatever parameters a request is accepted with fit the 32 bits of a step's arrays: no request can fail the step of others there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from partinf.buckets import runner_limits
from partinf.engine.admission import RequestCheck
from partinf.engine.params import MAX_TEMPERATURE, SamplingParams
from partinf.engine.step import PageTable, PrefillChunk, SlotStart, Step
from partinf.execution.place import place_step
from partinf.foundation.errors import collect
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.config import ModelConfig
from partinf.plans import Bucket, CacheConfig, Plan
from partinf.transformer.batch import pack
from partinf.transformer.slots import pack_start
from partinf.workload import DType

MODEL = ModelConfig("tiny", 1, 64, 128, 8, 4, 16, 500, max_len=64)
BUCKET = Bucket(4, 4, 16, 4, 0, random=True, extended=True)
PLAN = Plan(MODEL, parse_slice("cpu:1"), make_layout({"x": "replica"}, {"x": "none"}), weights=DType.F32, kv=DType.F32, max_len=64)
PLAN = replace(PLAN, cache=CacheConfig(16, 16, 4), buckets=(BUCKET,))
LIMITS = runner_limits(PLAN)
CHECK = RequestCheck(LIMITS, None, seed=0)

WHOLE = st.one_of(
    st.integers(), st.sampled_from([sign * (2**bits + more) for bits in (31, 32, 63, 64, 2000) for more in (-1, 0, 1) for sign in (1, -1)])
)
REAL = st.one_of(st.floats(), st.floats(0, 1), st.sampled_from([1e-46, 1e-38, 3.4e38, 3.5e38, MAX_TEMPERATURE, 10**400]), WHOLE)
VALUES: dict[str, st.SearchStrategy[Any]] = dict.fromkeys(("max_tokens", "top_k", "seed", "top_logprobs", "priority"), WHOLE)
VALUES |= dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "timeout"), REAL)
VALUES |= {"n": st.integers(-1, 200), "logit_bias": st.dictionaries(st.one_of(st.integers(0, 600), WHOLE), REAL, max_size=3)}


@given(st.fixed_dictionaries({}, optional=VALUES))
@example({"temperature": MAX_TEMPERATURE, "top_k": 2**64, "top_p": 5e-324, "min_p": 1e-46, "seed": 2**32 - 1, "top_logprobs": 20})
@example({"temperature": 5e-324, "repetition_penalty": 1e3, "presence_penalty": -2, "frequency_penalty": 1e-300, "n": 128})
@example({"logit_bias": {499: 100, 0: -100.0}, "max_tokens": 10**400, "priority": 2**32 - 1, "timeout": 1e-300})
def test_accepted_parameters_fit(values: dict[str, Any]) -> None:
    offences: list[str] = []
    request = collect(offences, lambda: CHECK([1, 2, 3], SamplingParams(**values), "name", 0, 0.0))
    assert all(offence.removeprefix("request name: ").split()[0] in values for offence in offences)
    if request is None:
        return
    how = request.sampling
    chunk = PrefillChunk(0, 0, request.prompt, 0, (PageTable((0,)),), True, replace(how, sample_index=request.params.n - 1))
    start = SlotStart(0, request.prompt, (), request.params.logit_bias, request.ends)
    placed = place_step(Step(prefill=(chunk,), starts=(start,)), BUCKET, PLAN, LIMITS)
    (row,) = placed.prefill_rows
    sampling, extended = placed.batch.sampling, placed.batch.extended
    if not how.greedy:
        assert (sampling.top_k[row], sampling.seed[row], sampling.sample[row]) == (how.top_k, how.seed, request.params.n - 1)
        np.testing.assert_allclose(sampling.temperature[row], how.temperature, rtol=1e-6, atol=1e-38)
        np.testing.assert_allclose(sampling.top_p[row], how.top_p, rtol=1e-6, atol=1e-38)
    if how.extended:
        assert extended.alternatives[row] == how.top_logprobs
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(placed.batch))
    np.testing.assert_array_equal(pack([placed.batch])[0], placed.vector)
    pack_start(*start, PLAN.max_len)
