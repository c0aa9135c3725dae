"""The policies on cases that one works out by hand, and any of them under preemption after every token."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partinf.engine import Engine, FakeRunner, FirstComeFirstServed, Orca, Policy, RequestLevel, RunnerLimits, SamplingParams
from partinf.engine.batch import BatchBuilder, ScheduledBatch
from partinf.engine.estimates import Estimates
from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
from partinf.engine.policies.priority import by_priority
from partinf.engine.policies.ranked import Eviction, Pages
from partinf.engine.policies.registry import POLICIES, PolicyOptions, make_policy
from partinf.engine.policies.srpt import shortest_remaining_first
from partinf.engine.request import Sequence, Status
from partinf.engine.step import Step, StepOutput
from partinf.foundation.errors import InvalidInput
from partinf.simulation.cost_runner import CostRunner
from partinf.simulation.step_price import Price
from tests.engine.support import ROOMY, VOCAB, alone, make_engine, run_all
from tests.engine.test_scheduler import trace

# A prompt token takes 0.1 s, a decode iteration 0.4 s.
ESTIMATES = Estimates(first_iteration=lambda tokens: tokens / 10, decode=0.4)


def price(step: Step) -> Price:
    return Price(step.num_prefill_tokens / 10 + (0.4 if step.decode else 0.0), step.num_tokens)


def mean_latency(policy: Policy) -> float:
    """Three jobs at once, one at a time: (first iteration, further iterations) of 0.6 s and 3, 2.5 s and 2, 0.7 s and none."""
    runner = CostRunner(ROOMY, price)
    engine = Engine(runner, policy=policy, clock=runner.clock, check_invariants=True)
    for prompt_len, max_tokens in ((6, 4), (25, 3), (7, 1)):
        engine.add_request([1] * prompt_len, SamplingParams(max_tokens=max_tokens))
    return sum(output.times.completion_time or 0.0 for output in run_all(engine).values()) / 3


def test_the_worked_example() -> None:
    """FastServe's four figures for three jobs; the jobs are ones that give all four."""
    assert mean_latency(Orca(1)) == pytest.approx(4.23, abs=0.005)
    assert mean_latency(MultiLevelFeedbackQueue(ESTIMATES, 1, skip_join=False, alpha=100.0)) == pytest.approx(5.0, abs=0.005)
    assert mean_latency(MultiLevelFeedbackQueue(ESTIMATES, 1, alpha=100.0)) == pytest.approx(3.33, abs=0.005)
    assert mean_latency(shortest_remaining_first(ESTIMATES, 1)) == pytest.approx(3.0, abs=0.005)


def test_request_level_returns_a_batch_when_all_of_it_is_done() -> None:
    runner = CostRunner(ROOMY, price)
    engine = Engine(runner, policy=RequestLevel(2), clock=runner.clock)
    for name, max_tokens in (("short", 1), ("long", 3), ("next", 1)):
        engine.add_request([1] * 5, SamplingParams(max_tokens=max_tokens), name)
    outputs = run_all(engine)
    assert {name: output.times.finished for name, output in outputs.items()} == pytest.approx({"short": 1.8, "long": 1.8, "next": 2.3})
    assert outputs["short"].times.last_token == pytest.approx(1.0)


def test_a_batch_is_returned_when_its_last_member_is_cancelled() -> None:
    engine = Engine(FakeRunner(ROOMY), policy=RequestLevel(2), check_invariants=True)
    for name, max_tokens in (("short", 1), ("long", 9)):
        engine.add_request([1], SamplingParams(max_tokens=max_tokens), name)
    engine.step()
    engine.step()
    engine.cancel("long")
    outputs = run_all(engine)
    assert {name: output.finish_reason.value for name, output in outputs.items()} == {"short": "length", "long": "cancelled"}


