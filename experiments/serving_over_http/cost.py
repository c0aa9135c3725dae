"""What a token costs the front end: the server with a runner that only waits. Writes cost.json.

    python -m experiments.serving_over_http.cost        # half a minute

Every step takes 30 ms of waiting and 32 sequences take part, so nearly all CPU time is the engine's own and the front end's; the
difference between answering through `Engine.generate` and through HTTP is the front end's.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from experiments.serving_over_http.measure import MODEL, ROWS, WAYS, Client, requests, through_engine, word_tokenizer
from partinf.engine import Engine, RunnerLimits
from partinf.engine.step import SampledToken, Step, StepOutput
from partinf.serve.server import Loaded, Options, Server, listen

VOCAB, STEP_SECONDS, REPEATS = 1000, 0.03, 5

LIMITS = RunnerLimits(
    max_decode_rows_per_shard=ROWS,
    max_prefill_tokens=2048,
    max_prefill_slots_per_shard=ROWS,
    page_size=16,
    pages_per_shard=8 * ROWS,
    num_shards=1,
    num_slots=ROWS,
    max_len=128,
    vocab_size=VOCAB,
)


class Waiting:
    """A runner that waits, and says that every token is the fifth."""

    limits = LIMITS

    def __init__(self) -> None:
        self._done: deque[StepOutput] = deque()

    def submit(self, step: Step) -> None:
        time.sleep(STEP_SECONDS)
        prefill = tuple(SampledToken(5) if chunk.last else None for chunk in step.prefill)
        self._done.append(StepOutput(tuple(SampledToken(5) for _ in step.decode), prefill))

    def collect(self) -> StepOutput:
        return self._done.popleft()

    def reset(self) -> None:
        self._done.clear()


def main() -> int:
    tokenizer = word_tokenizer(VOCAB)
    engine, bodies = Engine(Waiting(), tokenizer=tokenizer, lag=1), requests(ROWS, VOCAB)
    tokens = sum(body["max_tokens"] for body in bodies)
    server = Server(lambda: Loaded(engine, tokenizer, None), Options([MODEL]))
    listener, loop = listen("127.0.0.1", 0), asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve([listener])))
    thread.start()
    while server.front.running is None:
        time.sleep(0.01)
    client = Client(listener.getsockname()[1], ROWS, VOCAB)
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(REPEATS + 1):
        for way in WAYS:
            before = time.process_time()
            through_engine(engine, bodies) if way == "engine" else client.run(way)
            cpu[way].append(time.process_time() - before)
    client.close()
    loop.call_soon_threadsafe(server.drain)
    thread.join()
    medians: dict[str, Any] = {way: 1e6 * statistics.median(each[1:]) / tokens for way, each in cpu.items()}
    front = {way: medians[way] - medians["engine"] for way in WAYS[1:]}
    results = {"rows": ROWS, "tokens": tokens, "step_seconds": STEP_SECONDS, "cpu_us_per_token": medians, "front_end_us_per_token": front}
    Path(__file__).with_name("cost.json").write_text(json.dumps(results, indent=1) + "\n")
    print(front, file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
