"""The engine on tokens that one works out by hand."""

from __future__ import annotations

import pytest

from partinf.engine import FakeRunner, FinishReason, RequestLevel, SamplingParams, TokenEvent
from partinf.engine.step import DecodeRow, PageTable, PrefillChunk, RowSampling
from partinf.foundation.errors import InvalidInput
from tests.engine.support import LETTERS, ROOMY, Pieces, make_engine, run_all


def test_counting_up() -> None:
    engine = make_engine()
    (output,) = engine.generate([[3, 7]], SamplingParams(max_tokens=4, logprobs=True))
    assert output.tokens == (8, 9, 10, 11)
    assert output.finish_reason is FinishReason.LENGTH
    assert output.logprobs == (-8.0, -9.0, -10.0, -11.0)
    assert output.text == ""
    assert output.num_iterations == 4
    assert not engine.has_work


def test_weighted_sum_of_the_context() -> None:
    # 1·2 + 2·3 = 8; then + 3·8 = 32 = 3 (mod 29); then + 4·3 → 32 + 12 = 44 = 15.
    (output,) = make_engine(rule=None).generate([[2, 3]], SamplingParams(max_tokens=3))
    assert output.tokens == (8, 3, 15)


def test_the_steps_of_two_requests_one_of_which_joins_late() -> None:
    engine = make_engine()
    runner = engine._runner
    assert isinstance(runner, FakeRunner)
    engine.add_request([1, 2, 3, 4, 5], SamplingParams(max_tokens=3), "first")
    engine.step()
    engine.add_request([9], SamplingParams(max_tokens=1), "second")
    ended = [[output.id for output in engine.step()] for _ in range(2)]
    assert ended == [["second"], ["first"]]
    greedy = RowSampling(seed=runner.steps[0].prefill[0].sampling.seed)
    assert runner.steps[0].prefill == (PrefillChunk(0, 0, (1, 2, 3, 4, 5), 0, (PageTable((0, 1)),), True, greedy),)
    assert runner.steps[1].decode == (DecodeRow(0, 0, 6, 5, (PageTable((0, 1)),), greedy),)
    assert [(chunk.slot, chunk.tokens, chunk.tables) for chunk in runner.steps[1].prefill] == [(1, (9,), (PageTable((2,)),))]
    assert runner.steps[2].decode == (DecodeRow(0, 0, 7, 6, (PageTable((0, 1)),), greedy),)
    assert not runner.steps[2].prefill
    assert len(runner.steps) == 3


def test_end_of_sequence_is_a_token_but_no_text() -> None:
    engine = make_engine(tokenizer=Pieces(LETTERS.pieces, eos=5))
    stopped, ignored, by_id = engine.generate(
        ["ab", "ab", "ab"],
        [SamplingParams(max_tokens=6), SamplingParams(max_tokens=6, ignore_eos=True), SamplingParams(max_tokens=6, stop_token_ids=(4,))],
    )
    assert (stopped.tokens, stopped.text, stopped.finish_reason) == ((2, 3, 4, 5), "cde", FinishReason.STOP)
    assert (ignored.tokens, ignored.text, ignored.finish_reason) == ((2, 3, 4, 5, 6, 7), "cdefgh", FinishReason.LENGTH)
    assert (by_id.tokens, by_id.text, by_id.finish_reason) == ((2, 3, 4), "cd", FinishReason.STOP)


def test_max_tokens_is_cut_to_the_context() -> None:
    (output,) = make_engine(lambda context: 0).generate([[1] * 60], SamplingParams(max_tokens=1000))
    assert len(output.tokens) == ROOMY.max_len - 60
    assert output.finish_reason is FinishReason.LENGTH


def test_seeds() -> None:
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=7)

    def tokens(engine_seed: int, params: SamplingParams, request_id: str) -> tuple[int, ...]:
        engine = make_engine(None, seed=engine_seed)
        engine.add_request([1, 2], params, request_id)
        return run_all(engine)[request_id].tokens

    unseeded = SamplingParams(max_tokens=8, temperature=1.0)
    assert tokens(0, params, "a") == tokens(1, params, "b")
    assert tokens(0, unseeded, "a") == tokens(0, unseeded, "a")
    assert len({tokens(0, unseeded, "a"), tokens(0, unseeded, "b"), tokens(1, unseeded, "a"), tokens(0, params, "a")}) == 4


def test_cancel_frees_at_once_and_is_reported_once() -> None:
    engine = make_engine(limits=ROOMY)
    events: list[TokenEvent] = []
    engine.add_request([1], SamplingParams(max_tokens=50), "long", events.append)
    engine.add_request([1], SamplingParams(max_tokens=3), "short")
    engine.step()
    engine.step()
    free = engine._scheduler.pool.num_free_pages
    assert engine.cancel("long")
    assert not engine.cancel("long")
    assert not engine.cancel("never heard of")
    assert engine._scheduler.pool.num_free_pages > free
    outputs = run_all(engine)
    assert (outputs["long"].tokens, outputs["long"].finish_reason) == ((2, 3), FinishReason.CANCELLED)
    assert outputs["short"].tokens == (2, 3, 4)
    assert [event.token for event in events] == [2, 3, None]
    assert events[-1].finish_reason is FinishReason.CANCELLED