def test_fastertransformer_prefills_to_the_shortest_prompt_and_goes_on_token_by_token() -> None:
    # Prompts of 3 and 5 tokens: 3 of each at once; then request 1 feeds the rest of its prompt alongside the decode of request 0.
    lines = trace(ROOMY, RequestLevel(2, shortest_prefill=True), [(3, 2), (5, 2), (1, 1)])
    assert lines == ["| 0:3 1:3", "0 1 |", "1 |", "1 |", "| 2:1"]
    engine = Engine(FakeRunner(ROOMY), policy=RequestLevel(2, shortest_prefill=True), check_invariants=True)
    params = SamplingParams(max_tokens=3)
    got = [output.tokens for output in engine.generate([[1, 2], [3, 4, 5, 6, 7]], params)]
    assert got == [alone(ROOMY, prompt, params, "x").tokens for prompt in ([1, 2], [3, 4, 5, 6, 7])]


def test_padding_that_request_level_asks_for() -> None:
    runner = FakeRunner(ROOMY)
    Engine(runner, policy=RequestLevel(2)).generate([[1, 2], [3, 4, 5, 6, 7]], [SamplingParams(max_tokens=n) for n in (1, 3)])
    assert [(step.idle_rows, step.idle_tokens) for step in runner.steps] == [(0, 3), (1, 0), (1, 0)]


def test_orca_keeps_two_disjoint_batches_in_two_stages() -> None:
    runner = FakeRunner(replace(ROOMY, num_stages=2))
    engine = Engine(runner, policy=Orca(2), check_invariants=True)
    outputs = engine.generate([[number] for number in range(4)], SamplingParams(max_tokens=3))
    assert len(outputs) == 4
    slots = [{row.slot for row in (*step.decode, *step.prefill)} for step in runner.steps]
    assert slots == [{0, 1}, {2, 3}] * 3


@pytest.mark.parametrize("policy", [FirstComeFirstServed(), by_priority(8)], ids=["fcfs", "priority"])
def test_few_sequences_are_spread_over_the_stages(policy: Policy) -> None:
    """Three stages and six sequences: two in every step, and a step for every stage, although one step could take all."""
    runner = FakeRunner(replace(ROOMY, num_stages=3))
    engine = Engine(runner, policy=policy, check_invariants=True)
    engine.generate([[number] for number in range(6)], SamplingParams(max_tokens=4))
    assert [step.num_rows for step in runner.steps] == [2] * 12


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_long_prompt_passes_through_the_stages_chunk_after_chunk(lag: int) -> None:
    """Its tokens are known, so no chunk waits for the one before to come out; the first token that is fed waits for all stages."""
    runner = FakeRunner(replace(ROOMY, num_stages=4, max_prefill_tokens=8))
    engine = Engine(runner, lag=lag, check_invariants=True)
    several = {"long": ([1] * 29, SamplingParams(max_tokens=3)), "short": ([2] * 3, SamplingParams(max_tokens=2))}
    for name, (prompt, params) in several.items():
        engine.add_request(prompt, params, name)
    for _ in range(5):
        engine.step(wait=False)
    assert [step.num_prefill_tokens for step in runner.steps] == [8, 8, 8, 5, 3]
    outputs = run_all(engine)
    assert all(outputs[name].tokens == alone(ROOMY, *one, name).tokens for name, one in several.items())


def test_priorities() -> None:
    engine = Engine(FakeRunner(ROOMY), policy=by_priority(1), check_invariants=True)
    for name, priority in (("low", 5), ("high", -1), ("middle", 0)):
        engine.add_request([1], SamplingParams(max_tokens=2, priority=priority), name)
    assert list(run_all(engine)) == ["high", "middle", "low"]


def levels_of_two(promotion_period: int) -> tuple[MultiLevelFeedbackQueue, list[tuple[int, ...]]]:
    """The queues of two requests over 16 iterations. Quanta are 0.5, 1, 2, … s. A prompt of 8 tokens takes 2 s, so it joins the third
    queue; one of 2 tokens takes 0.5 s: the first."""
    runner = CostRunner(ROOMY, lambda step: Price(step.num_prefill_tokens / 4 + (0.5 if step.decode else 0.0), step.num_tokens))
    policy = MultiLevelFeedbackQueue(Estimates(lambda tokens: tokens / 4, 0.5), 1, alpha=3.0, promotion_period=promotion_period)
    engine = Engine(runner, policy=policy, clock=runner.clock)
    for length in (8, 2):
        engine.add_request([1] * length, SamplingParams(max_tokens=40))
    levels = []
    for _ in range(16):
        engine.step()
        levels.append(tuple(entry.level for entry in policy._entries.values()))
    return policy, levels


