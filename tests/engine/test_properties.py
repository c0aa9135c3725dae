"""Whatever arrives, is cancelled or fails, however small the pools: everyone is answered once, with the tokens that it gets alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from partinf.engine import (
    Engine,
    FakeRunner,
    FinishReason,
    FirstComeFirstServed,
    Orca,
    PageGroup,
    Policy,
    RequestLevel,
    RequestOutput,
    RunnerLimits,
    SamplingParams,
    TokenEvent,
)
from partinf.engine.estimates import Estimates
from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
from partinf.engine.policies.priority import by_priority
from partinf.engine.policies.ranked import Eviction, Pages
from partinf.engine.policies.registry import POLICIES, PolicyOptions
from partinf.engine.policies.srpt import shortest_remaining_first
from tests.engine.support import VOCAB, Ticks, all_alone, alone


@dataclass(frozen=True)
class Arrival:
    """A request that comes before iteration `at`; it may be cancelled some iterations later, or its callback may fail at some token."""

    at: int
    prompt: tuple[int, ...]
    params: SamplingParams
    cancel_after: int | None
    fail_at: int | None


@st.composite
def some_limits(draw: st.DrawFn) -> RunnerLimits:
    num_shards, num_prefill_shards, num_sequence_shards = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 1, 2, 3])),
    )
    allowed = st.lists(st.integers(0, num_prefill_shards - 1), min_size=1, unique=True).map(tuple)
    mapped = st.tuples(*[allowed] * num_shards)
    limits = RunnerLimits(
        max_decode_rows_per_shard=draw(st.integers(1, 3)),
        max_prefill_tokens=draw(st.integers(1, 9)) * num_prefill_shards,
        max_prefill_slots_per_shard=draw(st.integers(1, 3)),
        page_size=draw(st.integers(1, 4)),
        pages_per_shard=num_sequence_shards * draw(st.integers(-(-2 // num_sequence_shards), 8 // num_sequence_shards)),
        num_shards=num_shards,
        num_sequence_shards=num_sequence_shards,
        num_slots=draw(st.integers(1, 6)),
        max_len=draw(st.integers(8, 24)),
        vocab_size=VOCAB,
        num_prefill_shards=num_prefill_shards,
        prefill_shards=draw(st.just(()) | mapped),
        num_stages=draw(st.sampled_from([1, 1, 2, 3])),
        chunks=draw(st.booleans()),
        num_host_pages=draw(st.sampled_from([0, 2, 30])),
    )
    windows = sorted(draw(st.just([]) | st.lists(st.integers(1, 9), min_size=1, max_size=2, unique=True)), reverse=True)
    groups = tuple(some_pages(draw, limits, window) for window in windows)
    return replace(limits, windows=groups, pages_per_shard=0 if groups and draw(st.booleans()) else limits.pages_per_shard)


def some_pages(draw: st.DrawFn, limits: RunnerLimits, window: int) -> PageGroup:
    """Those of a window that one sequence needs at least, or as many again."""
    least = limits.reserved_pages(window, limits.max_len)
    pages = limits.chunk_pages + least * draw(st.integers(1, 3))
    return PageGroup(window, limits.num_sequence_shards * pages, limits.num_host_pages)


RICH = st.fixed_dictionaries(
    {},
    optional={
        "presence_penalty": st.sampled_from([1.0, 2.0]),
        "frequency_penalty": st.sampled_from([1.0, -2.0]),
        "repetition_penalty": st.sampled_from([2.0, 3.0]),
        "logit_bias": st.just({3: 5.0, 1: 2.0}),
        "top_logprobs": st.integers(1, 3),
        "prompt_logprobs": st.just(True),
    },
)


@st.composite
def some_params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        max_tokens=draw(st.integers(1, 12)),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.none() | st.integers(0, 9)),
        stop_token_ids=draw(st.lists(st.integers(0, VOCAB - 1), max_size=8).map(tuple)),
        priority=draw(st.integers(0, 2)),
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        timeout=draw(st.none() | st.none() | st.integers(1, 30)),
        logprobs=True,
        **draw(st.just({}) | RICH),
    )


ARRIVAL = st.builds(
    Arrival,
    at=st.integers(0, 12),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14).map(tuple) | st.integers(1, 14).map(lambda n: (1, 2, 3, 4) * n),
    params=some_params(),
    cancel_after=st.none() | st.integers(0, 6),
    fail_at=st.none() | st.none() | st.integers(0, 3),
)
ESTIMATES = Estimates(first_iteration=lambda tokens: tokens / 4, decode=1.0, page_out=0.01, page_in=0.01)
PAGES = st.builds(Pages, st.sampled_from(list(Eviction)), st.none() | st.just(ESTIMATES), st.sampled_from([0.0, 0.3]))
SIZE = st.none() | st.integers(1, 4)


@st.composite
def of_the_table(draw: st.DrawFn) -> Policy:
    """Any named policy, whatever its parameters."""
    chosen = draw(st.sampled_from(sorted(POLICIES)))
    alpha, reserve = draw(st.sampled_from([2.0, 30.0])), draw(st.sampled_from([0.0, 0.3]))
    return POLICIES[chosen].make(PolicyOptions(draw(st.integers(1, 4)), alpha, draw(st.sampled_from(list(Eviction))), reserve), ESTIMATES)


# Besides, what no name stands for: batches without a bound, pages without estimates.
ANY_POLICY: st.SearchStrategy[Policy] = st.one_of(
    of_the_table(),
    st.builds(MultiLevelFeedbackQueue, st.just(ESTIMATES), SIZE, st.booleans(), st.sampled_from([2.0, 30.0]), PAGES),
    st.builds(shortest_remaining_first, st.just(ESTIMATES), SIZE, PAGES),
    st.builds(by_priority, SIZE, PAGES),
    st.builds(FirstComeFirstServed, st.none() | st.integers(1, 4), st.booleans()),
    st.builds(RequestLevel, st.integers(1, 4), st.booleans()),
    st.builds(Orca, st.none() | st.integers(1, 4)),
)


class World:
    """Runs a list of arrivals to the end and keeps what came out."""

    def __init__(self, limits: RunnerLimits, policy: Policy, lag: int, prefix_caching: bool = False) -> None:
        self.limits = limits
        self.clock = Ticks()
        options = {"policy": policy, "lag": lag, "prefix_caching": prefix_caching, "clock": self.clock}
        self.engine = Engine(FakeRunner(limits), check_invariants=True, **options)  # type: ignore[arg-type]
        self.free_pages = self.engine._scheduler.pool.num_free_pages
        self.outputs: dict[tuple[str, int], list[RequestOutput]] = {}
        self.events: dict[tuple[str, int], list[TokenEvent]] = {}

    def add(self, name: str, arrival: Arrival) -> None:
        for sample in range(arrival.params.n):
            self.outputs[name, sample], self.events[name, sample] = [], []

        def on_token(event: TokenEvent) -> None:
            self.events[name, event.sample].append(event)
            if event.index == arrival.fail_at:
                raise ValueError("the callback's own fault")

        self.engine.add_request(arrival.prompt, arrival.params, name, on_token)

    def run(self, arrivals: dict[str, Arrival]) -> None:
        last = max(arrival.at for arrival in arrivals.values())
        work = sum(arrival.params.n * (len(arrival.prompt) + arrival.params.max_tokens) for arrival in arrivals.values())
        bound = last + 200 + 20 * work
        for iteration in range(bound):
            self.clock.now = float(iteration)
            for name, arrival in arrivals.items():
                if arrival.at == iteration:
                    self.add(name, arrival)
                if arrival.cancel_after is not None and arrival.at + arrival.cancel_after == iteration:
                    self.engine.cancel(name)
            for output in self.engine.step():
                self.outputs[output.id, output.sample].append(output)
            if iteration >= last and not self.engine.has_work:
                return
        raise AssertionError(f"not done after {bound} iterations")


def check_answer(arrival: Arrival, output: RequestOutput, expected: RequestOutput, events: list[TokenEvent]) -> None:
    """An output is what the request gets alone, or the beginning of it where something ended it early."""
    count, reasons = len(output.tokens), (FinishReason.CANCELLED, FinishReason.FAILED, FinishReason.TIMEOUT)
    if output.finish_reason in reasons:
        causes = dict(zip(reasons, (arrival.cancel_after, arrival.fail_at, arrival.params.timeout), strict=True))
        assert causes[output.finish_reason] is not None
    else:
        assert (count, output.finish_reason) == (len(expected.tokens), expected.finish_reason)
        assert output.prompt_logprobs == expected.prompt_logprobs
        assert output.prompt_top_logprobs == expected.prompt_top_logprobs
    assert output.tokens == expected.tokens[:count]
    assert output.logprobs == (expected.logprobs and expected.logprobs[:count])
    assert output.top_logprobs == (expected.top_logprobs and expected.top_logprobs[:count])
    tokens = [event.token for event in events if event.token is not None]
    assert tuple(tokens) == output.tokens[: len(tokens)]
    if arrival.fail_at is None:
        assert len(tokens) == count
        assert [event.finish_reason for event in events][-1] is output.finish_reason


@settings(max_examples=150, deadline=None)
@given(
    limits=some_limits(),
    policy=ANY_POLICY,
    lag=st.integers(0, 2),
    arrivals=st.lists(ARRIVAL, min_size=1, max_size=10),
    caching=st.booleans(),
)
@example(
    limits=RunnerLimits(3, 4, 2, 2, 4, 1, 6, 8, VOCAB),
    policy=FirstComeFirstServed(),
    lag=1,
    arrivals=[Arrival(0, (1, 2, 3), SamplingParams(max_tokens=5, stop_token_ids=tuple(range(VOCAB))), None, None)] * 5,
    caching=False,
)
def test_everyone_is_answered_once_as_if_alone(
    limits: RunnerLimits, policy: Policy, lag: int, arrivals: list[Arrival], caching: bool
) -> None:
    fitting = [arrival for arrival in arrivals if len(arrival.prompt) <= limits.max_prompt_len]
    if not fitting:
        return
    named = {f"r{number}": arrival for number, arrival in enumerate(fitting)}
    world = World(limits, policy, lag, caching)
    world.run(named)
    for name, arrival in named.items():
        for expected in all_alone(limits, arrival.prompt, replace(arrival.params, timeout=None), name):
            (output,) = world.outputs[name, expected.sample]
            check_answer(arrival, output, expected, world.events[name, expected.sample])
    scheduler = world.engine._scheduler
    scheduler.pool.check([])
    assert scheduler.pool.num_free_pages == world.free_pages
    assert [group.num_free for group in scheduler.pool.groups] == [limits.num_shards * group.pages_per_shard for group in limits.groups]
    assert not scheduler.waiting
    metrics = world.engine.metrics
    sampled = sum(len(step.decode) + sum(chunk.last for chunk in step.prefill) for step in world.engine._runner.steps)
    assert metrics.generated_tokens + metrics.dropped_tokens <= sampled
    assert metrics.generated_tokens == sum(len(output.tokens) for outputs in world.outputs.values() for output in outputs)


@settings(max_examples=50, deadline=None)
@given(limits=some_limits(), lag=st.integers(0, 2), order=st.permutations(range(6)), seed=st.integers(0, 5))
def test_tokens_do_not_depend_on_the_order_of_arrival(limits: RunnerLimits, lag: int, order: list[int], seed: int) -> None:
    roomy = tuple(replace(group, pages_per_shard=64) for group in limits.windows)
    limits = replace(limits, max_len=max(limits.max_len, 10), pages_per_shard=10, num_sequence_shards=1, chunks=True, windows=roomy)
    params = SamplingParams(max_tokens=4, temperature=1.0, seed=seed)
    prompts = [[number, number + 1, 7] for number in range(6)]
    engine = Engine(FakeRunner(limits), lag=lag, check_invariants=True)
    outputs = engine.generate([prompts[number] for number in order], params)
    assert [output.tokens for output in outputs] == [alone(limits, prompts[number], params, "x").tokens for number in order]
