"""Deadlines, and the explicit refusal of what would wait too long."""

from __future__ import annotations

import pytest

from partinf.engine import Engine, FakeRunner, FinishReason, RequestLevel, SamplingParams
from partinf.foundation.errors import InvalidInput, Overloaded
from tests.engine.support import LETTERS, ROOMY, Ticks, count_up, make_engine, run_all

LONG = SamplingParams(max_tokens=20)


def engine_with(clock: Ticks, **options: object) -> Engine:
    return Engine(FakeRunner(ROOMY, count_up), clock=clock, check_invariants=True, **options)  # type: ignore[arg-type]


def test_a_request_ends_at_its_deadline_with_what_it_has() -> None:
    clock = Ticks()
    engine = engine_with(clock, tokenizer=LETTERS)
    engine.add_request("a", SamplingParams(max_tokens=20, timeout=3.0, stop="dx"), "bounded")
    engine.add_request("c", LONG, "free")
    outputs = {}
    while engine.has_work:
        outputs |= {output.id: output for output in engine.step()}
        clock.now += 1.0
    bounded = outputs["bounded"]
    assert (bounded.finish_reason, bounded.tokens, bounded.text) == (FinishReason.TIMEOUT, (1, 2, 3), "bcd")  # "d" was held back for "dx"
    assert bounded.times.finished == 3.0
    assert outputs["free"].finish_reason is FinishReason.LENGTH
    assert engine._scheduler.pool.num_free_pages == ROOMY.pages_per_shard
    assert engine.metrics.summary().finished[FinishReason.TIMEOUT] == 1


def test_time_counts_from_arrival_and_while_waiting() -> None:
    clock = Ticks()
    clock.now = 10.0
    engine = engine_with(clock, policy=RequestLevel(1))
    engine.add_request([1], LONG, "first")
    engine.step()
    engine.add_request([2], SamplingParams(timeout=5.0), "late", arrival=6.0)
    engine.add_request([2], SamplingParams(timeout=1.5, n=2), "queued")
    clock.now = 11.0
    assert [output.id for output in engine.step()] == ["late"]
    clock.now = 12.0
    ended = engine.step()
    assert [(output.id, output.sample, output.finish_reason, output.tokens) for output in ended] == [
        ("queued", sample, FinishReason.TIMEOUT, ()) for sample in (0, 1)
    ]
    assert run_all(engine)["first"].tokens == tuple(range(2, 22))


def test_a_complete_answer_that_waits_for_its_batch_is_returned_at_its_deadline() -> None:
    clock = Ticks()
    engine = engine_with(clock, policy=RequestLevel(2))
    engine.add_request([1], SamplingParams(max_tokens=1, timeout=3.0), "short")
    engine.add_request([1], LONG, "long")
    ended = []
    for _ in range(5):
        ended += engine.step()
        clock.now += 1.0
    assert [(output.id, output.finish_reason, output.times.finished) for output in ended] == [("short", FinishReason.LENGTH, 3.0)]
    assert set(run_all(engine)) == {"long"}


def test_a_deadline_of_a_request_that_has_ended_has_no_effect() -> None:
    clock = Ticks()
    engine = engine_with(clock)
    engine.add_request([1], SamplingParams(max_tokens=1, timeout=1.0), "x")
    assert run_all(engine)["x"].finish_reason is FinishReason.LENGTH
    engine.add_request([1], SamplingParams(max_tokens=2, timeout=9.0), "x")
    clock.now = 5.0
    assert run_all(engine)["x"].finish_reason is FinishReason.LENGTH


def test_a_full_queue_refuses_and_loses_nothing() -> None:
    clock = Ticks()
    engine = engine_with(clock, policy=RequestLevel(1), max_waiting=2)
    engine.add_request([1], LONG, "runs")
    engine.step()
    engine.add_request([1], SamplingParams(max_tokens=1, n=3), "a")
    engine.add_request([1], SamplingParams(max_tokens=1), "b")
    for add in (engine.add_request, engine.stream):
        with pytest.raises(Overloaded, match="2 requests with 2 prompt tokens wait") as caught:
            add([1], None, "c")
        assert caught.value.retry_after > 0
    engine.cancel("b")
    engine.add_request([1], SamplingParams(max_tokens=1), "c")
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert sorted((output.id, output.sample) for output in outputs) == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("c", 0), ("runs", 0)]
    assert engine.generate([[1]] * 5, SamplingParams(max_tokens=1))[4].tokens == (2,)  # its caller waits


def test_tokens_that_wait_are_bounded_and_a_lone_request_never_refused() -> None:
    engine = engine_with(Ticks(), policy=RequestLevel(1), max_waiting_tokens=10)
    engine.add_request([1] * 30, LONG, "runs")
    engine.step()
    engine.add_request([1] * 20, SamplingParams(max_tokens=1))
    with pytest.raises(Overloaded):
        engine.add_request([1])
    run_all(engine)
    for _ in range(2):
        engine.add_request([1] * 5)
    with pytest.raises(Overloaded):
        engine.add_request([1])


def test_retry_after_follows_the_pace_of_the_queue() -> None:
    clock = Ticks()
    engine = engine_with(clock, policy=RequestLevel(1), max_waiting=2, max_waiting_tokens=12)
    for number in range(4):  # one request starts every 4 seconds
        engine.add_request([1] * 4, SamplingParams(max_tokens=4), f"{number}")
        for _ in range(4):
            engine.step()
            clock.now += 1.0
    engine.add_request([1], LONG, "runs")
    engine.step()
    for name in "ab":
        engine.add_request([1] * 4, LONG, name)
    with pytest.raises(Overloaded) as one:
        engine.add_request([1])
    with pytest.raises(Overloaded) as more:
        engine.add_request([1] * 12)
    assert one.value.retry_after == pytest.approx(16 / 5)
    assert more.value.retry_after == pytest.approx(2 * 16 / 5)  # both have to go


@pytest.mark.parametrize("bounds", [{"max_waiting": 0}, {"max_waiting": -1, "max_waiting_tokens": 0}])
def test_bounds_below_one_are_refused(bounds: dict[str, int]) -> None:
    with pytest.raises(InvalidInput) as caught:
        make_engine(**bounds)
    assert len(caught.value.offences) == len(bounds)
