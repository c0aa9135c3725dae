"""Async streams share one engine and one thread with each other and with other callers."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from partinf.engine import Engine, FakeRunner, FinishReason, RequestFailed, SamplingParams, TokenEvent
from partinf.engine.step import Step
from tests.engine.support import ROOMY, alone, make_engine

_others: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def _no_threads_of_other_tests() -> None:
    """Engines that serve other tests of this process have threads of the same name."""
    _others.clear()
    _others.update(threading.enumerate())


def driver_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "partinf-engine" and thread not in _others]


async def wait_for_idle() -> None:
    deadline = time.monotonic() + 5
    while driver_threads():
        assert time.monotonic() < deadline, "the driver thread does not end"
        await asyncio.sleep(0.002)


def test_many_streams_at_once() -> None:
    engine = make_engine(None)
    params = [SamplingParams(max_tokens=3 + number % 7, temperature=1.0, seed=number) for number in range(30)]

    async def consume(number: int) -> list[TokenEvent]:
        await asyncio.sleep(0.001 * (number % 5))
        return [event async for event in engine.stream([number % 29, 3], params[number], f"r{number}")]

    async def main() -> list[list[TokenEvent]]:
        events = await asyncio.gather(*(consume(number) for number in range(30)))
        await wait_for_idle()
        return events

    for number, events in enumerate(asyncio.run(main())):
        expected = alone(ROOMY, [number % 29, 3], params[number], f"r{number}")
        assert tuple(event.token for event in events) == expected.tokens
        assert events[-1].finish_reason is FinishReason.LENGTH
    assert engine.metrics.summary().mean_batch_size > 1
    assert not engine.has_work
    engine._scheduler.pool.check([])


def test_the_loop_stays_free_while_an_iteration_runs() -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Slow(FakeRunner):
        def submit(self, step: Step) -> None:
            entered.set()
            assert go_on.wait(5)
            super().submit(step)

    engine = Engine(Slow(ROOMY), check_invariants=True)

    async def main() -> tuple[list[TokenEvent], list[TokenEvent]]:
        async def consume(prompt: list[int]) -> list[TokenEvent]:
            return [event async for event in engine.stream(prompt, SamplingParams(max_tokens=2))]

        first = asyncio.create_task(consume([1]))
        await asyncio.to_thread(entered.wait, 5)
        # The runner is busy: requests come in and go all the same.
        gone = engine.add_request([2], SamplingParams(max_tokens=2))
        assert engine.cancel(gone)
        second = asyncio.create_task(consume([3]))
        await asyncio.sleep(0)
        go_on.set()
        return await first, await second

    first, second = asyncio.run(main())
    assert (len(first), len(second)) == (2, 2)
    assert [output.finish_reason for output in engine.step()] == [FinishReason.CANCELLED]


def test_cancelling_a_task_cancels_its_request() -> None:
    engine = make_engine()

    async def main() -> None:
        stream = engine.stream([1], SamplingParams(max_tokens=60), "endless")
        started = asyncio.Event()

        async def consume() -> None:
            async for _ in stream:
                started.set()
                await asyncio.sleep(0.001)

        task = asyncio.create_task(consume())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_for_idle()

    asyncio.run(main())
    assert not engine.cancel("endless")
    engine._scheduler.pool.check([])


def test_cancel_reaches_a_waiting_consumer() -> None:
    engine = make_engine(lambda context: time.sleep(0.002) or 1)

    async def main() -> list[TokenEvent]:
        events = []
        async for event in engine.stream([1], SamplingParams(max_tokens=60), "mine"):
            events.append(event)
            engine.cancel("mine")
        return events

    events = asyncio.run(main())
    assert events[-1].finish_reason is FinishReason.CANCELLED
    assert events[-1].token is None


def test_a_failing_runner_reaches_every_stream() -> None:
    def rule(context: list[int]) -> int:
        if len(context) == 4:
            raise OSError("device lost")
        return 1

    engine = make_engine(rule)  # type: ignore[arg-type]

    async def consume(prompt: list[int]) -> None:
        async for _ in engine.stream(prompt, SamplingParams(max_tokens=9)):
            pass

    async def main() -> list[BaseException | None]:
        failures = await asyncio.gather(consume([1]), consume([1]), return_exceptions=True)
        await wait_for_idle()
        return failures

    for failure in asyncio.run(main()):
        assert isinstance(failure, RequestFailed)
        assert isinstance(failure.__cause__, OSError)
    assert not engine.has_work


def test_generate_during_streams() -> None:
    engine = make_engine(None)

    async def main() -> None:
        async def consume() -> list[TokenEvent]:
            return [event async for event in engine.stream([4], SamplingParams(max_tokens=40), "streamed")]

        streamed = asyncio.create_task(consume())
        outputs = await asyncio.to_thread(engine.generate, [[5], [6]], SamplingParams(max_tokens=30))
        assert [output.tokens for output in outputs] == [alone(ROOMY, [n], SamplingParams(max_tokens=30), "x").tokens for n in (5, 6)]
        assert tuple(event.token for event in await streamed) == alone(ROOMY, [4], SamplingParams(max_tokens=40), "x").tokens

    asyncio.run(main())
