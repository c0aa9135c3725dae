"""What a token costs the front end: the server with a runner that only waits. Writes cost.json.

    python -m experiments.serving_over_http.cost        # half a minute

Every step takes 30 ms of waiting and 32 sequences take part, so nearly all CPU time is the engine's own and the front end's; the
difference between answering through `Engine.generate` and through HTTP is the front end's.
"""

from __future__ import annotations

import statistics
import time
from collections import deque

from experiments.results import write
from experiments.serving_over_http.measure import ROWS, WAYS, Client, requests, served, through_engine, word_tokenizer
from partinf.engine import Engine, RunnerLimits
from partinf.engine.step import SampledToken, Step, StepOutput

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
    server_cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    client_cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    with served(engine, tokenizer) as port:
        client = Client(port, ROWS, VOCAB)
        for repeat in range(REPEATS + 1):  # the first warms everything up
            for way in WAYS:
                before, taken = time.process_time(), 0.0
                if way == "engine":
                    through_engine(engine, bodies)
                else:
                    taken = client.run(way)["cpu"]
                if repeat:
                    server_cpu[way].append(time.process_time() - before)
                    client_cpu[way].append(taken)
        client.close()
    server = {way: 1e6 * statistics.median(each) / tokens for way, each in server_cpu.items()}
    results = {
        "rows": ROWS,
        "tokens": tokens,
        "step_seconds": STEP_SECONDS,
        "engine_us_per_token": server["engine"],
        "front_end_us_per_token": {way: server[way] - server["engine"] for way in WAYS[1:]},
        "client_us_per_token": {way: 1e6 * statistics.median(client_cpu[way]) / tokens for way in WAYS[1:]},
    }
    write(__file__, results, "cost.json")
    print(results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
