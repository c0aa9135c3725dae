"""Answers that are held to grammars, on a runner whose tokens show every mistake: a mask that is old, another row's or missing."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from partinf.engine import (
    Engine,
    FakeRunner,
    FinishReason,
    FirstComeFirstServed,
    Policy,
    RequestLevel,
    RequestOutput,
    SamplingParams,
    mask_workers,
)
from partinf.engine.constraint import allows
from partinf.engine.estimates import Estimates
from partinf.engine.mask_workers import MaskWorkers
from partinf.engine.policies.mlfq import MultiLevelFeedbackQueue
from partinf.engine.policies.ranked import Eviction, Pages
from partinf.engine.replicas import IterationInputs
from partinf.engine.request import Request
from partinf.foundation.errors import Costly, InvalidInput
from tests.engine.support import LETTERS, ROOMY, VOCAB, all_alone, make_engine

TIGHT = replace(ROOMY, pages_per_shard=9, num_host_pages=60, max_len=24)
ESTIMATES = Estimates(first_iteration=lambda tokens: 1.0, decode=1.0)


def mask_of(*tokens: int) -> bytes:
    bits = sum(1 << token for token in set(tokens))
    return bits.to_bytes((VOCAB + 7) // 8, "little")


@dataclass(frozen=True)
class Steps:
    """Every token is the last one plus one of `steps`, modulo the vocabulary; the answer is complete after `length` tokens.

    Attributes:
        breaks_at: number of the token after which there is no mask. seconds: that a mask takes, some twice as long and some not at all.
        gate: shut while masks are to wait.
    """

    first: int
    steps: tuple[int, ...]
    length: int = 1000
    breaks_at: int | None = None
    seconds: float = 0.0
    gate: threading.Event | None = None

    @property
    def first_mask(self) -> bytes:
        return mask_of(self.first)

    def start(self) -> _Walk:
        return _Walk(self)

    def holds(self, tokens: tuple[int, ...]) -> bool:
        pairs = itertools.pairwise(tokens)
        return tokens[0] == self.first and all((new - old) % VOCAB in self.steps for old, new in pairs) and len(tokens) <= self.length


class _Walk:
    def __init__(self, grammar: Steps) -> None:
        self._grammar = grammar
        self._count = 0
        self._mask = grammar.first_mask

    def accept(self, token: int, quick: bool = False) -> bytes | None:
        if quick and (self._grammar.gate or self._grammar.seconds):
            raise Costly
        assert allows(self._mask, token), "a token that the mask does not have"
        self._count += 1
        time.sleep(self._grammar.seconds * (token % 3))
        assert self._grammar.gate is None or self._grammar.gate.wait(20)
        if self._count == self._grammar.breaks_at:
            raise RuntimeError("too complex")
        self._mask = mask_of(*((token + step) % VOCAB for step in self._grammar.steps))
        return None if self._count == self._grammar.length else self._mask


GRAMMARS = [Steps(3, (1, 5)), Steps(7, (2, 3, 11)), Steps(20, (4, 6), length=5)]
POLICIES: dict[str, Callable[[], Policy]] = {
    "fcfs": FirstComeFirstServed,
    "chunked": lambda: FirstComeFirstServed(chunk_prefills=True),
    "swap": lambda: MultiLevelFeedbackQueue(ESTIMATES, 4, pages=Pages(Eviction.REACTIVE, None)),
    "recompute": lambda: MultiLevelFeedbackQueue(ESTIMATES, 4, pages=Pages(Eviction.RECOMPUTE, None)),
    "whole batches": lambda: RequestLevel(3),
}


def held(grammar: Steps | None, **how: object) -> SamplingParams:
    return SamplingParams(max_tokens=10, constraint=grammar, **how)  # type: ignore[arg-type]


def check(output: RequestOutput, grammar: Steps) -> None:
    assert grammar.holds(output.tokens)
    assert output.finish_reason is (FinishReason.STOP if len(output.tokens) == grammar.length else FinishReason.LENGTH)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("policy", POLICIES)
def test_answers_keep_to_their_grammars_in_any_company(policy: str, lag: int, stages: int, threads: int) -> None:
    """With penalties, samples, preemption, swapping and stages, masks that come at any time; what others have is as if they were alone."""
    slow = [replace(grammar, seconds=0.001 * bool(threads)) for grammar in GRAMMARS]
    params = [
        *(held(grammar, n=2, temperature=1.0, seed=4) for grammar in slow),
        held(slow[0], presence_penalty=1.0, frequency_penalty=2.0),
        held(None),
        held(None, temperature=1.0, n=2, seed=9),
    ]
    limits = replace(TIGHT, num_stages=stages)
    engine = Engine(
        FakeRunner(limits),
        policy=POLICIES[policy](),
        lag=lag,
        clock=lambda: engine.metrics.iterations,
        check_invariants=True,
        num_mask_threads=threads,
    )
    prompts = [[number, 7, number, 3, 1] for number in range(len(params))]
    outputs = engine.generate(prompts, params)
    for output in outputs:
        grammar = params[output.prompt[0]].constraint
        if grammar is not None:
            assert isinstance(grammar, Steps)
            check(output, grammar)
    want = [output.tokens for prompt, how in zip(prompts, params, strict=True) for output in all_alone(ROOMY, prompt, how, "x")]
    assert [output.tokens for output in outputs] == want
    if policy in ("swap", "recompute"):
        assert engine.metrics.preemptions + engine.metrics.swap_outs > 0


def test_free_rows_run_in_every_step_and_constrained_ones_in_every_second() -> None:
    engine = make_engine(lag=1)
    engine.generate([[1], [2]], [SamplingParams(max_tokens=12), replace(held(GRAMMARS[0]), max_tokens=6)])
    rows = [[row.mask is not None for row in step.decode] for step in engine._runner.steps]
    assert all(False in row for row in rows[1:12])
    constrained = [index for index, row in enumerate(rows) if True in row]
    assert [later - earlier for earlier, later in itertools.pairwise(constrained)] == [2] * 4


def test_constrained_rows_alone_run_in_every_step() -> None:
    engine = make_engine(lag=1)
    (output,) = engine.generate([[1]], held(GRAMMARS[0]))
    assert engine.metrics.iterations == len(output.tokens)


def test_free_rows_do_not_wait_for_a_mask_that_takes_long() -> None:
    """Nor do other constrained ones; and a request that waits is cancelled and timed out like any other."""
    gate = threading.Event()
    engine = make_engine(lag=1, num_mask_threads=2)
    engine.add_request([1], held(replace(GRAMMARS[0], gate=gate)), "slow")
    engine.add_request([2], held(replace(GRAMMARS[1], gate=gate)), "left")
    free = engine.generate([[3]], SamplingParams(max_tokens=12))
    assert len(free[0].tokens) == 12
    assert engine.load.num_running == 2
    assert engine.cancel("left")
    assert engine.step(wait=False)[0].finish_reason is FinishReason.CANCELLED
    gate.set()
    other = engine.generate([[4]], held(GRAMMARS[2]))
    check(other[0], GRAMMARS[2])
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step()
    check(outputs[0], GRAMMARS[0])
    assert engine.load.page_usage == 0


def test_one_thread_serves_those_first_whose_masks_take_least() -> None:
    """Hostile answers do not keep a slow one waiting that comes after them, and nothing is computed for those that have ended."""
    gate, taken = threading.Event(), list[int]()

    class Paced:
        def __init__(self, number: int) -> None:
            self.number = number

        def accept(self, token: int, quick: bool = False) -> bytes:
            if quick:
                raise Costly
            taken.append(self.number)
            assert self.number or gate.wait(20)
            time.sleep(0.05 * (self.number in (1, 2, 3)))
            return mask_of(token)

    workers, answers = MaskWorkers(1), [Paced(number) for number in range(5)]

    def take(count: int) -> None:
        found, until = list[int](), time.monotonic() + 20
        while len(found) < count and time.monotonic() < until:
            found += [number for number, _, _ in workers.take()]
            workers.wait()

    for number in (1, 2, 3, 4):
        workers.ask(number, answers[number], 0)
    take(4)
    assert taken == [1, 2, 3, 4]  # nothing is known of any
    for number in (0, 1, 2, 3, 4):
        workers.ask(number, answers[number], 0)
    workers.take()
    workers.end(2)
    gate.set()
    take(4)
    assert taken[4:] == [0, 4, *[number for number in taken[6:] if number != 2]]
    assert sorted(taken[6:]) == [1, 3]
    assert not workers.pending


def test_a_mask_that_never_comes_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_workers, "LONGEST", 0.05)
    gate = threading.Event()
    engine = make_engine(num_mask_threads=1)
    try:
        stuck, fine = engine.generate([[1], [2]], [held(replace(GRAMMARS[0], gate=gate)), held(None)])
    finally:
        gate.set()
    assert (stuck.finish_reason, type(stuck.error)) == (FinishReason.FAILED, mask_workers.TooSlow)
    assert fine.finish_reason is FinishReason.LENGTH


def test_requests_are_taken_while_all_rows_wait_for_masks() -> None:
    gate = threading.Event()
    engine = make_engine(num_mask_threads=1)
    engine.add_request([1], held(replace(GRAMMARS[0], gate=gate)))
    for _ in range(4):
        engine.step()
    started = time.monotonic()
    (output,) = engine.generate([[2]], SamplingParams(max_tokens=3))
    gate.set()
    assert (len(output.tokens), time.monotonic() - started < 5) == (3, True)
    while engine.has_work:
        engine.step()


def test_a_grammar_that_breaks_ends_its_request_alone() -> None:
    engine = make_engine()
    broken, fine = engine.generate([[1], [2]], [held(replace(GRAMMARS[0], breaks_at=3)), held(None)])
    assert (broken.finish_reason, str(broken.error)) == (FinishReason.FAILED, "too complex")
    assert fine.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("policy", [FirstComeFirstServed(), RequestLevel(2)], ids=["fcfs", "whole-batches"])
def test_a_complete_answer_has_all_its_text_and_its_stream_ends_once(policy: Policy) -> None:
    engine = Engine(FakeRunner(ROOMY), tokenizer=LETTERS, policy=policy)
    params = replace(held(Steps(0, (1,), length=4)), stop=("dx",))  # "d" could become the stop string
    events = list(engine.stream([5], params))
    assert "".join(event.text for event in events) == "abcd"
    assert [event.token for event in events if event.token is not None] == [0, 1, 2, 3]
    assert [event.finish_reason for event in events if event.finish_reason] == [FinishReason.STOP]


def test_an_end_of_sequence_token_that_the_grammar_has_ends_the_answer() -> None:
    engine = make_engine(rule=None, tokenizer=LETTERS)
    engine.tokenizer.eos_ids = frozenset({6})  # type: ignore[union-attr]
    try:
        engine = make_engine(rule=None, tokenizer=LETTERS)
        (output,) = engine.generate([[5]], held(Steps(2, (1,))))
    finally:
        LETTERS.eos_ids = frozenset()
    assert (output.tokens, output.text, output.finish_reason) == ((2, 3, 4, 5, 6), "cdef", FinishReason.STOP)


def test_refusals_name_what_is_missing() -> None:
    engine = make_engine(limits=replace(ROOMY, constrained=False))
    with pytest.raises(InvalidInput, match=r"constraint is given.*plan with Capacity\(constrained=True\)"):
        engine.add_request([1], held(GRAMMARS[0]))
    with pytest.raises(InvalidInput, match="constraint = 'a regex'; valid: a compiled grammar"):
        SamplingParams(constraint="a regex")  # type: ignore[arg-type]


class Wire:
    """Passes inputs on as another process would get them: without grammars."""

    leads = True

    def __init__(self) -> None:
        self.inputs: list[IterationInputs] = []
        self.digests: list[bytes] = []

    def check(self, requests: list[Request]) -> None:
        assert all(request.params.constraint is None for request in requests)

    def broadcast(self, inputs: IterationInputs) -> None:
        assert all(request.params.constraint is None for request in inputs.arrivals)
        self.inputs.append(inputs)

    def scheduled(self, number: int, digest: bytes) -> None:
        self.digests.append(digest)

    def failed(self, error: BaseException) -> None:
        raise error


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_process_that_follows_makes_the_same_steps_from_masks_alone(stages: int, threads: int) -> None:
    limits = replace(TIGHT, num_stages=stages)
    wire, followed = Wire(), Wire()
    followed.leads = False
    leader = Engine(FakeRunner(limits), replicas=wire, lag=1, check_invariants=True, num_mask_threads=threads)
    follower = Engine(FakeRunner(limits), replicas=followed, lag=1, check_invariants=True)
    params = [held(replace(GRAMMARS[0], seconds=0.002), n=2), held(GRAMMARS[2]), held(None), held(replace(GRAMMARS[1], breaks_at=3))]
    outputs = leader.generate([[n, 4, 2] for n in range(4)], params)
    for inputs in wire.inputs:
        follower.replay(inputs)
    assert leader._runner.steps == follower._runner.steps
    assert wire.digests == followed.digests
    assert not follower._pending()
    for output, grammar in zip(outputs, [GRAMMARS[0], GRAMMARS[0], GRAMMARS[2]], strict=False):
        check(output, grammar)
    assert outputs[-1].finish_reason is FinishReason.FAILED
