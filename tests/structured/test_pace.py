"""What constrained rows cost the rows next to them, on a device that works alongside the host."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

import pytest

from experiments.constrained_rows.measure import HOSTILE
from experiments.constrained_rows.simulated import ROWS, STEP_SECONDS, Device
from partinf.engine import Engine, SamplingParams
from partinf.engine.constraint import Grammar
from partinf.structured import Isolated, Structure
from tests.structured.support import TOKENIZER

VOCAB = 300


@pytest.fixture(scope="module")
def strangers() -> Iterator[Isolated]:
    found = Isolated(TOKENIZER, VOCAB)
    yield found
    found.close()


def run(held: Sequence[Grammar]) -> tuple[float, float]:
    """Tokens per second of 36 rows, the first of them held to grammars; and the longest time between two tokens of a free one."""
    engine = Engine(Device(VOCAB), tokenizer=TOKENIZER, lag=1, num_mask_threads=1)
    for number in range(ROWS):
        grammar = held[number] if number < len(held) else None
        engine.add_request([5, number], SamplingParams(max_tokens=1000, ignore_eos=True, constraint=grammar))
    while engine.metrics.iterations < 10:
        engine.step()
    engine.metrics.clear()
    times = [time.perf_counter()]
    while engine.metrics.iterations < 150:
        engine.step()
        times.append(time.perf_counter())
    return engine.metrics.generated_tokens / (times[-1] - times[0]), max(b - a for a, b in itertools.pairwise(times))


@pytest.mark.slow
def test_free_rows_keep_their_pace_with_constrained_ones(strangers: Isolated) -> None:
    schema = {"type": "array", "items": {"type": "string", "minLength": 900}, "minItems": 50}
    held = [strangers(Structure.json_schema(schema))] * 4
    shares = sorted(run(held)[0] / run([])[0] for _ in range(3))
    print(f"32 free rows and 4 constrained ones: {shares[1]:.3f} of the throughput of 36 free ones")
    assert shares[1] > 0.9


@pytest.mark.slow
def test_free_rows_keep_their_pace_with_hostile_ones(strangers: Isolated) -> None:
    """The constrained rows themselves nearly stand still: without them it were 0.889."""
    found = [(run([strangers(structure) for structure in HOSTILE]), run([])[0]) for _ in range(3)]
    shares, gaps = sorted(speed / free for (speed, _), free in found), sorted(gap for (_, gap), _ in found)
    print(f"32 free rows with 4 hostile ones: {shares[1]:.3f} of the throughput of 36 free ones, longest gap {1e3 * gaps[1]:.1f} ms")
    assert shares[1] > 0.85
    assert gaps[1] < STEP_SECONDS + 0.03
