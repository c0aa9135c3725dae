"""The page pool conserves pages, and its check notices when it does not."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from partinf.engine.pages import PagePool
from tests.engine.support import ROOMY
from tests.engine.test_scheduler import sequence

LIMITS = replace(ROOMY, num_shards=3, pages_per_shard=5, num_slots=7, max_decode_rows_per_shard=3)


@pytest.mark.parametrize("num_sequence_shards", [1, 5])
def test_random_allocations_are_conserved(num_sequence_shards: int) -> None:
    rng, pool, residents = random.Random(0), PagePool(replace(LIMITS, num_sequence_shards=num_sequence_shards)), []
    for number in range(2000):
        num_pages = rng.randint(1, 4)
        shard = pool.choose_shard(num_pages, range(3))
        if shard is None or (residents and rng.random() < 0.4):
            pool.free(residents.pop(rng.randrange(len(residents))))
        else:
            residents.append(sequence(number, 1, 1))
            pool.allocate(residents[-1], num_pages, shard)
        pool.check(residents)
        assert pool.num_free_pages == 15 - sum(len(resident.held[0].pages) for resident in residents)
    for resident in residents:
        pool.free(resident)
    pool.check([])


def test_choice_of_shard() -> None:
    pool, residents = PagePool(LIMITS), [sequence(number, 1, 1) for number in range(7)]

    def place(number: int, num_pages: int, shards: tuple[int, ...] = (0, 1, 2)) -> int | None:
        shard = pool.choose_shard(num_pages, shards)
        if shard is not None:
            pool.allocate(residents[number], num_pages, shard)
        return shard

    assert [place(0, 4), place(1, 2), place(2, 1)] == [0, 1, 2]  # fewest sequences
    assert place(3, 1) == 2  # most free pages among equals
    assert place(4, 1, (0,)) == 0
    assert place(5, 1, (0,)) is None  # no page left there
    assert place(5, 1) == 1
    assert [place(6, 1), pool.choose_shard(1, range(3))] == [2, None]  # no slot left
    pool.free(residents[0])
    assert pool.choose_shard(6, range(3)) is None
    assert residents[0].slot == -1


def test_pages_are_distributed_round_robin_over_the_parts_of_a_shard() -> None:
    pool = PagePool(replace(LIMITS, num_shards=2, pages_per_shard=6, num_sequence_shards=3))
    one, two, three = (sequence(number, 1, 1) for number in range(3))
    pool.allocate(one, 4, 1)
    assert [pool._limits.place_of(page) for page in one.held[0].pages] == [(1, 0), (1, 1), (1, 2), (1, 0)]
    assert pool.num_free_pages == 8
    assert pool.free_pages(1) == 0  # another sequence would begin on the first sequence shard, which has no page left
    assert pool.choose_shard(1, [1]) is None
    assert pool.missing_pages(one, 6) == 0
    assert pool.missing_pages(one, 8) == 2
    assert not pool.grow(one, 7)
    assert pool.grow(one, 6)
    pool.allocate(two, 6, 0)
    pool.check([one, two])
    pool.free(one)
    pool.allocate(three, 2, 1)
    pool.check([two, three])


def test_a_shard_takes_no_more_sequences_than_it_can_decode() -> None:
    pool = PagePool(replace(LIMITS, num_shards=1))
    for number in range(3):
        pool.allocate(sequence(number, 1, 1), 1, 0)
    assert pool.choose_shard(1, [0]) is None


@pytest.mark.parametrize("fault", ["lost", "twice", "slot", "shard", "sequence shard", "count"])
def test_check_notices(fault: str) -> None:
    pool, one, two = PagePool(replace(LIMITS, num_sequence_shards=5)), sequence(0, 1, 1), sequence(1, 1, 1)
    pool.allocate(one, 2, 0)
    pool.allocate(two, 2, 1)
    pool.check([one, two])
    if fault == "lost":
        one.held[0].pages.pop()
    elif fault == "twice":
        one.held[0].pages[0] = two.held[0].pages[0]
    elif fault == "slot":
        one.slot = two.slot
    elif fault == "shard":
        one.held, two.held = two.held, one.held
    elif fault == "sequence shard":
        one.held[0].pages.reverse()
    else:
        one.shard = 1
    with pytest.raises(AssertionError):
        pool.check([one, two])
