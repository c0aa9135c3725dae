"""What constrained rows cost those beside them."""

from __future__ import annotations

import time
from collections import deque

import pytest

from partinf.engine import Engine, FakeRunner, RunnerLimits, SamplingParams
from partinf.engine.constraint import Grammar
from partinf.engine.step import PageTable, Step, StepOutput
from partinf.structured import Grammars, Structure
from tests.structured.support import TOKENIZER

LIMITS = RunnerLimits(
    max_decode_rows_per_shard=36,
    max_prefill_tokens=128,
    max_prefill_slots_per_shard=36,
    page_size=16,
    pages_per_shard=36 * 64,
    num_shards=1,
    num_slots=36,
    max_len=1024,
    vocab_size=300,
)


class Timed(FakeRunner):
    """Steps take 6 ms on a device that works beside the host, which does not read contexts."""

    def __init__(self) -> None:
        super().__init__(LIMITS, lambda context: context[0] % 250 + 2)
        self._free_at = 0.0
        self._ends: deque[float] = deque()

    def submit(self, step: Step) -> None:
        super().submit(step)
        self.steps.clear()
        self._free_at = max(self._free_at, time.perf_counter()) + 0.006
        self._ends.append(self._free_at)

    def _context(self, slot: int, tables: tuple[PageTable, ...], start: int, end: int) -> list[int]:
        return [slot * 7 + end]

    def collect(self) -> StepOutput:
        time.sleep(max(0.0, self._ends.popleft() - time.perf_counter()))
        return super().collect()


def throughput(grammar: Grammar, constrained: int) -> float:
    """Tokens per second of 36 rows, so many of them constrained."""
    engine = Engine(Timed(), tokenizer=TOKENIZER, lag=1, num_mask_threads=2)
    for number in range(36):
        held = grammar if number < constrained else None
        engine.add_request([5, number], SamplingParams(max_tokens=1000, ignore_eos=True, constraint=held))
    while engine.metrics.iterations < 10:
        engine.step()
    engine.metrics.clear()
    started = time.perf_counter()
    while engine.metrics.iterations < 150:
        engine.step()
    return engine.metrics.generated_tokens / (time.perf_counter() - started)


@pytest.mark.slow
def test_free_rows_keep_their_pace_beside_constrained_ones() -> None:
    schema = {"type": "array", "items": {"type": "string", "minLength": 900}, "minItems": 50}
    grammar = Grammars(TOKENIZER, LIMITS.vocab_size)(Structure.json_schema(schema))
    shares = sorted(throughput(grammar, 4) / throughput(grammar, 0) for _ in range(3))
    print(f"32 free rows and 4 constrained ones: {shares[1]:.3f} of the throughput of 36 free ones")
    assert shares[1] > 0.9


class _Hostile:
    """Every mask takes 50 ms."""

    def __init__(self, first_mask: bytes) -> None:
        self.first_mask = first_mask

    def start(self) -> _Hostile:
        return self

    def accept(self, token: int) -> bytes:
        time.sleep(0.05)
        return self.first_mask


@pytest.mark.slow
def test_free_rows_keep_their_pace_beside_masks_that_take_long() -> None:
    """Of steps and of what each brings: the constrained rows themselves nearly stand still."""
    grammar = _Hostile(bytes([255]) * 38)
    shares = sorted(throughput(grammar, 4) / throughput(grammar, 0) for _ in range(3))
    print(f"32 free rows beside 4 whose masks take 50 ms: {shares[1]:.3f} of the throughput of 36 free ones")
    assert shares[1] > 0.85
