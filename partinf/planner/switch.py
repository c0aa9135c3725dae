"""From how many tokens a step runs prefill's FFN roles instead of decode's: the one number that the engine looks up, and its table.

Both phases run over one storage, so they are compared on one shape: a step of prompts, with their attention, whose way to and from the
linear layers is another under either phase's roles. The program is the engine's, whatever program the layout was chosen for: gathers of
weights hide behind products only where the layout has them go ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from partinf.cost.movement import ways
from partinf.cost.split import StepShape
from partinf.foundation.limits import NEVER
from partinf.foundation.rounding import ceil_div, round_up
from partinf.layout import PHASES, AttentionRole, Layout
from partinf.planner.evaluate import Evaluator
from partinf.plans import row_axes

_MOST_TOKENS = 1 << 24
_APART = 4


@dataclass(frozen=True)
class SwitchRow:
    """Steps of this many prompt tokens: seconds under either phase's FFN roles, and the phase whose roles they run."""

    tokens: int
    prefill_seconds: float
    decode_seconds: float
    runs: str


def prefill_from(evaluator: Evaluator, layout: Layout, padded_heads: int = 0) -> int:
    """The number of tokens from which a step is faster under prefill's FFN roles than under decode's; `NEVER` when it never is."""
    if layout.prefill.gather == layout.decode.gather:
        return NEVER
    step, seconds = _multiple(evaluator, layout), _step_seconds(evaluator, layout, padded_heads)

    def wins(multiple: int) -> bool:
        prefill, decode = seconds(multiple * step)
        return prefill < decode

    high = 1
    while not wins(high):
        high *= 2
        if high * step > _MOST_TOKENS:
            return NEVER
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if wins(middle) else (middle, high)
    return high * step


def switch_table(evaluator: Evaluator, layout: Layout, padded_heads: int, from_tokens: int) -> list[SwitchRow]:
    """Steps below, at and above the switch, four times as many tokens from row to row; empty when there is no switch."""
    if from_tokens >= NEVER:
        return []
    step, seconds = _multiple(evaluator, layout), _step_seconds(evaluator, layout, padded_heads)
    sizes = {from_tokens * _APART**power for power in range(3)}
    size = from_tokens // _APART // step * step
    while size >= step:
        sizes.add(size)
        size = size // _APART // step * step
    return [SwitchRow(size, *seconds(size), "prefill" if size >= from_tokens else "decode") for size in sorted(sizes)]


def _multiple(evaluator: Evaluator, layout: Layout) -> int:
    batch = layout.prefill.attention_axes(AttentionRole.BATCH)
    split = {axis for label in PHASES for axis in row_axes(evaluator.model, layout, layout.phase(label))}
    return ways(tuple({*split, *batch}), evaluator.pricing.slice.axis_sizes)


def _step_seconds(evaluator: Evaluator, layout: Layout, padded_heads: int) -> Callable[[int], tuple[float, float]]:
    """A function of the tokens: seconds of a step of prompts under prefill's and under decode's FFN roles."""
    workload = evaluator.workload
    batch_ways = ways(layout.prefill.attention_axes(AttentionRole.BATCH), evaluator.pricing.slice.axis_sizes)

    def seconds(tokens: int) -> tuple[float, float]:
        prompts = ceil_div(tokens, max(workload.input_len, 1)) if workload.input_len else 1
        shape = StepShape(prefill_tokens=tokens, prefill_slots=round_up(prompts, batch_ways))
        prefill, decode = (evaluator.prompts(layout, label, padded_heads, shape).seconds for label in PHASES)
        return prefill, decode

    return seconds