def test_joining_sinking_and_rising() -> None:
    policy, levels = levels_of_two(promotion_period=1)
    # The short one has 0.5 s in the first queue and 1 s in the second, and is then in the third, behind the long one. That has its 2 s
    # there in one iteration. The short one has the same, in four, and sinks below it. Then it waits until 3 s are over, and rises.
    assert levels == [(2, 0), (2, 1), (2, 1), (2, 2)] + [(3, 2)] * 4 + [(3, 3)] * 7 + [(3, 0)]
    assert (policy.demotions, policy.promotions) == (4, 1)
    policy, found = levels_of_two(promotion_period=10)
    assert (found[:15], found[15]) == (levels[:15], (3, 3)), "it would rise in the twentieth iteration"
    assert policy.promotions == 0


def test_a_long_request_is_not_starved_by_short_ones() -> None:
    """Short requests keep coming as fast as they are served; the long one gets an iteration α after the one before, and after the few
    that then stand in the first queue."""
    ran = []

    def on_step(batch: ScheduledBatch, output: StepOutput, scheduled: float, committed: float) -> None:
        if any(sequence.request.id == "long" for sequence in (*batch.decode, *batch.prefill)):
            ran.append(committed)

    runner = CostRunner(replace(ROOMY, num_slots=64, pages_per_shard=1000), price)
    engine = Engine(runner, policy=MultiLevelFeedbackQueue(ESTIMATES, 1, alpha=3.0), clock=runner.clock, on_step=on_step)
    engine.add_request([1] * 20, SamplingParams(max_tokens=10), "long")
    number = 0
    while len(ran) < 10:
        engine.add_request([1], SamplingParams(max_tokens=1), f"short-{number}")
        engine.step()
        number += 1
        assert runner.clock.now < (ran[-1] if ran else 2.0) + 3.0 + 1.5
    assert number > 200


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), alpha=st.sampled_from([2.0, 5.0]), skip_join=st.booleans(), size=st.integers(1, 3))
def test_no_request_waits_much_longer_than_alpha(seed: int, alpha: float, skip_join: bool, size: int) -> None:
    """Requests of any lengths keep coming. A request that has waited for α is promoted, and from then on waits for those in the first
    queue before it: each uses its quantum there, which no iteration can exceed by more than its own length."""
    rng, waited = random.Random(seed), 0.0
    last: dict[int, float] = {}  # when each ran last, or came
    runner = CostRunner(replace(ROOMY, num_slots=100, pages_per_shard=2000), price)
    policy = MultiLevelFeedbackQueue(ESTIMATES, size, skip_join, alpha)
    longest, most = size * 0.6 + 0.4, 0

    def on_step(batch: ScheduledBatch, output: StepOutput, scheduled: float, committed: float) -> None:
        nonlocal waited
        for sequence in (*batch.decode, *batch.prefill):
            number = sequence.request.number
            waited = max(waited, scheduled - last.get(number, sequence.request.arrival))
            last[number] = committed

    engine = Engine(runner, policy=policy, clock=runner.clock, on_step=on_step)
    for _ in range(150):
        # Small ones take all that there is, so that what has sunk would never come up again by itself.
        while len(engine._samples) < 4 * size or (rng.random() < 0.3 and len(engine._samples) < 6 * size):
            length, tokens = rng.choice([(1, 1), (1, 2), (1, 2), (6, 30)])
            engine.add_request([1] * length, SamplingParams(max_tokens=tokens))
        most = max(most, len(engine._samples))
        engine.step()
    alive = [live.sequence.request for live in engine._samples]
    waited = max([waited, *(runner.clock.now - last.get(request.number, request.arrival) for request in alive)])
    assert waited <= alpha + (ESTIMATES.decode + longest) * (most / size + 1)


