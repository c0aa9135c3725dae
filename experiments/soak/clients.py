"""Clients of the soak: each sends one request, reads its stream, maybe cancels or leaves, and checks every token that it hears."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from experiments.soak.traffic import Known
from partinf.demo_tasks import check
from partinf.engine import Engine, FinishReason, RequestOutput, TokenEvent
from partinf.foundation.errors import InvalidInput, Overloaded

ENDED = (FinishReason.STOP, FinishReason.LENGTH)
SHARE_CANCELLED, SHARE_LEAVING, SHARE_TIMED, SHARE_INVALID = 0.08, 0.08, 0.1, 0.02
_KEPT_PROBLEMS = 20


@dataclass
class Tally:
    """What became of the requests of all clients.

    Attributes:
        outcomes: requests by what became of them: answered, cancelled, timeout, left (by the client), refused, invalid.
        samples: accepted answers, n per request. compared: samples that ran to their end and were compared with what they get alone;
            plain of them are greedy tasks, right of those have the answer that the task asks for.
        drifted: sampled or adjusted samples that left the answer which they get alone at some token.
        largest_difference: of a log-probability from that of the same token alone.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    samples: int = 0
    compared: int = 0
    plain: int = 0
    right: int = 0
    drifted: int = 0
    tokens: int = 0
    largest_difference: float = 0.0
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        if len(self.problems) < _KEPT_PROBLEMS:
            self.problems.append(text)


class Heard:
    """One sample of a request as its client hears it."""

    def __init__(self, alone: RequestOutput) -> None:
        self.alone = alone
        self.tokens: list[int] = []
        self.text = ""
        self.reason: FinishReason | None = None
        self.drifted = False

    def hear(self, event: TokenEvent, tally: Tally) -> str | None:
        """Take an event; what is wrong with it, if anything."""
        if self.reason is not None:
            return f"an event after {self.reason}"
        self.text += event.text
        self.reason = event.finish_reason
        if event.token is None:
            return None
        tally.tokens += 1
        place = len(self.tokens)
        self.tokens.append(event.token)
        if event.index != place:
            return f"token {event.index} comes as number {place}"
        self.drifted = self.drifted or self.alone.tokens[place : place + 1] != (event.token,)
        if not self.drifted and event.logprob is not None and self.alone.logprobs is not None:
            tally.largest_difference = max(tally.largest_difference, abs(event.logprob - self.alone.logprobs[place]))
        return None

    def wrong(self) -> str | None:
        """What differs from the answer alone, once the sample has ended; an early end may have the beginning of it."""
        if self.reason is None:
            return "no end"
        if self.reason not in ENDED:
            return None if self.alone.text.startswith(self.text) else f"text {self.text!r} does not begin {self.alone.text!r}"
        mine, alone = (self.reason, self.text, tuple(self.tokens)), (self.alone.finish_reason, self.alone.text, self.alone.tokens)
        return None if mine == alone else f"{mine} instead of {alone}"


async def client(engine: Engine, known: Known, rng: random.Random, tally: Tally) -> None:
    """Send one request and live through whatever becomes of it."""
    params, prompt = known.params, known.task.prompt
    fate = rng.random()
    if rng.random() < SHARE_TIMED:
        params = replace(params, timeout=rng.uniform(0.02, 0.5))
    if fate > 1 - SHARE_INVALID:
        prompt *= 40  # longer than the context
    leaves_after = rng.randint(1, 12) if SHARE_CANCELLED <= fate < SHARE_CANCELLED + SHARE_LEAVING else None
    try:
        stream = engine.stream(prompt, params)
    except Overloaded as refusal:
        tally.outcomes["refused"] += 1
        if not refusal.retry_after > 0:
            tally.problem(f"refused with retry_after = {refusal.retry_after}")
        return
    except InvalidInput:
        tally.outcomes["invalid"] += 1
        return
    tally.samples += params.n
    if fate < SHARE_CANCELLED:
        asyncio.get_running_loop().call_later(rng.uniform(0.0, 0.4), engine.cancel, stream.id)
    heard, events = [Heard(alone) for alone in known.alone], 0
    async for event in stream:
        wrong = heard[event.sample].hear(event, tally)
        if wrong is not None:
            tally.problem(f"{stream.id}: {wrong}")
        events += 1
        if events == leaves_after:
            tally.outcomes["left"] += 1
            return
    _account(known, heard, tally)


def _account(known: Known, heard: Sequence[Heard], tally: Tally) -> None:
    """A request of which every sample has ended."""
    reasons = {sample.reason for sample in heard}
    for reason, outcome in ((FinishReason.CANCELLED, "cancelled"), (FinishReason.TIMEOUT, "timeout")):
        if reason in reasons:
            tally.outcomes[outcome] += 1
            break
    else:
        tally.outcomes["answered"] += 1
    for sample in heard:
        if sample.reason in ENDED:
            tally.compared += 1
            tally.plain += known.plain
            tally.right += known.plain and check(known.task, sample.text)
        if sample.drifted and not known.plain:
            tally.drifted += 1  # a choice that hung by a rounding; few may
        elif (wrong := sample.wrong()) is not None:
            tally.problem(f"{known.task.prompt!r}, {known.params}: {wrong}")


async def offer(engine: Engine, requests: Sequence[Known], rate: float, seconds: float, rng: random.Random, tally: Tally) -> int:
    """Send requests at a rate for some time, wait until all are done, and return how many there were."""
    loop = asyncio.get_running_loop()
    clients: set[asyncio.Task[None]] = set()
    failures: list[BaseException] = []

    def done(task: asyncio.Task[None]) -> None:
        clients.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            failures.append(error)

    count, coming, end = 0, loop.time(), loop.time() + seconds
    while loop.time() < end:
        coming += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, coming - loop.time()))
        task = asyncio.create_task(client(engine, rng.choice(requests), rng, tally))
        clients.add(task)
        task.add_done_callback(done)
        count += 1
    if clients:
        _, hanging = await asyncio.wait(clients, timeout=60)
        for task in hanging:
            tally.problem("a client is still waiting a minute after the last request was sent")
            task.cancel()
    for error in failures:
        tally.problem(f"{type(error).__name__}: {error}")
    return count
