"""A device that works alongside the host and takes six milliseconds for a step, whatever is in it."""

from __future__ import annotations

import time
from collections import deque

from partinf.engine import FakeRunner, RunnerLimits
from partinf.engine.step import PageTable, Step, StepOutput

ROWS = 36
STEP_SECONDS = 0.006


def limits(vocab_size: int) -> RunnerLimits:
    return RunnerLimits(
        max_decode_rows_per_shard=ROWS,
        max_prefill_tokens=128,
        max_prefill_slots_per_shard=ROWS,
        page_size=16,
        pages_per_shard=ROWS * 64,
        num_shards=1,
        num_slots=ROWS,
        max_len=1024,
        vocab_size=vocab_size,
    )


class Device(FakeRunner):
    """Does not read contexts, which would take longer than a step."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(limits(vocab_size), lambda context: context[0] % (vocab_size - 4) + 2)
        self._free_at = 0.0
        self._ends: deque[float] = deque()

    def submit(self, step: Step) -> None:
        super().submit(step)
        self.steps.clear()
        self._free_at = max(self._free_at, time.perf_counter()) + STEP_SECONDS
        self._ends.append(self._free_at)

    def _context(self, slot: int, tables: tuple[PageTable, ...], start: int, end: int) -> list[int]:
        return [slot * 7 + end]

    def collect(self) -> StepOutput:
        time.sleep(max(0.0, self._ends.popleft() - time.perf_counter()))
        return super().collect()
