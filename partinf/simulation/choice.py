"""Which of several layouts serves a load best: each of a few serves its beginning, on the virtual clock.

A price knows one batch. How many requests are in flight, how prompts hold up those that decode, and what waits for pages follows from a
layout's times together, and with it the share of requests in time. What is simulated is bounded and counted: so many layouts, so many
requests of the load, in an order that does not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from partinf.cost.pricing import Pricing
from partinf.engine.engine import Engine
from partinf.engine.policies.registry import PolicyOptions, make_policy
from partinf.foundation.errors import InvalidInput, raise_offences
from partinf.layout import readable_name
from partinf.model.weights import active_params
from partinf.plans import Plan
from partinf.simulation.arrivals import Arrival
from partinf.simulation.cost_runner import CostRunner
from partinf.simulation.play import play
from partinf.simulation.report import LatencyBounds, Machine, RunReport
from partinf.simulation.sizing import Sizing, cost_runner
from partinf.simulation.step_price import StepPrice

MOST_LAYOUTS = 8
_MOST_REQUESTS, _MOST_TOKENS = 200, 12_000  # of the load that layouts are compared by, and the tokens that those generate
IN_TIME = 0.99
"""Share of the requests by which a load counts as served in time."""


@dataclass(frozen=True)
class Service:
    """An engine that serves a load, but for its plan."""

    pricing: Pricing
    sizing: Sizing
    scheduler: str
    options: PolicyOptions
    bounds: LatencyBounds
    prefix_caching: bool = False

    def make(self, plan: Plan) -> tuple[CostRunner, StepPrice, Callable[..., Engine]]:
        """What runs this plan, its prices, and what makes an engine from the further arguments of `Engine`.

        Raises:
            InvalidInput: as `cost_runner`.
        """
        runner, price = cost_runner(plan, self.pricing, self.sizing)
        policy = make_policy(self.scheduler, self.options, price.estimates(runner.limits))
        return runner, price, partial(Engine, runner, policy=policy, prefix_caching=self.prefix_caching)

    def run(self, plan: Plan, arrivals: Sequence[Arrival]) -> RunReport:
        """These requests served."""
        runner, _, make = self.make(plan)
        engine = make(clock=runner.clock)
        refused = play(engine, arrivals, runner.clock, next_finish=lambda: runner.next_finish)
        machine = Machine(active_params(plan.model), plan.slice.num_chips, plan.slice.chip.peak_bf16)
        return RunReport.of(engine.metrics, runner.clock.now - arrivals[0].time, refused, self.bounds, machine)


@dataclass(frozen=True)
class Served:
    """One layout and how it served the beginning of the load."""

    plan: Plan
    report: RunReport

    @property
    def in_time(self) -> float:
        """Share of the requests that met the bounds."""
        return self.report.goodput or 0.0

    @property
    def seconds_per_token(self) -> float:
        """Mean over requests of the time from arrival to the end, per token."""
        return self.report.latencies["normalized_latency"].mean


@dataclass(frozen=True)
class Choice:
    """Layouts that were compared, the best first.

    Attributes:
        num_requests: of the load's beginning, which each of them served. num_unable: further layouts whose pool holds too little.
    """

    served: tuple[Served, ...]
    num_requests: int
    num_unable: int = 0

    @property
    def best(self) -> Served:
        return self.served[0]

    @property
    def keeps_bounds(self) -> bool:
        """Whether the best serves the load in time."""
        return self.best.in_time >= IN_TIME

    def __str__(self) -> str:
        first, *others = self.served
        text = f"chosen from {len(self.served)} layouts by simulating {self.num_requests} requests under each: "
        if first.report.bounds == LatencyBounds():
            spread = [1e3 * other.seconds_per_token for other in others]
            text += f"{1e3 * first.seconds_per_token:.4g} ms per token"
            return text + (f", against {min(spread):.4g} to {max(spread):.4g} ms under the others" if others else "")
        shares = [other.in_time for other in others]
        text += f"{first.in_time:.0%} of them in time"
        return text + (f", against {min(shares):.0%} to {max(shares):.0%} under the others" if others else "")

    def as_json(self) -> dict[str, Any]:
        """The same as plain data, seconds."""
        return {
            "requests": self.num_requests,
            "unable": self.num_unable,
            "layouts": [
                {
                    "layout": readable_name(one.plan.layout, one.plan.axis_sizes),
                    "in_time": one.in_time,
                    "ttft": one.report.latencies["ttft"].mean,
                    "time_per_token": one.report.latencies["time_per_token"].mean,
                    "seconds_per_token": one.seconds_per_token,
                }
                for one in self.served
            ],
        }


def beginning(arrivals: Sequence[Arrival]) -> list[Arrival]:
    """The requests of a load by which layouts are compared; at least one."""
    found: list[Arrival] = []
    tokens = 0
    for arrival in arrivals[:_MOST_REQUESTS]:
        tokens += arrival.output_len
        if found and tokens > _MOST_TOKENS:
            break
        found.append(arrival)
    return found


def choose(service: Service, plans: Sequence[Plan], arrivals: Sequence[Arrival]) -> Choice:
    """The plans by the share of requests in time, then by the mean time per token, then in their own order.

    Raises:
        InvalidInput: none of them can hold a request; why.
    """
    load = beginning(arrivals)
    served, offences = [], []
    for plan in plans:
        try:
            served.append(Served(plan, service.run(plan, load)))
        except InvalidInput as error:
            offences.append(error.offences)
    if not served:
        raise_offences(offences[0])
    ranked = sorted(served, key=lambda one: (-one.in_time, one.seconds_per_token))
    return Choice(tuple(ranked), len(load), len(offences))
