"""An experiment on the local devices, or that this process and others have together.

Every process runs the same lines in the same order: the schedule, the number of repeats and the order of all calls follow from the
description, never from a clock, so collectives meet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax

from partinf import api
from partinf.experiment.description import Experiment
from partinf.experiment.result import Measured, ledger_of, result, serve
from partinf.measure.entries import Entries
from partinf.measure.steps import step_call
from partinf.measure.timing import alternate
from partinf.plans import Bucket, Plan


def execute(experiment: Experiment, say: Callable[[str], None] = lambda _: None) -> Any:
    """The result of a run on devices; see `partinf.experiment.result`. Every process gets it, with times of its own.

    Args:
        say: called with what is done next.
    """
    plan = experiment.plan()
    say(f"{plan.model.name} on {plan.slice.name} ({plan.slice.mesh}): compiling {len(plan.buckets)} steps")
    model = api.load(experiment.model, plan, random_weights=experiment.random_weights)
    say(f"serving {experiment.requests} requests")
    serve(experiment, plan, model.runner, time.perf_counter)  # first-call costs stay out of the figures
    engine, outputs, seconds = serve(experiment, plan, model.runner, time.perf_counter)
    steps: dict[Bucket, tuple[float, float]] = {}
    entries: dict[Bucket, list[float | None]] = {}
    if experiment.rounds:
        say("timing steps, and the entries of their ledgers alone")
        steps, entries = _time(plan, model.runner, experiment.rounds)
    measured = Measured(jax.devices()[0].device_kind, jax.__version__, jax.process_count(), model.runner.compile_seconds, steps, entries)
    return result(experiment, plan, engine, outputs, seconds, measured)


def _time(plan: Plan, runner: Any, rounds: int) -> tuple[dict[Bucket, tuple[float, float]], dict[Bucket, list[float | None]]]:
    ledgers = {bucket: ledger_of(plan, bucket) for bucket in plan.buckets}
    alone = Entries(plan)
    for ledger in ledgers.values():
        alone.add(ledger.entries)
    calls = {f"step {bucket}": step_call(runner, bucket) for bucket in plan.buckets} | alone.calls
    timings = alternate(calls, budget=0.0, least=rounds, most=rounds)
    # A step that is alone takes as many ticks as there are pipeline stages; the ledger is that of one.
    steps = {bucket: (timings[f"step {bucket}"].seconds / plan.num_stages, timings[f"step {bucket}"].spread) for bucket in plan.buckets}
    entries = {}
    for bucket, ledger in ledgers.items():
        ways = [alone.of(entry) for entry in ledger.entries]
        entries[bucket] = [None if way is None else way.seconds(timings) for way in ways]
    return steps, entries
