"""A token that cannot be chosen, because logits are NaN, ends its own request as failed; no other request reuses its pages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from partinf.engine import Engine, FakeRunner, FinishReason, SamplingParams
from partinf.engine.step import PageTable, PrefillChunk, PromptScore, RowSampling, SampledToken
from partinf.foundation.errors import NotFinite
from tests.engine.support import ROOMY, make_engine, run_all

POISON = 13
FOUR = SamplingParams(max_tokens=4)


class Poisoned(FakeRunner):
    """Gives no token after, and no log-probability of, what follows token `POISON`."""

    def _sample(self, slot: int, tables: tuple[PageTable, ...], length: int, sampling: RowSampling, mask: bytes | None) -> SampledToken:
        sampled = super()._sample(slot, tables, length, sampling, mask)
        return SampledToken(-1, float("nan")) if POISON in self._context(slot, tables, length - 1, length) else sampled

    def _score(self, chunk: PrefillChunk) -> tuple[PromptScore, ...]:
        context = self._context(chunk.slot, chunk.tables, chunk.start, chunk.end)
        bad = (POISON in context[: chunk.start + 1 + place] for place in range(len(chunk.targets)))
        return tuple(
            score._replace(logprob=float("nan")) if lost else score for lost, score in zip(bad, super()._score(chunk), strict=True)
        )


def poisoned(**options: object) -> Engine:
    rule = lambda context: context[-1] + 1  # noqa: E731
    return Engine(Poisoned(ROOMY, rule), check_invariants=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("lag", [0, 1])
def test_only_its_own_request_fails(lag: int) -> None:
    engine = poisoned(lag=lag)
    bad, good, late = engine.generate([[1, POISON, 2], [1, 2], [POISON - 2]], FOUR)
    assert (bad.finish_reason, bad.tokens) == (FinishReason.FAILED, ())
    assert isinstance(bad.error, NotFinite)
    assert "after 3 tokens" in str(bad.error)
    assert (good.finish_reason, good.tokens, good.error) == (FinishReason.LENGTH, (3, 4, 5, 6), None)
    assert (late.finish_reason, late.tokens) == (FinishReason.FAILED, (POISON - 1, POISON))  # with what it had
    assert engine.generate([[1, 2]], FOUR)[0].tokens == good.tokens
    assert engine.metrics.summary().finished[FinishReason.FAILED] == 2


def test_every_sample_of_it_fails_and_a_stream_says_why() -> None:
    engine = poisoned()
    assert [output.finish_reason for output in engine.generate([[POISON] * 9], replace(FOUR, n=3))] == [FinishReason.FAILED] * 3
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        list(engine.stream([1, POISON], FOUR))


def test_its_pages_are_not_found_again() -> None:
    engine = poisoned(prefix_caching=True)
    prompt = [1, 2, 3, 4, POISON, 5, 6, 7, 8]
    engine.generate([prompt], FOUR)
    assert engine._scheduler.pool.num_free_pages == ROOMY.pages_per_shard
    engine.generate([[*prompt[:4], 9]], FOUR)
    assert engine.metrics.cached_tokens == 0
    engine.generate([[*prompt[:4], 10]], FOUR)
    assert engine.metrics.cached_tokens == 4  # those of the one that ended well are


def test_a_prompt_without_scores_fails() -> None:
    engine = poisoned()
    params = SamplingParams(max_tokens=2, prompt_logprobs=True)
    engine.add_request([1, 2, POISON, 3, 4], params, "bad")
    engine.add_request([1, 2, 3], params, "good")
    outputs = run_all(engine)
    assert outputs["bad"].finish_reason is FinishReason.FAILED
    assert outputs["bad"].prompt_logprobs is not None
    assert outputs["bad"].prompt_logprobs[3:] == (None, None)
    assert outputs["bad"].prompt_logprobs[1] is not None
    assert outputs["good"].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("top_k", [29, 30, 2**31, 2**64, 10**400])
def test_top_k_beyond_the_vocabulary_keeps_all(top_k: int) -> None:
    engine = make_engine(None)
    sampled = SamplingParams(max_tokens=4, temperature=1.0, seed=3)
    want, found = (engine.generate([[1, 2]], params)[0].tokens for params in (sampled, replace(sampled, top_k=top_k)))
    assert found == want
    assert all(row.sampling.top_k == 0 for step in engine._runner.steps for row in (*step.decode, *step.prefill))


def test_an_arrival_is_a_time() -> None:
    engine = make_engine()
    for arrival in (float("nan"), float("inf"), 10**400, "now"):
        with pytest.raises(ValueError, match="arrival = .*; valid: seconds"):
            engine.add_request([1], FOUR, arrival=arrival)  # type: ignore[arg-type]
