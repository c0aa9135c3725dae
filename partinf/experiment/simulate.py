"""An experiment in the simulator: the same engine and the same buckets, on the cost model's clock."""

from __future__ import annotations

from typing import Any

from partinf.buckets import runner_limits
from partinf.experiment.description import Experiment
from partinf.experiment.result import pricing_of, result, serve
from partinf.simulation.cost_runner import CostRunner
from partinf.simulation.step_price import StepPrice


def simulate(experiment: Experiment) -> Any:
    """The result of a simulated run; see `partinf.experiment.result`."""
    plan = experiment.plan()
    runner = CostRunner(runner_limits(plan), StepPrice(plan, pricing_of(plan), buckets=plan.buckets, sampling=False))
    engine, outputs, seconds = serve(experiment, plan, runner, runner.clock)
    return result(experiment, plan, engine, outputs, seconds, None)