@pytest.mark.parametrize("eviction", list(Eviction))
def test_who_makes_room_goes_on_where_it_was(eviction: Eviction) -> None:
    limits = replace(ROOMY, pages_per_shard=6, num_host_pages=0 if eviction is Eviction.RECOMPUTE else 20)
    policy = MultiLevelFeedbackQueue(ESTIMATES, 2, pages=Pages(eviction, None, reserve=0.2), alpha=1e9)
    engine = Engine(FakeRunner(limits), policy=policy, check_invariants=True)
    params = SamplingParams(max_tokens=9)
    prompts = [[1, 2, 3, 4, 5, 6], [7, 8], [9], [10, 11, 12]]
    for number, prompt in enumerate(prompts):
        engine.add_request(prompt, params, str(number))
        engine.step()
    outputs = run_all(engine)
    assert [outputs[str(n)].tokens for n in range(4)] == [alone(limits, prompt, params, "x").tokens for prompt in prompts]
    metrics = engine.metrics
    assert (metrics.preemptions > 0) == (eviction is Eviction.RECOMPUTE)
    assert (metrics.swap_outs > 0) == (eviction in (Eviction.REACTIVE, Eviction.PROACTIVE))
    assert metrics.swapped_in_pages == metrics.swapped_out_pages


@pytest.mark.parametrize("eviction", [Eviction.RECOMPUTE, Eviction.REACTIVE, Eviction.PROACTIVE])
def test_a_better_one_gets_the_slot_of_a_worse_one(eviction: Eviction) -> None:
    """There are pages for all sequences and two slots."""
    engine = make_engine(limits=replace(ROOMY, num_slots=2, num_host_pages=20), policy=by_priority(2, Pages(eviction)))
    for name in ("a", "b"):
        engine.add_request([1], SamplingParams(max_tokens=20), name)
    engine.step()
    engine.add_request([1], SamplingParams(max_tokens=3, priority=-1), "better")
    outputs = run_all(engine)
    assert list(outputs) == ["better", "a", "b"]
    assert outputs["better"].num_iterations == 3
    assert outputs["b"].tokens == outputs["a"].tokens == tuple(range(2, 22))
    assert engine.metrics.swap_outs + engine.metrics.preemptions == 1


@pytest.mark.parametrize(
    ("page_out", "page_in", "swaps"),
    [(0.01, 0.01, "all"), (10.0, 0.01, "none"), (0.01, 10.0, "none"), (0.1, 0.2, "long"), (0.2, 0.1, "long")],
)
@pytest.mark.parametrize("eviction", [Eviction.REACTIVE, Eviction.PROACTIVE])
def test_what_is_cheaper_is_done(page_out: float, page_in: float, swaps: str, eviction: Eviction) -> None:
    """A page holds 4 tokens. There and back takes 0.02, 10.01 or 0.3 s; to compute 4 tokens again 0.4 s, and a single one 0.1 s."""
    estimates = replace(ESTIMATES, page_out=page_out, page_in=page_in, pages_for=ROOMY.pages_for)
    limits = replace(ROOMY, num_slots=1, num_host_pages=20)
    engine = make_engine(limits=limits, policy=by_priority(1, Pages(eviction, estimates)))
    for name, prompt_len, priority in (("short", 1, 9), ("long", 4, 5), ("first", 4, 1)):  # each takes the slot of the one before
        engine.add_request([1] * prompt_len, SamplingParams(max_tokens=9, priority=priority), name)
        engine.step()
    outputs = run_all(engine)
    assert {name: output.tokens for name, output in outputs.items()} == dict.fromkeys(("short", "long", "first"), tuple(range(2, 11)))
    assert (engine.metrics.swap_outs, engine.metrics.preemptions) == {"all": (2, 0), "none": (0, 2), "long": (1, 1)}[swaps]


