"""What a run of an experiment gives: one JSON object, the same keys and units wherever it ran. What was not measured is null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from partinf.buckets import split_of
from partinf.cost.calibration import calibration_for
from partinf.cost.ledger import Entry, Ledger
from partinf.cost.pricing import Pricing
from partinf.cost.program import TILED
from partinf.cost.step import step_ledger
from partinf.engine.engine import Engine
from partinf.engine.policies.registry import PolicyOptions, make_policy
from partinf.engine.request import RequestOutput, SamplingParams
from partinf.engine.runner import Runner
from partinf.experiment.description import Experiment
from partinf.layout import readable_name
from partinf.model.weights import active_params
from partinf.plans import Bucket, Plan
from partinf.simulation.report import LatencyBounds, Machine, RunReport
from partinf.simulation.step_price import StepPrice

_LAG = 1  # the host is ahead by one step, everywhere
_COUNTERS = ("mean_batch_size", "occupancy", "padding", "cache_hits")


@dataclass(frozen=True)
class Measured:
    """What only devices can tell.

    Attributes:
        entries: per bucket, seconds of one occurrence of each entry of its ledger, in its order; None for one that was not timed alone.
        steps: per bucket, seconds of a whole step and the spread of its repeats.
    """

    device_kind: str
    jax: str
    processes: int
    compile_seconds: float
    steps: Mapping[Bucket, tuple[float, float]] = field(default_factory=dict)
    entries: Mapping[Bucket, Sequence[float | None]] = field(default_factory=dict)


def pricing_of(plan: Plan) -> Pricing:
    """How the steps that run are priced: the plain program with the chip's own constants."""
    return Pricing(plan.slice, calibration_for(plan.slice.chip), program=TILED)


def ledger_of(plan: Plan, bucket: Bucket) -> Ledger:
    """The ledger of one bucket at its padded shape."""
    return step_ledger(split_of(plan, bucket, pricing_of(plan)))


def serve(experiment: Experiment, plan: Plan, runner: Runner, clock: Any) -> tuple[Engine, list[RequestOutput], float]:
    """All requests at once through an engine; the engine, the outputs in order, and seconds on the clock."""
    price = StepPrice(plan, pricing_of(plan), buckets=plan.buckets, sampling=False)
    policy = make_policy(experiment.scheduler, PolicyOptions(experiment.max_batch), price.estimates(runner.limits))
    engine = Engine(runner, policy=policy, clock=clock, lag=_LAG)
    requests = experiment.drawn()
    params = [SamplingParams(max_tokens=request.output_len, ignore_eos=True) for request in requests]
    started = clock()
    outputs = engine.generate([list(request.prompt) for request in requests], params)
    return engine, outputs, clock() - started


def result(
    experiment: Experiment, plan: Plan, engine: Engine, outputs: list[RequestOutput], seconds: float, measured: Measured | None
) -> Any:
    """The JSON object.

    Args:
        seconds: of serving all requests: on devices as measured, in a simulation on its clock.
        measured: None for a simulation.
    """
    chip = plan.slice.chip
    constants = calibration_for(chip)
    machine = Machine(active_params(plan.model), plan.slice.num_chips, chip.peak_bf16)
    figures = RunReport.of(engine.metrics, seconds, 0, LatencyBounds(), machine).as_json()
    counters = figures.pop("counters") | {name: figures.pop(name) for name in _COUNTERS}
    return {
        "experiment": asdict(experiment),
        "where": {
            "kind": "simulator" if measured is None else "devices",
            "devices": plan.slice.num_devices,
            "processes": None if measured is None else measured.processes,
            "device_kind": None if measured is None else measured.device_kind,
            "jax": None if measured is None else measured.jax,
        },
        "plan": {
            "model": plan.model.name,
            "slice": plan.slice.name,
            "mesh": plan.slice.mesh,
            "layout": readable_name(plan.layout, plan.axis_sizes),
            "weights": plan.weights.value,
            "kv": plan.kv.value,
            "buckets": [str(bucket) for bucket in plan.buckets],
            "kv_pages_per_shard": plan.cache.pages_per_shard,
        },
        "constants": {"of": constants.name, "measured": constants.measured, "error": constants.error, "source": constants.source},
        "requests": [
            {
                "input_len": len(output.prompt),
                "output_len": len(output.tokens),
                "tokens": None if measured is None else list(output.tokens),
                "iterations": output.num_iterations,
                "finish_reason": output.finish_reason.value,
            }
            for output in outputs
        ],
        "counters": counters,
        "compile_seconds": None if measured is None else measured.compile_seconds,
        "figures": figures,
        "steps": [_step(plan, bucket, measured) for bucket in plan.buckets],
    }


def _step(plan: Plan, bucket: Bucket, measured: Measured | None) -> dict[str, Any]:
    ledger = ledger_of(plan, bucket)
    whole, spread = (None, None) if measured is None else measured.steps.get(bucket, (None, None))
    alone = None if measured is None else measured.entries.get(bucket)
    seconds: Sequence[float | None] = alone if alone is not None else [None] * len(ledger.entries)
    timed = [entry.count * each for entry, each in zip(ledger.entries, seconds, strict=True) if each is not None]
    return {
        "step": str(bucket),
        "predicted_seconds": ledger.seconds,
        "measured_seconds": whole,
        "measured_spread": spread,
        "entries_measured_seconds": sum(timed) if timed else None,
        "entries": [_entry(entry, each) for entry, each in zip(ledger.entries, seconds, strict=True)],
    }


def _entry(entry: Entry, seconds: float | None) -> dict[str, Any]:
    """Times and bytes of one occurrence, on one device."""
    return {
        "name": entry.name,
        "part": entry.part.value,
        "kind": entry.kind.value,
        "op": None if entry.op is None else entry.op.value,
        "axes": list(entry.axes),
        "count": entry.count,
        "shape": list(entry.shape),
        "flops": entry.flops + entry.padding_flops,
        "bytes": entry.bytes or entry.weight_bytes + entry.kv_bytes + entry.activation_bytes,
        "predicted_seconds": entry.seconds - entry.overlapped,
        "measured_seconds": seconds,
    }


def deterministic(found: Any) -> Any:
    """What follows from the description alone: everything but what was timed and where. Tokens follow from it too, on devices."""
    kept = {key: found[key] for key in ("experiment", "plan", "constants", "requests", "counters")}
    steps = [{key: step[key] for key in ("step", "predicted_seconds")} for step in found["steps"]]
    entries = [[{k: v for k, v in entry.items() if k != "measured_seconds"} for entry in step["entries"]] for step in found["steps"]]
    return kept | {"steps": steps, "entries": entries}
