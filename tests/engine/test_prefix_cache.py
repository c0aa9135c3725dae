"""Pages of equal beginnings are shared, counted, and let go the longest unused first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from partinf.engine import Engine, FakeRunner, SamplingParams
from tests.engine.support import ROOMY, alone

ONE = SamplingParams(max_tokens=2)


def engine_with(num_pages: int = 64, **limits: object) -> Engine:
    return Engine(FakeRunner(replace(ROOMY, pages_per_shard=num_pages, **limits)), prefix_caching=True, check_invariants=True)  # type: ignore[arg-type]


def test_a_shared_beginning_is_computed_once() -> None:
    engine = engine_with()
    first, second = list(range(10)), [*range(8), 20, 21]
    engine.generate([first], ONE)
    (output,) = engine.generate([second], ONE)
    assert output.tokens == alone(ROOMY, second, ONE, "x").tokens
    assert engine.metrics.cached_tokens == 8
    assert [(chunk.start, len(chunk.tokens)) for step in engine._runner.steps for chunk in step.prefill] == [(0, 10), (8, 2)]


def test_a_full_hit_computes_the_last_token_again() -> None:
    engine = engine_with()
    prompt = list(range(8))
    engine.generate([prompt], ONE)
    (output,) = engine.generate([prompt], ONE)
    assert output.tokens == alone(ROOMY, prompt, ONE, "x").tokens
    assert engine.metrics.cached_tokens == 4  # of two full pages the second holds the last token


def test_requests_in_one_step_do_not_read_what_it_writes() -> None:
    engine = engine_with()
    prompt = list(range(9))
    outputs = engine.generate([prompt, prompt], ONE)
    assert outputs[0].tokens == outputs[1].tokens == alone(ROOMY, prompt, ONE, "x").tokens
    assert engine.metrics.cached_tokens == 0


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    engine = engine_with()
    params = SamplingParams(max_tokens=10)
    (first,) = engine.generate([[1, 2, 3]], params)
    engine.generate([[1, 2, 3, *first.tokens, 5]], ONE)
    assert engine.metrics.cached_tokens == 12


def test_pages_that_no_sequence_holds_are_free() -> None:
    engine = engine_with(num_pages=4)
    assert engine._scheduler.pool.num_free_pages == 4
    for start in range(0, 24, 8):  # each takes three of the four pages
        prompt = [start + n for n in range(9)]
        (output,) = engine.generate([prompt], ONE)
        assert output.tokens == alone(ROOMY, prompt, ONE, "x").tokens
    assert engine._scheduler.pool.num_free_pages == 4
    engine.generate([[16 + n for n in range(9)]], ONE)
    assert engine.metrics.cached_tokens == 8  # the last prompt is still there, the others went first
    engine.generate([list(range(9))], ONE)
    assert engine.metrics.cached_tokens == 8


def test_a_cached_prefix_does_not_unbalance_the_shards() -> None:
    engine = engine_with(num_shards=2)
    prompt = list(range(9))
    engine.generate([prompt], ONE)
    engine.generate([prompt] * 6, SamplingParams(max_tokens=3))
    decoding = [step for step in engine._runner.steps if len(step.decode) == 6]
    assert decoding
    for step in decoding:
        assert abs(sum(row.shard == 0 for row in step.decode) - 3) <= 1


def test_nothing_is_remembered_after_a_failure() -> None:
    fails = [False]

    def rule(context: list[int]) -> int:
        if fails[0]:
            raise OSError("device lost")
        return 1

    engine = Engine(FakeRunner(ROOMY, rule), prefix_caching=True, check_invariants=True)
    engine.generate([list(range(9))], ONE)
    fails[0] = True
    with pytest.raises(OSError, match="device lost"):
        engine.generate([[3]], ONE)
    fails[0] = False
    engine.generate([list(range(9))], ONE)
    assert engine.metrics.cached_tokens == 0
