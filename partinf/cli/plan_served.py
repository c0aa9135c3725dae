"""`plan` under a load: its flags read, layouts and slices chosen by simulation, and what was compared, as lines and as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from partinf.cli.arguments import is_auto
from partinf.cli.flags import Flags
from partinf.cli.planning import PlanInput
from partinf.foundation.limits import MAX_SECONDS

if TYPE_CHECKING:
    from partinf.planner.trials import Trial
    from partinf.simulation.planned import Planned
    from partinf.simulation.report import LatencyBounds

_REQUESTS = 200  # that arrive; `partinf.simulation.choice` bounds how many of them are served


def add_bounds(parser: argparse.ArgumentParser) -> None:
    """`--ttft` and `--tpot`."""
    parser.add_argument("--ttft", metavar="MS", help="bound on the time to first token at --arrivals; layouts (and slices) are simulated")
    parser.add_argument("--tpot", metavar="MS", help="bound on the time per output token at --arrivals; also simulated")


def read_bounds(flags: Flags) -> LatencyBounds | None:
    """The bounds on single requests; None where there are none. What is wrong joins the flags' offences."""
    args = flags.args
    found = [flags.optional_number(name, high=1e3 * MAX_SECONDS, above=True) for name in ("ttft", "tpot")]
    given = [flags.flag(name) for name in ("ttft", "tpot") if getattr(args, name) is not None]
    if given and args.arrivals is None:
        flags.offences.append(f"{' and '.join(given)}: latency bounds need a load; give --arrivals, in requests per second")
    if given and args.mesh == "auto":
        flags.offences.append(f"--mesh auto: layouts are simulated on one mesh for {' and '.join(given)}; name it")
    if is_auto(args.slice) and args.max_latency_ms is None and not given:
        bound = "the cheapest slice is the one that meets a bound"
        flags.offences.append(f"--slice {args.slice} needs --max-latency-ms, or --ttft and --tpot at --arrivals: {bound}")
    if not given:
        return None
    from partinf.simulation.report import LatencyBounds

    return LatencyBounds(*(None if value is None else value / 1e3 for value in found))


def chosen(wanted: PlanInput, bounds: LatencyBounds | None, trials: Callable[[], list[Trial]]) -> tuple[list[Trial], list[Planned]]:
    """The trials, and where there are bounds what was simulated for them, the chosen one foremost.

    Args:
        trials: those of a search without a load.

    Raises:
        InvalidInput: nothing fits, or with `auto` no slice serves the load in time.
    """
    if bounds is None:
        return trials(), []
    from partinf.planner.trials import Trial
    from partinf.simulation.arrivals import parse_arrivals, parse_lengths
    from partinf.simulation.planned import Load, planned, smallest_in_time

    workload = wanted.workload
    lengths = parse_lengths(f"fixed:{workload.input_len}:{workload.output_len}")
    load = Load(parse_arrivals(f"poisson:{workload.arrival_rate}", lengths, _REQUESTS), bounds)
    if wanted.auto:
        served = smallest_in_time(wanted.question, wanted.slice.chip, load)
    else:
        served = [planned(trials()[0].report, load)]
    return [Trial(one.report) for one in served], served


def lines(served: Sequence[Planned]) -> list[str]:
    """What was compared on each slice, the smallest first."""
    return [f"{one.report.slice.name}: {_choice_of(one)}" for one in (*served[1:], *served[:1])]


def as_json(served: Sequence[Planned]) -> dict[str, Any]:
    """`{"served": [...]}`, the chosen slice first; empty without a load."""
    rows = [
        {"slice": one.report.slice.name, "in_time": one.in_time, "choice": None if one.choice is None else one.choice.as_json()}
        for one in served
    ]
    return {"served": rows} if rows else {}


def _choice_of(one: Planned) -> str:
    if one.choice is None:
        return "even a single prompt on an idle server gets its first token too late under every layout"
    return f"layout {one.choice}"
