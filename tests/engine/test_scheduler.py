"""Which sequences run when: joins and leaves, order of arrival, whole and chunked prompts, shards, and the request-level baseline."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partinf.engine import FirstComeFirstServed, Policy, RequestLevel, RunnerLimits, SamplingParams, request_level_iterations
from partinf.engine.batch import ScheduledBatch
from partinf.engine.request import Request, Sequence, Status
from partinf.engine.scheduler import Scheduler
from partinf.engine.step import RowSampling
from partinf.foundation.errors import InvalidInput
from tests.engine.support import ROOMY


def sequence(number: int, prompt_len: int, max_tokens: int) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(Request(f"request-{number}", number, (1,) * prompt_len, params, max_tokens, RowSampling(), arrival=0.0))


def commit(scheduler: Scheduler, batch: ScheduledBatch) -> None:
    """Give every sampling row a token; those that have all of theirs leave."""
    for row in (*batch.decode, *batch.prefill):
        row.in_flight -= 1
    ended = [row for row, chunk in zip(batch.prefill, batch.step.prefill, strict=True) if chunk.last]
    sampling = [row for row, new in zip(batch.decode, batch.samples, strict=True) if new]
    for row in (*sampling, *ended):
        row.tokens.append(1)
        if row.num_generated == row.request.max_tokens:
            scheduler.finish(row)
    scheduler.check()


def trace(limits: RunnerLimits, policy: Policy, lens: SequenceOf[tuple[int, int]]) -> list[str]:
    """Every iteration as text: request numbers that decode, "|", number:tokens of those that prefill. All arrive at once."""
    scheduler = Scheduler(limits, policy)
    for number, (prompt_len, max_tokens) in enumerate(lens):
        scheduler.add(sequence(number, prompt_len, max_tokens))
    lines = []
    while (batch := scheduler.schedule()) is not None:
        decode = " ".join(str(row.request.number) for row in batch.decode)
        chunks = zip(batch.prefill, batch.step.prefill, strict=True)
        lines.append(f"{decode} | {' '.join(f'{row.request.number}:{len(chunk.tokens)}' for row, chunk in chunks)}".strip())
        commit(scheduler, batch)
    assert not scheduler.waiting
    assert not scheduler.running
    return lines


def test_requests_join_and_leave_between_iterations() -> None:
    limits = replace(ROOMY, num_slots=2)
    assert trace(limits, FirstComeFirstServed(), [(5, 3), (6, 1), (7, 2)]) == ["| 0:5 1:6", "0 | 2:7", "0 2 |"]


def test_prompts_run_whole_and_in_order_of_arrival() -> None:
    # 20 + 14 > 32, so request 1 waits; request 2 would fit alongside request 0 and still waits.
    assert trace(ROOMY, FirstComeFirstServed(), [(20, 2), (14, 1), (3, 1)]) == ["| 0:20", "0 | 1:14 2:3"]


def test_chunked_prefill_uses_the_budget_up() -> None:
    assert trace(ROOMY, FirstComeFirstServed(chunk_prefills=True), [(20, 2), (14, 1), (3, 1)]) == ["| 0:20 1:12", "0 | 1:2 2:3"]


def test_a_prompt_longer_than_a_step_is_cut() -> None:
    assert trace(ROOMY, FirstComeFirstServed(), [(40, 1), (3, 2)]) == ["| 0:32", "| 0:8 1:3", "1 |"]


def test_a_step_takes_so_many_chunks() -> None:
    limits = replace(ROOMY, max_prefill_slots_per_shard=2)
    assert trace(limits, FirstComeFirstServed(), [(1, 1)] * 5) == ["| 0:1 1:1", "| 2:1 3:1", "| 4:1"]


def test_max_batch_size() -> None:
    assert trace(ROOMY, FirstComeFirstServed(max_batch_size=1), [(1, 2), (1, 1)]) == ["| 0:1", "0 |", "| 1:1"]


def test_the_head_waits_for_its_pages_and_the_others_for_it() -> None:
    # Pages of 4 tokens, 4 in all. Request 0 takes 3; request 1 needs 2 and waits, request 2 needs 1 and waits behind it.
    limits = replace(ROOMY, pages_per_shard=4)
    assert trace(limits, FirstComeFirstServed(), [(9, 2), (5, 1), (1, 1)]) == ["| 0:9", "0 |", "| 1:5 2:1"]


def test_the_last_token_needs_no_page() -> None:
    # 4 prompt tokens and 1 generated fill one page: the generated one is never fed.
    limits = replace(ROOMY, pages_per_shard=1, max_len=5)
    assert trace(limits, FirstComeFirstServed(), [(4, 1)]) == ["| 0:4"]


def test_shards_fill_evenly() -> None:
    scheduler = Scheduler(replace(ROOMY, num_shards=4, pages_per_shard=8), FirstComeFirstServed())
    for number in range(8):
        scheduler.add(sequence(number, 1 + number, 2))
    batch = scheduler.schedule()
    assert batch is not None
    assert [row.shard for row in batch.prefill] == [0, 1, 2, 3, 0, 1, 2]  # the eighth prompt exceeds the budget
    assert [chunk.tables[0].ids[0] // 8 for chunk in batch.step.prefill] == [row.shard for row in batch.prefill]


def test_chunks_go_to_a_prefill_shard_of_their_owner() -> None:
    limits = replace(ROOMY, num_shards=2, num_prefill_shards=4, prefill_shards=((0, 2), (1, 3)))
    scheduler = Scheduler(limits, FirstComeFirstServed())
    for number in range(8):
        scheduler.add(sequence(number, 5, 1))
    batch = scheduler.schedule()
    assert batch is not None
    # 8 tokens per prefill shard hold one prompt each.
    assert [(chunk.shard, chunk.prefill_shard) for chunk in batch.step.prefill] == [(0, 0), (1, 1), (0, 2), (1, 3)]


def test_a_token_that_only_the_device_knows_is_left_open() -> None:
    scheduler = Scheduler(ROOMY, FirstComeFirstServed())
    scheduler.add(sequence(0, 2, 3))
    batches = [scheduler.schedule() for _ in range(4)]
    assert [batch.step.decode[0].token for batch in batches[1:3] if batch] == [None, None]
    assert batches[3] is None  # the third token, which ends it, is scheduled already


def test_no_request_overtakes_a_chunked_prompt_that_has_to_pause() -> None:
    # 4 tokens on each prefill shard. Sequences 2 and 3 are cut in the first iteration; in the second, 2 (which may use either) takes the
    # prefill shard that 3 needs. Request 4 would fit on the other one.
    limits = replace(ROOMY, num_shards=2, num_prefill_shards=2, prefill_shards=((0,), (0, 1)), max_prefill_tokens=8, page_size=2)
    lines = trace(limits, FirstComeFirstServed(chunk_prefills=True), [(3, 9), (2, 1), (10, 1), (10, 1), (1, 1)])
    assert lines[:3] == ["| 0:3 1:2 2:2 3:1", "0 | 2:4", "0 | 2:4"]


def test_request_level_runs_static_batches() -> None:
    lens = [(3, 2), (4, 4), (5, 1), (2, 1)]
    assert trace(ROOMY, RequestLevel(2), lens) == ["| 0:3 1:4", "0 1 |", "1 |", "1 |", "| 2:5 3:2"]


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 8))
def test_the_closed_form_counts_what_request_level_runs(generated_lens: list[int], batch_size: int) -> None:
    lens = [(1, generated) for generated in generated_lens]
    assert len(trace(ROOMY, RequestLevel(batch_size), lens)) == request_level_iterations(generated_lens, batch_size)


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 3))
def test_who_came_first_has_run_at_least_as_often(seed: int, num_shards: int, num_prefill_shards: int) -> None:
    """Orca's invariant, for prompts that run whole, while both are in flight; arrivals are spread over the iterations."""
    rng = random.Random(seed)
    limits = replace(ROOMY, num_shards=num_shards, pages_per_shard=16, num_slots=rng.randint(1, 8), max_decode_rows_per_shard=2)
    limits = replace(limits, max_prefill_tokens=12 * num_prefill_shards, num_prefill_shards=num_prefill_shards)
    scheduler = Scheduler(limits, FirstComeFirstServed())
    sequences: list[Sequence] = []
    while len(sequences) < 15 or scheduler.waiting or scheduler.running:
        for _ in range(rng.choice([0, 0, 1, 3]) if len(sequences) < 15 else 0):
            sequences.append(sequence(len(sequences), rng.randint(1, 12), rng.randint(1, 9)))
            scheduler.add(sequences[-1])
        batch = scheduler.schedule()
        if batch is not None:
            commit(scheduler, batch)
        live = [one.num_iterations for one in sequences if one.status is not Status.FINISHED]
        assert live == sorted(live, reverse=True)


def test_limits_are_checked_all_at_once() -> None:
    with pytest.raises(InvalidInput) as caught:
        replace(ROOMY, page_size=0, num_slots=0, prefill_shards=((0,), (1,)))
    assert len(caught.value.offences) == 4
    with pytest.raises(InvalidInput, match="max_prefill_tokens = 32 does not divide over 3 prefill shards"):
        replace(ROOMY, num_prefill_shards=3)
