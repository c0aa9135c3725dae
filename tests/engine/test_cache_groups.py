"""Groups of the cache: a window keeps the pages that a later query sees, no more and no fewer, and is found, moved and shared with the
rest."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from partinf.engine import Engine, FakeRunner, PageGroup, RunnerLimits, SamplingParams
from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
from partinf.engine.policies.ranked import Eviction, Pages
from partinf.engine.request import Sequence
from partinf.foundation.errors import InvalidInput
from partinf.foundation.paging import chunk_pages, first_page, most_pages, table_pages, table_start, window_pages
from tests.engine.support import ROOMY, alone
from tests.engine.test_properties import ESTIMATES

WINDOW = 6
LIMITS = replace(
    ROOMY, max_prefill_tokens=8, pages_per_shard=32, max_len=64, num_host_pages=40, windows=(PageGroup(WINDOW, 8 * 4 + 10, 40),)
)
ONE = SamplingParams(max_tokens=2)


def seen_pages(num_positions: int, window: int, page_size: int) -> set[int]:
    """The plain twin: pages of positions that are written and that the next query sees."""
    return {position // page_size for position in range(num_positions) if position > num_positions - window}


def check_windows(engine: Engine, limits: RunnerLimits) -> None:
    """Every resident holds of every window what the twin says, once what it has scheduled is built."""
    for sequence in engine._scheduler.running.values():
        for group, held in zip(limits.groups, sequence.held, strict=True):
            if group.window:
                kept = set(range(held.first, held.end))
                assert kept >= seen_pages(sequence.num_scheduled, group.window, limits.page_size)
                assert kept <= seen_pages(sequence.num_scheduled, group.window + limits.page_size + 1, limits.page_size)


def test_pages_of_a_window_are_those_that_one_counts() -> None:
    rng = random.Random(0)
    for _ in range(500):
        position, window, size = rng.randint(0, 60), rng.randint(1, 30), rng.randint(1, 8)
        seen = [place // size for place in range(position + 1) if place > position - window]
        assert first_page(position, window, size) == seen[0]
        assert len(set(seen)) <= most_pages(window, size) <= -(-window // size) + 1
        ways, tokens, chunks = rng.randint(1, 3), rng.randint(1, 40), rng.randint(1, 4)
        on_one = max(sum(page % ways == place for page in set(seen)) for place in range(ways))
        assert on_one <= window_pages(window, position + 1, size, ways) <= -(-(most_pages(window, size) + 1) // ways)
        cuts = sorted(rng.sample(range(1, tokens), min(chunks, tokens) - 1))
        lengths = [end - start for start, end in zip([0, *cuts], [*cuts, tokens], strict=True)]
        more = [most_pages(window - 1 + length, size) - most_pages(window, size) for length in lengths]
        assert sum(more) <= chunk_pages(tokens, chunks, size)
        assert sum(-(-count // ways) for count in more) <= chunk_pages(tokens, chunks, size, ways)


def test_a_table_holds_what_a_query_sees_and_begins_with_the_first_part() -> None:
    rng = random.Random(1)
    for _ in range(500):
        position, window, size, ways = rng.randint(0, 80), rng.randint(1, 30), rng.randint(1, 8), rng.randint(1, 4)
        multiple = ways * rng.randint(1, 2)
        start = table_start(position, window, size, ways)
        assert start % ways == 0
        assert start <= first_page(position, window, size) < start + ways
        columns, earlier = table_pages(window, size, ways, multiple), table_pages(window - 1, size, ways, multiple)
        assert columns % multiple == earlier % multiple == 0
        assert position // size < start + columns
        assert window == 1 or position == 0 or (position - 1) // size < start + earlier


@pytest.mark.parametrize("lag", [0, 2])
def test_a_sequence_keeps_what_its_next_query_sees(lag: int) -> None:
    engine = Engine(FakeRunner(LIMITS), check_invariants=True, lag=lag)
    for number, length in enumerate((3, 17, 40)):
        engine.add_request([number] * length, SamplingParams(max_tokens=20, ignore_eos=True))
    while engine.has_work:
        engine.step()
        check_windows(engine, LIMITS)
    assert [group.num_free for group in engine._scheduler.pool.groups] == [group.pages_per_shard for group in LIMITS.groups]


def test_a_window_outlives_no_sequence_and_holds_up_none() -> None:
    """Eight sequences of 60 positions run together in a window's pages for fewer than three of them whole."""
    limits = replace(LIMITS, pages_per_shard=8 * 15, windows=(PageGroup(WINDOW, 8 * 4 + 10),))
    engine = Engine(FakeRunner(limits), check_invariants=True)
    outputs = engine.generate([[number, 7] * 10 for number in range(8)], SamplingParams(max_tokens=41))
    assert engine.metrics.preemptions == 0
    assert max(len(step.decode) for step in engine._runner.steps) == 8
    for number, output in enumerate(outputs):
        assert output.tokens == alone(limits, [number, 7] * 10, SamplingParams(max_tokens=41), "x").tokens