def test_a_callback_may_cancel_and_add() -> None:
    engine = make_engine()

    def on_token(event: TokenEvent) -> None:
        if event.index == 1 and event.token is not None:
            engine.cancel("a")
            engine.add_request([5], SamplingParams(max_tokens=1), "b")

    engine.add_request([1], SamplingParams(max_tokens=9), "a", on_token)
    outputs = run_all(engine)
    assert outputs["a"].tokens == (2, 3)
    assert outputs["b"].tokens == (6,)


def test_a_failing_callback_ends_its_own_request_only() -> None:
    engine = make_engine()

    def fails(event: TokenEvent) -> None:
        if event.index == 1:
            raise ZeroDivisionError("mine")

    engine.add_request([1], SamplingParams(max_tokens=5), "bad", fails)
    engine.add_request([1], SamplingParams(max_tokens=2), "last", fails)
    engine.add_request([1], SamplingParams(max_tokens=5), "good")
    outputs = run_all(engine)
    assert outputs["good"].tokens == (2, 3, 4, 5, 6)
    assert (outputs["bad"].finish_reason, outputs["bad"].tokens) == (FinishReason.FAILED, (2, 3))
    assert isinstance(outputs["bad"].error, ZeroDivisionError)
    # The answer of this one was complete when its callback failed.
    assert (outputs["last"].finish_reason, outputs["last"].tokens) == (FinishReason.LENGTH, (2, 3))
    assert isinstance(outputs["last"].error, ZeroDivisionError)


def test_a_failing_tokenizer_ends_its_own_request_only() -> None:
    engine = make_engine(tokenizer=Pieces("abc"))
    engine.add_request([1], SamplingParams(max_tokens=5), "runs out of pieces")
    engine.add_request([0], SamplingParams(max_tokens=2), "good")
    outputs = run_all(engine)
    assert outputs["good"].text == "bc"
    assert outputs["runs out of pieces"].finish_reason is FinishReason.FAILED
    assert isinstance(outputs["runs out of pieces"].error, IndexError)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_failing_runner_ends_all_in_flight_and_the_engine_goes_on(lag: int) -> None:
    fails = [True]

    def rule(context: list[int]) -> int:
        if len(context) == 3 and fails:
            raise OSError("device lost")
        return context[-1] + 1

    engine = make_engine(rule, lag=lag)  # type: ignore[arg-type]
    engine.add_request([1], SamplingParams(max_tokens=5), "a")
    engine.add_request([1, 2], SamplingParams(max_tokens=5), "b")
    with pytest.raises(OSError, match="device lost"):
        run_all(engine)
    outputs = run_all(engine)
    assert {output.finish_reason for output in outputs.values()} == {FinishReason.FAILED}
    assert set(outputs) == {"a", "b"}
    fails.clear()
    (output,) = engine.generate([[1]], SamplingParams(max_tokens=3))
    assert output.tokens == (2, 3, 4)


def test_generate_takes_only_well_formed_batches() -> None:
    engine = make_engine()
    with pytest.raises(InvalidInput, match="one text"):
        engine.generate("hello")
    with pytest.raises(InvalidInput, match="2 params for 1 prompts"):
        engine.generate([[1]], [SamplingParams(), SamplingParams()])
    assert engine.generate([]) == []


def test_an_interrupted_generate_leaves_nothing_behind() -> None:
    engine = make_engine()

    def interrupts(event: TokenEvent) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1], [2]], SamplingParams(max_tokens=5), on_token=interrupts)
    assert engine._scheduler.pool.num_free_pages == ROOMY.pages_per_shard


def test_request_level_takes_the_same_tokens_in_more_iterations() -> None:
    prompts, params = [[1], [2], [3], [4]], [SamplingParams(max_tokens=n) for n in (8, 1, 1, 8)]
    engines = [make_engine(policy=RequestLevel(2)), make_engine()]
    outputs = [[output.tokens for output in engine.generate(prompts, params)] for engine in engines]
    assert outputs[0] == outputs[1]
    assert [engine.metrics.iterations for engine in engines] == [16, 8]


def test_a_policy_that_runs_no_sequence_is_an_error() -> None:
    class Idle:
        def schedule(self, batch: object) -> None:
            pass

    engine = make_engine(policy=Idle())
    engine.add_request([1])
    with pytest.raises(RuntimeError, match="runs none of 1 requests"):
        engine.step()
