"""The fake runner notices what a device would not, so that tests which run on it mean something."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from partinf.engine import FakeRunner
from partinf.engine.runner import Runner
from partinf.engine.step import DecodeRow, PageTable, PrefillChunk, RowSampling, SampledToken, Step
from tests.engine.support import ROOMY, VOCAB

LIMITS = replace(ROOMY, num_shards=2, pages_per_shard=4, num_prefill_shards=2, prefill_shards=((0,), (1,)), max_prefill_slots_per_shard=1)
CHUNK = PrefillChunk(slot=0, shard=0, tokens=(1, 2, 3, 4, 5), start=0, tables=(PageTable((2, 0)),), last=True, sampling=RowSampling())
ROW = DecodeRow(slot=0, shard=0, token=None, position=5, tables=(PageTable((2, 0)),), sampling=RowSampling())


def run(runner: FakeRunner, step: Step) -> tuple[SampledToken | None, ...]:
    runner.submit(step)
    output = runner.collect()
    return (*output.decode, *output.prefill)


def test_it_attends_through_the_page_table() -> None:
    runner: Runner = FakeRunner(LIMITS)
    assert isinstance(runner, FakeRunner)
    first = 1 * 1 + 2 * 2 + 3 * 3 + 4 * 4 + 5 * 5
    assert run(runner, Step(prefill=(CHUNK,))) == (SampledToken(first % VOCAB, -float(first % VOCAB)),)
    second = first + 6 * (first % VOCAB)
    assert run(runner, Step(decode=(ROW,))) == (SampledToken(second % VOCAB, -float(second % VOCAB)),)


def test_chunks_and_one_piece_agree() -> None:
    (whole,) = run(FakeRunner(LIMITS), Step(prefill=(CHUNK,)))
    runner = FakeRunner(LIMITS)
    head = replace(CHUNK, tokens=(1, 2, 3), tables=(PageTable((2,)),), last=False)
    assert run(runner, Step(prefill=(head,))) == (None,)
    assert run(runner, Step(prefill=(replace(CHUNK, tokens=(4, 5), start=3),))) == (whole,)


def test_a_page_of_another_sequence_gives_another_token() -> None:
    tokens = []
    for pages in ((2, 0), (2, 1)):
        runner = FakeRunner(LIMITS)
        runner.submit(Step(prefill=(CHUNK,)))
        runner.submit(Step(prefill=(replace(CHUNK, slot=1, tokens=(9, 9, 9, 9, 9), tables=(PageTable((3, 1)),)),)))
        runner.submit(Step(decode=(ROW._replace(token=6, tables=(PageTable(pages),)),)))
        tokens.append([runner.collect() for _ in range(3)][-1].decode[0])
    assert tokens[0] != tokens[1]


def test_sampling_depends_on_seed_sample_and_position_alone() -> None:
    def sampled(**sampling: Any) -> SampledToken | None:
        return run(FakeRunner(LIMITS), Step(prefill=(replace(CHUNK, sampling=RowSampling(**sampling)),)))[0]

    assert sampled(temperature=1.0, seed=1) == sampled(temperature=0.5, seed=1)
    assert len({sampled(), sampled(temperature=1.0, seed=1), sampled(temperature=1.0, seed=2)}) == 3


@pytest.mark.parametrize(
    "step, problem",
    [
        (Step(), "the step is empty"),
        (Step(prefill=(CHUNK, replace(CHUNK, shard=1, tables=(PageTable((4, 5)),), prefill_shard=1))), "slots"),
        (Step(prefill=(replace(CHUNK, slot=8),)), "slots"),
        (Step(prefill=(replace(CHUNK, tables=(PageTable((2,)),)),)), "1 pages for positions up to 5"),
        (Step(prefill=(replace(CHUNK, tables=(PageTable((2, 0, 1)),)),)), "3 pages for positions up to 5"),
        (Step(prefill=(replace(CHUNK, tables=(PageTable((2, 4)),)),)), "not all of shard 0"),
        (Step(prefill=(replace(CHUNK, shard=1),)), "not all of shard 1"),
        (Step(prefill=(replace(CHUNK, prefill_shard=1),)), "shard 0 cannot prefill on shard 1"),
        (Step(prefill=(CHUNK, replace(CHUNK, slot=1, tables=(PageTable((1, 3)),)))), "prefill shard 0 has more than 1 chunks"),
        (
            Step(prefill=(replace(CHUNK, tokens=(1,) * 17, tables=(PageTable((0, 1, 2, 3, 3)),)),)),
            "prefill shard 0 has more than 16 tokens",
        ),
        (Step(prefill=(replace(CHUNK, tokens=(), tables=(PageTable(()),)),)), "an empty chunk"),
        (Step(prefill=(replace(CHUNK, tokens=(1, VOCAB, 3, 4, 5)),)), f"token {VOCAB} is outside"),
        (Step(decode=(ROW._replace(slot=1),), prefill=(CHUNK,)), "page 0 is written by slots 1 and 0"),
        (Step(decode=(ROW,)), "no token was sampled in it yet"),
        (Step(decode=(ROW._replace(token=1),)), "holds position -1, where 0 is read"),
    ],
)
def test_what_it_refuses(step: Step, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        FakeRunner(LIMITS).submit(step)


def test_too_many_decode_rows() -> None:
    rows = tuple(ROW._replace(slot=slot, token=1, position=0, tables=(PageTable((slot,)),)) for slot in range(3))
    with pytest.raises(ValueError, match="shard 0 has more than 2 decode rows"):
        FakeRunner(replace(LIMITS, max_decode_rows_per_shard=2)).submit(Step(decode=rows))
