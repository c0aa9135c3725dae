"""Simulated engines of a mixture of experts: steps cost what their ledgers say under any skew, and sequences come and go as in others."""

from __future__ import annotations

import pytest

from partinf.cost.calibration import calibration_for
from partinf.cost.pricing import Pricing
from partinf.cost.split import StepShape
from partinf.cost.step import step_ledger
from partinf.engine import Engine
from partinf.engine.policies.ranked import Eviction
from partinf.engine.policies.registry import PolicyOptions, make_policy
from partinf.hardware.slices import parse_slice
from partinf.layout.files import make_layout
from partinf.model.load import load_model_config
from partinf.plans import Plan
from partinf.simulation.arrivals import Arrival
from partinf.simulation.play import play
from partinf.simulation.sizing import Sizing, cost_runner
from partinf.simulation.step_price import StepPrice

SLICE = parse_slice("v6e:2x2")
LAYOUT = make_layout(
    {"x": "replica", "y": "ffn"}, {"x": "batch", "y": "heads"}, decode_dispatch="exchange", experts={"x": "expert", "y": "ffn"}
)
PLAN = Plan(load_model_config("qwen-3-30b-a3b"), SLICE, LAYOUT)


def pricing(skew: float) -> Pricing:
    return Pricing(SLICE, calibration_for(SLICE.chip), skew=skew)


@pytest.mark.parametrize(
    "shape", [StepShape(decode_rows=32, decode_context=1200), StepShape(prefill_tokens=2048, prefill_slots=4)], ids=str
)
def test_a_step_costs_what_its_ledger_says(shape: StepShape) -> None:
    seconds = {}
    for skew in (0.0, 1.2):
        price = StepPrice(PLAN, pricing(skew))
        seconds[skew] = price.seconds(shape)
        assert seconds[skew] == pytest.approx(step_ledger(price._split(shape)).seconds, rel=1e-12)
    # A few rows hit fewer experts if some are popular; a thousand hit all, and wait for the device that has most of them.
    assert (seconds[1.2] < seconds[0.0]) == (shape.decode_rows > 0)


def test_sequences_are_served_preempted_and_swapped() -> None:
    """On pages for a fifth of what the sequences hold in the end; a router with popular experts ends earlier."""
    ended = {}
    for skew in (0.0, 1.2):
        for eviction in (Eviction.RECOMPUTE, Eviction.REACTIVE):
            sizing = Sizing(max_rows=16, max_residents=32, max_len=512, kv_pages=32, host_bytes=8e9, extended=False)
            runner, price = cost_runner(PLAN, pricing(skew), sizing)
            policy = make_policy("mlfq", PolicyOptions(16, eviction=eviction), price.estimates(runner.limits))
            engine = Engine(runner, policy=policy, clock=runner.clock, check_invariants=True)
            assert play(engine, [Arrival(0.0, 50 + n, 40) for n in range(32)], runner.clock) == 0
            summary = engine.metrics.summary()
            assert summary.num_finished == 32
            assert summary.preemptions > 0 if eviction is Eviction.RECOMPUTE else summary.swapped_out_pages > 0
            ended[skew, eviction] = runner.clock.now
    assert ended[1.2, Eviction.RECOMPUTE] < 0.9 * ended[0.0, Eviction.RECOMPUTE]