class Restless:
    """Preempts, swaps and runs at random, whatever sense it makes."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def schedule(self, batch: BatchBuilder) -> None:
        for sequence in batch.running:
            choice = self._rng.random()
            if choice < 0.15:
                batch.preempt(sequence)
            elif choice < 0.35:
                batch.swap_out(sequence)
        for sequence in [*batch.swapped, *batch.waiting]:
            if self._rng.random() < 0.5:
                self._bring(batch, sequence)
        for sequence in batch.running:  # what has just come back leaves places in host memory, which others must not take in this step
            if self._rng.random() < 0.15 and not batch.taken(sequence):
                batch.swap_out(sequence)
        for sequence in batch.running:
            if self._rng.random() < 0.8 and not batch.taken(sequence):
                batch.run(sequence, chunked=self._rng.random() < 0.5)
        if not batch.num_rows:
            self._force(batch)

    def _bring(self, batch: BatchBuilder, sequence: Sequence) -> None:
        if sequence.status is Status.SWAPPED:
            batch.swap_in(sequence)
        elif sequence.status is Status.WAITING:
            batch.start(sequence, chunked=self._rng.random() < 0.5, reserve=self._rng.random() < 0.3, crowd=self._rng.random() < 0.5)

    def _force(self, batch: BatchBuilder) -> None:
        """Run one sequence: all others have to make room."""
        for sequence in batch.running:
            if not batch.taken(sequence):
                if not sequence.in_flight and batch.run(sequence):
                    return
                batch.preempt(sequence)
        for sequence in batch.swapped:
            if batch.swap_in(sequence):
                return
        for sequence in batch.waiting:
            if batch.start(sequence, chunked=True):
                return


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lag=st.integers(0, 2),
    caching=st.booleans(),
    chunks=st.booleans(),
    num_shards=st.integers(1, 2),
    host=st.sampled_from([0, 3, 50]),
)
def test_tokens_do_not_depend_on_preemption(seed: int, lag: int, caching: bool, chunks: bool, num_shards: int, host: int) -> None:
    rng = random.Random(seed)
    limits = RunnerLimits(
        3, 14 * num_shards, 3, 2, 9, num_shards, 5, 18, VOCAB, num_prefill_shards=num_shards, chunks=chunks, num_host_pages=host
    )
    engine = Engine(FakeRunner(limits), policy=Restless(seed), lag=lag, prefix_caching=caching, check_invariants=True)
    prompts = [[1, 2, 3, 4, 5, 6][: rng.randint(1, 6)] + [rng.randrange(VOCAB)] * rng.randint(0, 5) for _ in range(8)]
    params = [SamplingParams(max_tokens=rng.randint(1, 9), temperature=float(rng.random() < 0.5), seed=number) for number in range(8)]
    outputs = engine.generate(prompts, params)
    assert [o.tokens for o in outputs] == [alone(limits, p, one, "x").tokens for p, one in zip(prompts, params, strict=True)]
    assert engine._scheduler.pool.num_free_pages == 9 * num_shards
    assert engine._scheduler.pool.num_free_host_pages == host


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_stages=st.integers(1, 3), max_batch=st.integers(1, 4))
def test_orcas_invariant_over_stages(seed: int, num_stages: int, max_batch: int) -> None:
    """If a arrived before b, a has run at least as many iterations as b while both are in flight."""
    rng = random.Random(seed)
    limits = replace(ROOMY, num_stages=num_stages, pages_per_shard=30, num_slots=rng.randint(1, 8))
    engine = Engine(FakeRunner(limits), policy=Orca(max_batch), check_invariants=True)
    for number in range(20):
        engine.add_request([1] * rng.randint(1, 12), SamplingParams(max_tokens=rng.randint(1, 9)), str(number))
        for _ in range(rng.choice([0, 0, 1, 2])):
            engine.step()
            live = [live.sequence.num_iterations for live in engine._samples]
            assert live == sorted(live, reverse=True)
    assert len(run_all(engine)) > 0


def test_every_name_makes_a_policy_that_serves() -> None:
    prompts, params = [[number] * 3 for number in range(6)], SamplingParams(max_tokens=4)
    want = [alone(ROOMY, prompt, params, "x").tokens for prompt in prompts]
    for name in POLICIES:
        engine = Engine(FakeRunner(ROOMY), policy=make_policy(name, PolicyOptions(3), ESTIMATES), check_invariants=True)
        assert [output.tokens for output in engine.generate(prompts, params)] == want, name
    with pytest.raises(InvalidInput, match="did you mean 'orca'"):
        make_policy("orka", PolicyOptions(3), ESTIMATES)


def steps_by(name: str, tick: float) -> list[Step]:
    """What a policy makes of the same requests by a clock that goes on by `tick` whenever it is read."""
    runner, clock = FakeRunner(replace(ROOMY, pages_per_shard=8)), itertools.count(0.0, tick)
    engine = Engine(runner, policy=make_policy(name, PolicyOptions(2, alpha=1.0), ESTIMATES), clock=lambda: next(clock))
    params = [SamplingParams(max_tokens=2 + number % 4 * 3, priority=number % 2) for number in range(6)]
    engine.generate([[number] * (1 + number % 3 * 4) for number in range(6)], params)
    return runner.steps


@pytest.mark.parametrize("name", POLICIES)
def test_the_table_says_who_reads_the_clock(name: str) -> None:
    differs = [steps_by(name, tick) != steps_by(name, 1e-6) for tick in (0.03, 0.3, 3.0)]
    assert any(differs) == POLICIES[name].reads_clock


@pytest.mark.parametrize("name", POLICIES)
def test_the_table_says_who_gives_places_away(name: str) -> None:
    """A request of a better priority, with less to do and a shorter, equal or longer prompt, comes while another runs in the only place."""

    def wins(prompt: int) -> bool:
        runner = CostRunner(ROOMY, price)
        engine = Engine(runner, policy=make_policy(name, PolicyOptions(1), ESTIMATES), clock=runner.clock)
        engine.add_request([1] * 2, SamplingParams(max_tokens=20, priority=1), "running")
        for _ in range(3):
            engine.step()
        engine.add_request([1] * prompt, SamplingParams(max_tokens=1), "new")
        return next(iter(run_all(engine))) == "new"

    assert any(map(wins, (1, 2, 3))) == POLICIES[name].preemptive


def test_orca_reserves_the_longest_answer_before_it_starts() -> None:
    """Six pages of four tokens. Each request ends with four: the second starts when the first has ended, though a page for its prompt is
    free all the time; without the reservation both would stand still halfway."""
    runner = FakeRunner(replace(ROOMY, pages_per_shard=6))
    engine = Engine(runner, policy=Orca(2), check_invariants=True)
    engine.generate([[1], [2]], SamplingParams(max_tokens=16))
    assert [step.num_rows for step in runner.steps] == [1] * 32
    assert engine.metrics.preemptions == 0


def test_the_newest_gives_its_pages_up() -> None:
    """Under first come, first served the first request runs as if it were alone, however little room there is for the others."""
    engine = make_engine(limits=replace(ROOMY, pages_per_shard=6), policy=FirstComeFirstServed())
    for name in ("first", "second", "third"):
        engine.add_request([1], SamplingParams(max_tokens=16), name)
    outputs = run_all(engine)
    assert list(outputs) == ["first", "second", "third"]
    assert outputs["first"].num_iterations == 16
    assert engine.metrics.preemptions > 0


def test_a_request_that_is_cancelled_in_host_memory_leaves_nothing_there() -> None:
    limits = replace(ROOMY, num_slots=1, num_host_pages=20)
    engine = make_engine(limits=limits, policy=by_priority(1, Pages(Eviction.REACTIVE)))
    for name, priority in (("worse", 5), ("better", 1)):
        engine.add_request([1] * 5, SamplingParams(max_tokens=9, priority=priority), name)
        engine.step()
    assert engine._scheduler.pool.num_free_host_pages < 20
    engine.cancel("worse")
    assert engine._scheduler.pool.num_free_host_pages == 20
    assert {name: output.finish_reason.value for name, output in run_all(engine).items()} == {"worse": "cancelled", "better": "length"}
