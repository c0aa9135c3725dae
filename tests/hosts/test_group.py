"""Several processes as threads of this one: the same schedule in all of them, and an end for all when one of them is gone."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from partinf.engine import Engine, FakeRunner, FinishReason, SamplingParams, TokenEvent
from partinf.engine.estimates import Estimates
from partinf.engine.policies.ranked import Eviction
from partinf.engine.policies.registry import PolicyOptions, make_policy
from partinf.engine.step import SampledToken, Step, StepOutput
from partinf.foundation.errors import InvalidInput
from partinf.hosts import Bounds, Group, Job, JobEnded
from partinf.hosts.wire import Door, Link, MessageKind, Purpose, connect
from tests.engine.support import ROOMY

TIGHT = replace(ROOMY, pages_per_shard=14, num_host_pages=40, num_slots=16, max_decode_rows_per_shard=4)
QUICK = Bounds(silence=0.5, stall=0.6, grace=0.05, beat=0.02)
PATIENT = Bounds(silence=20.0, stall=60.0, grace=0.05, beat=0.02)


class Process:
    """One process of a job: a group, a runner, an engine, and a thread that follows."""

    def __init__(self, index: int, count: int, peers: dict[int, tuple[str, dict[Purpose, Link]]], bounds: Bounds) -> None:
        self.ended = threading.Event()
        self.group = Group(index, count, f"process {index}", peers, bounds, self.ended.set)
        self.runner = FakeRunner(TIGHT)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def engine(self, policy: str = "mlfq", **options: object) -> Engine:
        estimates = Estimates(lambda tokens: 0.001 * tokens, 0.001, pages_for=TIGHT.pages_for)
        chosen = make_policy(policy, PolicyOptions(4, eviction=Eviction.PROACTIVE), estimates)
        runner = self.group.runner(self.runner)
        return Engine(runner, policy=chosen, lag=1, replicas=self.group, check_invariants=True, prefix_caching=True, **options)  # type: ignore[arg-type]

    def follow(self, engine: Engine) -> None:
        self._engine = engine
        self.thread.start()

    def _follow(self) -> None:
        try:
            self.group.follow(self._engine)
        except BaseException as error:
            self.error = error


@pytest.fixture
def job() -> Iterator[Callable[..., list[Process]]]:
    made: list[Process] = []

    def make(count: int, bounds: Bounds = PATIENT) -> list[Process]:
        pairs = {i: {purpose: socket.socketpair() for purpose in Purpose} for i in range(1, count)}
        links = lambda i, side: {purpose: Link(pair[side]) for purpose, pair in pairs[i].items()}  # noqa: E731
        made.append(Process(0, count, {i: (f"process {i}", links(i, 0)) for i in pairs}, bounds))
        made.extend(Process(i, count, {0: ("process 0", links(i, 1))}, bounds) for i in pairs)
        return list(made)

    yield make
    for process in made:
        process.group.close()
        if process.thread.ident is not None:
            process.thread.join(10)


def some_request(rng: random.Random) -> tuple[list[int], SamplingParams]:
    params = SamplingParams(
        max_tokens=rng.randint(1, 20),
        temperature=rng.choice([0.0, 1.0]),
        n=rng.choice([1, 1, 3]),
        presence_penalty=rng.choice([0.0, 0.0, 1.0]),
        stop_token_ids=rng.choice([(), (3,)]),
        timeout=rng.choice([None, None, 0.01]),
    )
    return rng.choices(range(20), k=rng.randint(1, 30)), params


@pytest.mark.parametrize(("policy", "happened"), [("mlfq", "swap_outs"), ("fcfs-chunked", "preemptions")])
def test_all_processes_make_the_same_schedule(job: Callable[..., list[Process]], policy: str, happened: str) -> None:
    """Requests come from another thread, are cancelled at any moment, run out of time, are preempted and swapped; a callback fails."""
    first, *others = job(3)
    engine = first.engine(policy)
    for other in others:
        other.follow(other.engine(policy))
    rng, more = random.Random(1), threading.Event()

    def broken(event: TokenEvent) -> None:
        if event.index == 3:
            raise ValueError("a client's own")

    def ask() -> None:
        names: list[str] = []
        for number in range(120):
            names.append(engine.add_request(*some_request(rng), on_token=broken if number % 10 == 0 else None))
            if rng.random() < 0.3:
                engine.cancel(rng.choice(names[-4:]))
            time.sleep(rng.choice([0, 0, 0.003]))
        more.set()

    asking = threading.Thread(target=ask)
    asking.start()
    reasons: list[FinishReason] = []
    while engine.has_work or not more.is_set():
        reasons += [output.finish_reason for output in engine.step()]
    asking.join()
    assert set(reasons) == set(FinishReason)
    assert getattr(engine.metrics, happened) > 0
    first.group.close()
    for other in others:
        other.thread.join(10)
        assert other.error is None
        assert other.runner.steps == first.runner.steps
    assert len(first.runner.steps) > 200
    assert first.group._watch.failure is None
    assert not first.ended.is_set()


def test_answers_are_those_of_an_engine_alone(job: Callable[..., list[Process]]) -> None:
    first, other = job(2)
    engine = first.engine("fcfs")
    other.follow(other.engine("fcfs"))
    rng = random.Random(2)
    prompts = [rng.choices(range(20), k=rng.randint(1, 30)) for _ in range(20)]
    expected = Engine(FakeRunner(TIGHT)).generate(prompts, SamplingParams(max_tokens=9))
    found = engine.generate(prompts, SamplingParams(max_tokens=9))
    assert [output.tokens for output in found] == [output.tokens for output in expected]
    assert [event.token for event in engine.stream([1, 2], SamplingParams(max_tokens=3))]


def test_a_request_that_cannot_be_sent_is_refused(job: Callable[..., list[Process]]) -> None:
    first, other = job(2)
    engine, follower = first.engine("fcfs"), other.engine("fcfs")
    other.follow(follower)
    with pytest.raises(InvalidInput, match="request big"):
        engine.add_request([1], SamplingParams(max_tokens=1 << 70), request_id="big")
    with pytest.raises(InvalidInput, match="takes the requests"):
        follower.add_request([1])
    assert len(engine.generate([[1]], SamplingParams(max_tokens=4))[0].tokens) == 4


def test_values_are_shared_and_compared(job: Callable[..., list[Process]]) -> None:
    first, other = job(2)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(other.group.share(None)))
    thread.start()
    assert first.group.share({"a": [1, 2.5]}) == {"a": [1, 2.5]}
    thread.join(5)
    assert found == [{"a": [1, 2.5]}]
    first.group.agree("the plan", "one")
    with pytest.raises(JobEnded, match="the plan differs from that of process 0"):
        other.group.agree("the plan", "another")
    assert first.ended.wait(5)
    assert "process 1" in (first.group._watch.failure or "")


def steps_until_the_end(engine: Engine) -> None:
    with pytest.raises(JobEnded):
        answers_for_ever(engine)


def answers_for_ever(engine: Engine) -> None:
    while True:
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=20, ignore_eos=True))


def all_end(processes: list[Process], why: str) -> None:
    for process in processes:
        assert process.ended.wait(5), process.group.name
        assert why in (process.group._watch.failure or ""), process.group._watch.failure


def test_a_process_that_disagrees_is_named(job: Callable[..., list[Process]]) -> None:
    first, good, bad = job(3, replace(PATIENT, grace=0.05))
    engine = first.engine()
    good.follow(good.engine())
    bad.follow(bad.engine())
    collect = bad.runner.collect

    def wrong() -> StepOutput:
        output = collect()
        if len(bad.runner.steps) < 20:
            return output
        return replace(output, decode=tuple(SampledToken(token.token ^ 1) for token in output.decode))

    bad.runner.collect = wrong  # type: ignore[method-assign]
    with pytest.raises(JobEnded, match="process 2 disagrees"):
        answers_for_ever(engine)
    all_end([first, good, bad], "process 2 disagrees: its schedule differs from that of process 0 at iteration")


def test_a_process_that_dies_is_named(job: Callable[..., list[Process]]) -> None:
    first, good, dead = job(3, PATIENT)
    engine = first.engine()
    good.follow(good.engine())
    for _, link in dead.group._watch._peers.values():
        link.shut()
    with pytest.raises(JobEnded, match="process 2 has ended"):
        answers_for_ever(engine)
    all_end([first, good], "process 2 has ended")


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_is_stopped_is_named(job: Callable[..., list[Process]], index: int) -> None:
    """It says nothing, and its connections stay open."""
    processes = job(2, QUICK)
    silent = processes.pop(index)
    silent.group._watch._closing.set()
    all_end(processes, f"process {index} was silent for 0.5 s")


def test_a_process_that_stalls_is_named(job: Callable[..., list[Process]]) -> None:
    """It lives and says so, but its runner is never called, or its call does not end, while others wait."""
    first, good, stuck = job(3, replace(QUICK, silence=20.0))
    engine = first.engine()
    release = threading.Event()

    def waits(step: Step) -> None:
        release.wait(20)

    first.runner.submit = good.runner.submit = waits  # type: ignore[method-assign]
    good.follow(good.engine())
    engine.add_request([1, 2])
    thread = threading.Thread(target=steps_until_the_end, args=(engine,))
    thread.start()
    all_end([first, good, stuck], "process 2 stalled: others have waited for 0.6 s in call 1 of the runner")
    release.set()
    thread.join(10)


def test_a_collective_that_never_ends_is_reported_by_all(job: Callable[..., list[Process]]) -> None:
    processes = job(2, replace(QUICK, silence=20.0))
    release = threading.Event()
    for process in processes:
        process.runner.submit = lambda step: bool(release.wait(20))  # type: ignore[method-assign,assignment]
    engine = processes[0].engine()
    processes[1].follow(processes[1].engine())
    engine.add_request([1, 2])
    thread = threading.Thread(target=steps_until_the_end, args=(engine,))
    thread.start()
    all_end(processes, "every process has waited for 0.6 s in call 1 of its runner")
    release.set()
    thread.join(10)


def test_an_error_of_one_process_reaches_all(job: Callable[..., list[Process]]) -> None:
    first, bad = job(2)
    engine = first.engine()

    def breaks(step: Step) -> None:
        raise OSError("device lost")

    bad.runner.submit = breaks  # type: ignore[method-assign]
    bad.follow(bad.engine())
    with pytest.raises(JobEnded, match="process 1: OSError: device lost"):
        answers_for_ever(engine)
    all_end([first], "process 1: OSError: device lost")
    bad.thread.join(5)
    assert isinstance(bad.error, JobEnded)


def test_a_process_alone_has_no_one_to_broadcast_to() -> None:
    group = Group(0, 1, "process 0", {}, QUICK)
    engine = Engine(FakeRunner(TIGHT), replicas=group.replicas)
    assert group.replicas is None
    assert group.share({"a": 1}) == {"a": 1}
    group.agree("the plan", "one")
    assert len(engine.generate([[1]], SamplingParams(max_tokens=4))[0].tokens) == 4
    group.close()


def test_only_those_with_the_token_may_join() -> None:
    door = Door.open("127.0.0.1")
    address = [("127.0.0.1", door.port)]
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(door.accept(2, 10)))
    thread.start()
    with socket.create_connection(address[0]) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(200))
        stranger.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert not stranger.recv(1)
    links = connect(address, door.token, 1, "process 1", 5)
    thread.join(10)
    (accepted,) = found
    name, theirs = accepted[1]  # type: ignore[index]
    assert name == "process 1"
    theirs[Purpose.WATCH].send(MessageKind.BEAT, b"abc")
    assert links[Purpose.WATCH].receive() == (MessageKind.BEAT, b"abc")
    for link in (*links.values(), *theirs.values()):
        link.close()
    with pytest.raises(TimeoutError, match="processes 1, 2 of 3 did not connect"):
        door.accept(3, 0.05)
    door.listener.close()


def test_what_a_job_must_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Job.of(None, None, None) == Job()
    assert Job.of("host:9000", 4, 3) == Job("host", 9000, 4, 3)
    assert Job.of("[::1]:9000", "2", "0") == Job("::1", 9000, 2, 0)
    with pytest.raises(InvalidInput) as caught:
        Job.of("host", None, "x")
    assert len(caught.value.offences) == 3
    with pytest.raises(InvalidInput, match=r"valid: 0\.\.1"):
        Job.of("host:1", 2, 2)
    monkeypatch.setenv("PARTINF_NUM_PROCESSES", "2")
    with pytest.raises(InvalidInput, match="PARTINF_COORDINATOR is missing"):
        Job.of_environment()
    with pytest.raises(InvalidInput, match="at least four beats"):
        Bounds(silence=0.5)