def test_a_window_alone_holds_contexts_longer_than_all_its_pages() -> None:
    limits = replace(LIMITS, pages_per_shard=0, windows=(PageGroup(WINDOW, 4 + 10),))
    engine = Engine(FakeRunner(limits), check_invariants=True)
    outputs = engine.generate([[1, 2, 3] * 18] * 2, SamplingParams(max_tokens=9))
    assert 63 > 14 * 4
    assert {output.tokens for output in outputs} == {alone(limits, [1, 2, 3] * 18, SamplingParams(max_tokens=9), "x").tokens}


def test_a_prefix_is_found_where_every_window_has_its_end() -> None:
    engine = Engine(FakeRunner(replace(LIMITS, windows=(PageGroup(WINDOW, 8 * 4 + 10, 40),))), prefix_caching=True, check_invariants=True)
    prompt = [place % 13 for place in range(30)]
    engine.generate([prompt], ONE)
    engine.generate([[*prompt[:21], 20, 21]], ONE)
    assert engine.metrics.cached_tokens == 20
    pool = engine._scheduler.pool
    cache = pool.groups[1].prefixes[0]
    sequence = next(iter([Sequence(engine._intake.request([*prompt, 5], ONE, "again", set(), None))]))
    assert pool._find(sequence, 0).num_pages == 7
    # Of the window's pages the sixth and the seventh are what a query after the seventh sees; without the sixth nothing before is whole.
    (page,) = [page for page in [cache.find_each(sequence, 7)[5]] if page is not None]
    cache._by_digest.pop(cache._digest_of.pop(page))
    assert pool._find(sequence, 0).num_pages == 5
    assert [len(pages) for pages in pool._find(sequence, 0).pages] == [5, 2]


@pytest.mark.parametrize("shared", [8, 9, 11, 12])
def test_samples_share_the_window_at_the_end_of_their_prompt(shared: int) -> None:
    engine = Engine(FakeRunner(LIMITS), check_invariants=True)
    prompt = list(range(shared))
    outputs = engine.generate([prompt], SamplingParams(max_tokens=6, n=4, temperature=1.0, seed=3))
    assert len({output.tokens for output in outputs}) > 1
    assert [output.num_cached for output in outputs] == [0, *[(shared - 1) // 4 * 4] * 3]


def test_swapping_moves_all_groups_or_none() -> None:
    limits = replace(LIMITS, num_slots=4, max_decode_rows_per_shard=2, pages_per_shard=18, windows=(PageGroup(WINDOW, 4 * 4 + 10, 40),))
    policy = MultiLevelFeedbackQueue(ESTIMATES, 2, pages=Pages(Eviction.REACTIVE, None))
    engine = Engine(FakeRunner(limits), policy=policy, check_invariants=True)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    outputs = engine.generate([[number] * 20 for number in range(5)], params)
    steps = engine._runner.steps
    out = [copy for step in steps for copy in step.swap_out]
    assert engine.metrics.swap_outs > 0
    assert sorted(copy.group for copy in out) == [0] * engine.metrics.swap_outs + [1] * engine.metrics.swap_outs
    assert all(len(copy.pages) <= 4 for copy in out if copy.group)
    assert max(copy.first for copy in out) > 0
    for number, output in enumerate(outputs):
        assert output.tokens == alone(limits, [number] * 20, params, "x").tokens


def test_host_memory_without_room_for_a_window_takes_nothing() -> None:
    limits = replace(LIMITS, windows=(PageGroup(WINDOW, 8 * 4 + 10, 1),), pages_per_shard=18, num_slots=4, max_decode_rows_per_shard=2)
    policy = MultiLevelFeedbackQueue(ESTIMATES, 2, pages=Pages(Eviction.REACTIVE, None))
    engine = Engine(FakeRunner(limits), policy=policy, check_invariants=True)
    engine.generate([[number] * 20 for number in range(5)], SamplingParams(max_tokens=30, ignore_eos=True))
    assert engine.metrics.swap_outs == 0
    assert engine.metrics.preemptions > 0


def test_a_page_that_is_let_go_too_early_is_noticed() -> None:
    engine = Engine(FakeRunner(LIMITS), check_invariants=True)
    engine.add_request([5] * 20, SamplingParams(max_tokens=20))
    for _ in range(4):
        engine.step()
    (sequence,) = engine._scheduler.running.values()
    held = sequence.held[1]
    for _ in range(2):  # the one that stays besides, and the first that is seen
        engine._scheduler.pool.groups[1]._release(held.pages.pop(0), 0)
        held.first += 1
    sequence.pages_changed()
    with pytest.raises(ValueError, match="let go"):
        engine.step()


def test_windows_that_hold_no_sequence_are_refused() -> None:
    with pytest.raises(InvalidInput, match="window of 6: 13 pages per shard; one sequence needs up to 14"):
        replace(LIMITS, windows=(PageGroup(WINDOW, 13),))
    with pytest.raises(InvalidInput, match="pages_per_shard = 0; it must be at least 1"):
        replace(LIMITS, windows=(), pages_per_shard=0)
