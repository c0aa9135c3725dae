"""Serve requests as they arrive on a slice that need not be here: the engine over the cost model, on a virtual clock."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partinf.cli.arguments import (
    add_hardware,
    add_layout,
    add_pool,
    add_pricing,
    add_saved_plan,
    check_skew,
    named_layout,
    read_pool,
    read_saved_plan,
    read_skew,
    read_slice,
    say_lengths,
    say_slice,
)
from partinf.cli.figures import load_as_given, show
from partinf.cli.flags import Flags
from partinf.cli.load import OfferedLoad, add_load_arguments, read_load
from partinf.cli.model_place import ModelPlace
from partinf.cli.served_engine import FLAGS, SCHEDULER, ServedEngine, add_engine_arguments
from partinf.foundation.limits import MAX_BATCH, MAX_HOST_BYTES, MAX_LEN, MAX_SECONDS

if TYPE_CHECKING:
    from partinf.cost.pricing import Pricing
    from partinf.engine.engine import Engine
    from partinf.hardware.slices import Slice
    from partinf.plans import Plan
    from partinf.simulation.choice import Choice
    from partinf.simulation.cost_runner import CostRunner
    from partinf.simulation.report import RunReport
    from partinf.simulation.serving_plan import Terms

_DEFAULT_BATCH = 64
_DEFAULT_SCHEDULER = "fcfs"
_MOST = {"max_len": MAX_LEN, "prefill_tokens": MAX_LEN, "page_size": MAX_LEN, "residents": MAX_BATCH, "stages": 4096}
# Flags of a simulation alone, and what serve has in their place.
_UNSERVED = {
    "max_batch": ", it has --max-num-seqs",
    "prefill_tokens": ", it has --max-num-batched-tokens",
    "page_size": "",
    "residents": "",
    "host_memory": "",
    "stages": "",
    "eviction": "",
    "alpha_ms": "",
    "prefix_caching": ", it has --enable-prefix-caching",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME|DIR", help="a model of models/, a .toml file, or a Hugging Face directory")
    add_saved_plan(parser)
    where = "CHIP:SHAPE such as v4:4x4x4, a cloud's name such as v5e-16, or either with *COUNT"
    parser.add_argument("--slice", metavar="SLICE", help=where)
    parser.add_argument("--mesh", metavar="AXES", help="another factorisation of the slice's axes")
    add_hardware(parser)
    add_layout(parser)
    parser.add_argument("--weights", metavar="TYPE", help="bf16, int8 or f32 (default: bf16)")
    parser.add_argument("--kv", metavar="TYPE", help="bf16, int8 or f32 (default: bf16)")
    add_pricing(parser)
    add_load_arguments(parser, requests=1000, lengths="chat")
    parser.add_argument("--max-len", "--max-model-len", default="0", metavar="N", help="longest context (default: the longest request)")
    parser.add_argument("--prefill-tokens", default="0", metavar="N", help="prompt tokens per iteration (default: the longest context)")
    parser.add_argument("--page-size", default="16", metavar="N", help="tokens per KV page (default: 16)")
    add_pool(parser)
    parser.add_argument(
        "--residents", default="0", metavar="N", help="sequences that may hold pages (default: 4 batches for schedulers that preempt)"
    )
    parser.add_argument("--host-memory", default="64", metavar="GB", help="host memory per chip for swapped pages (default: 64)")
    parser.add_argument("--stages", default="0", metavar="N", help="pipeline stages of the chosen layout (default: the best number)")
    parser.add_argument("--overhead-us", default="0", metavar="US", help="time of the host added to every iteration (default: 0)")
    parser.add_argument("--random-weights", action="store_true", help="accepted and repeated in the output; a simulation reads no weights")
    served = parser.add_argument_group("what serve would do", f"--as-served, with the flags of `partinf serve`; scheduler: {SCHEDULER}")
    served.add_argument(
        "--as-served", action="store_true", help="simulate the engine, plan, page pool and padded steps that serve would have"
    )
    add_engine_arguments(served)
    parser.set_defaults(scheduler=None)
    parser.epilog = "Example: partinf simulate --model llama-3-8b --slice v5e:2x4 --scheduler mlfq --arrivals poisson:4 --requests 500"


def run(args: argparse.Namespace) -> int:
    flags = Flags(args)
    args.scheduler = args.scheduler or (SCHEDULER if args.as_served else _DEFAULT_SCHEDULER)
    load = read_load(flags, _DEFAULT_BATCH)
    overhead = flags.number("overhead_us", high=1e6 * MAX_SECONDS) / 1e6
    made = _as_served(flags, load, overhead) if args.as_served else _sized(flags, load, overhead)
    simulated = flags.need(made)
    load = flags.need(load)
    longest = max(arrival.input_len + arrival.output_len for arrival in load.arrivals)
    say_lengths(simulated.plan.model, max(longest, simulated.plan.max_len))
    if args.slice not in (None, "local"):
        say_slice(simulated.plan.slice)
    about, report = _simulate(args, load, simulated)
    show(about, report, args.format, _heading(about, simulated.choice))
    return 0


@dataclass(frozen=True)
class _Simulated:
    """What is simulated.

    Attributes:
        engine: makes it from the further arguments of `Engine`.
        max_batch: sequences per iteration. choice: what its layout was compared with; None where it was not.
    """

    plan: Plan
    pricing: Pricing
    runner: CostRunner
    scheduler: str
    max_batch: int
    engine: Callable[..., Engine]
    choice: Choice | None = None


def _as_served(flags: Flags, load: OfferedLoad | None, overhead: float) -> _Simulated | None:
    """What `serve` would run for the same flags; None where something is wrong, which the flags' offences say."""
    from partinf.buckets import runner_limits
    from partinf.simulation.cost_runner import CostRunner
    from partinf.simulation.step_price import StepPrice

    args = flags.args
    flags.offences += [
        f"{flags.flag(name)}: serve has no such flag{instead}; leave out either it or --as-served"
        for name, instead in _UNSERVED.items()
        if flags.given(name) or getattr(args, name) is True
    ]
    args.slice = args.slice or "local"
    served, place = ServedEngine.read(flags), ModelPlace(flags, runs=False)
    program, calibration = _priced(flags)
    skew = read_skew(flags)
    if flags.offences or load is None:
        return None
    plan = served.plan(place)
    check_skew(flags, skew, plan.model)
    flags.check()
    for line in place.notes:
        print(line, file=sys.stderr)
    pricing = _pricing(plan.slice, calibration, program, skew)
    price = StepPrice(plan, pricing, buckets=plan.buckets)
    runner = CostRunner(runner_limits(plan), price, overhead_seconds=overhead)
    engine = partial(served.engine, runner, price.estimates(runner.limits))
    return _Simulated(plan, pricing, runner, served.scheduler, served.rows, engine)


def _sized(flags: Flags, load: OfferedLoad | None, overhead: float) -> _Simulated | None:
    """An engine of the size that the flags say, whose steps are priced at their own shapes; None where something is wrong."""
    from partinf.engine.policies.registry import resident_batches
    from partinf.simulation.choice import Service, choose
    from partinf.simulation.serving_plan import Terms
    from partinf.simulation.sizing import Sizing

    args = flags.args
    flags.offences += [
        f"{flags.flag(name)}: a flag of serve; it needs --as-served"
        for name in FLAGS
        if flags.given(name) or getattr(args, name) is not None
    ]
    numbers = {name: flags.whole(name, high=most) for name, most in _MOST.items()}
    kv_pages, memory_share = read_pool(flags)
    host = flags.number("host_memory", high=MAX_HOST_BYTES / 1e9)
    program, calibration = _priced(flags)
    skew = read_skew(flags)
    plans = _bind(flags, load, Terms(calibration=calibration, num_stages=numbers["stages"] or None, skew=skew))
    if flags.offences or load is None or plans is None:
        return None
    rows, model = load.options.max_batch_size, plans[0].model
    longest = max(arrival.input_len + arrival.output_len for arrival in load.arrivals)
    max_len = numbers["max_len"] or min(longest, model.longest_context or longest)
    sizing = Sizing(
        max_rows=rows,
        max_residents=numbers["residents"] or min(MAX_BATCH, resident_batches(load.scheduler) * rows),
        max_len=max_len,
        prefill_tokens=numbers["prefill_tokens"] or max_len,
        page_size=numbers["page_size"] or 16,
        host_bytes=host * 1e9,
        kv_pages=kv_pages,
        memory_share=memory_share,
        overhead_seconds=overhead,
    )
    pricing = _pricing(plans[0].slice, calibration, program, skew)
    service = Service(pricing, sizing, load.scheduler, load.options, load.bounds, args.prefix_caching)
    choice = choose(service, plans, load.arrivals) if len(plans) > 1 else None
    runner, price, engine = service.make(plans[0] if choice is None else choice.best.plan)
    return _Simulated(price.plan, pricing, runner, load.scheduler, rows, engine, choice)


def _priced(flags: Flags) -> tuple[str | None, str]:
    """How steps are priced: the program, and whether by measured constants."""
    from partinf.cost.program import PROGRAMS

    return flags.optional_word("program", PROGRAMS), flags.word("calibration", ("fitted", "none"))


def _pricing(slice_: Slice, calibration: str, program: str | None, skew: float) -> Pricing:
    from partinf.cost.calibration import calibration_for
    from partinf.cost.pricing import Pricing
    from partinf.cost.program import PROGRAMS

    chosen = None if program is None else PROGRAMS[program]
    return Pricing(slice_, calibration_for(slice_.chip, calibration), program=chosen, skew=skew)


def _bind(flags: Flags, load: OfferedLoad | None, terms: Terms) -> list[Plan] | None:
    """The plan, or several to choose among where the load or its bounds are given; None where something is wrong, which the flags'
    offences say."""
    from partinf.checkpoint.described import read_model
    from partinf.plans import Plan, layout_for
    from partinf.workload import DType

    args = flags.args
    saved = read_saved_plan(flags)
    if args.plan is not None:
        check_skew(flags, terms.skew, None if saved is None else saved.model)
        return None if saved is None else [saved]
    if args.slice is None:
        flags.offences.append("--slice is missing: CHIP:SHAPE such as v4:4x4x4")
        return None
    model = None if args.model is None else flags.collect(lambda: read_model(args.model))
    if args.slice.startswith("auto"):
        flags.refuse("slice", "simulate takes one slice; `partinf plan` finds it")
    slice_ = None if args.slice.startswith("auto") else flags.collect(lambda: read_slice(args.slice, args.mesh, args.hardware))
    layout = flags.collect(lambda: named_layout(args.layout))
    weights, kv = (flags.optional_member(name, DType) or DType.BF16 for name in ("weights", "kv"))
    check_skew(flags, terms.skew, model)
    if flags.offences or model is None or slice_ is None or load is None:
        return None
    if layout is not None:
        return flags.collect(lambda: [Plan(model, slice_, layout_for(slice_, layout), weights, kv)])
    from partinf.simulation.choice import MOST_LAYOUTS
    from partinf.simulation.serving_plan import Traffic, contenders, serving_plan

    traffic, terms = Traffic.of(load.arrivals, load.options.max_batch_size), replace(terms, weights=weights, kv=kv)
    if any(map(flags.given, ("arrivals", "ttft", "tpot"))):
        return flags.collect(lambda: contenders(model, slice_, traffic, terms, MOST_LAYOUTS))
    return flags.collect(lambda: [serving_plan(model, slice_, traffic, terms)])


@dataclass(frozen=True)
class _About:
    """What was simulated, as `--format json` says it."""

    model: str
    slice: str
    stages: int
    bubbles: float
    mesh: str
    layout: str
    kv_tokens: int
    memory: dict[str, Any]
    scheduler: str
    max_batch: int
    as_served: bool
    eviction: str
    arrivals: str
    lengths: str
    seed: int
    random_weights: bool
    program: str
    routing_skew: float
    calibration_error: float
    calibration_measured: bool
    calibration_source: str
    choice: dict[str, Any] | None
    wall_seconds: float


def _simulate(args: argparse.Namespace, load: OfferedLoad, simulated: _Simulated) -> tuple[_About, RunReport]:
    from partinf.buckets import held
    from partinf.cli.progress import progress_bar
    from partinf.layout import readable_name
    from partinf.model.weights import active_params
    from partinf.simulation.play import play
    from partinf.simulation.report import Machine, RunReport
    from partinf.simulation.schedule_trace import ScheduleTrace

    plan, pricing, runner = simulated.plan, simulated.pricing, simulated.runner
    memory = held(plan)
    started = time.perf_counter()
    trace = ScheduleTrace() if args.trace else None
    engine = simulated.engine(clock=runner.clock, on_step=None if trace is None else trace.on_step)
    with progress_bar("simulating", len(load.arrivals)) as advance:
        refused = play(engine, load.arrivals, runner.clock, next_finish=lambda: runner.next_finish, on_finished=advance)
    if trace is not None:
        trace.write(Path(args.trace))
    arrivals, lengths = load_as_given(args)
    about = _About(
        model=plan.model.name,
        slice=plan.slice.name,
        stages=plan.num_stages,
        bubbles=runner.bubbles,
        mesh=plan.slice.mesh,
        layout=readable_name(plan.layout, plan.axis_sizes),
        kv_tokens=memory.tokens,
        memory=memory.as_json(),
        scheduler=simulated.scheduler,
        max_batch=simulated.max_batch,
        as_served=args.as_served,
        eviction=args.eviction,
        arrivals=arrivals,
        lengths=lengths,
        seed=int(args.seed),
        random_weights=args.random_weights,
        program=pricing.program.name,
        routing_skew=pricing.skew,
        calibration_error=pricing.calibration.error,
        calibration_measured=pricing.calibration.measured,
        calibration_source=pricing.calibration.source,
        choice=None if simulated.choice is None else simulated.choice.as_json(),
        wall_seconds=time.perf_counter() - started,
    )
    machine = Machine(active_params(plan.model), plan.slice.num_chips, plan.slice.chip.peak_bf16)
    return about, RunReport.of(engine.metrics, runner.clock.now - load.arrivals[0].time, refused, load.bounds, machine)


def _heading(about: _About, choice: Choice | None) -> list[str]:
    stages = f", {about.stages} stages ({about.bubbles:.1%} bubbles)" if about.stages > 1 else ""
    as_served = "as served: " if about.as_served else ""
    measured = "" if about.calibration_measured else ", nothing measured on this chip"
    if "partinf calibrate" in about.calibration_source:
        measured = f", {about.calibration_source}"
    return [
        f"[bold]{about.model}[/] on {about.slice} ({about.mesh}){stages}: {about.layout}; {about.kv_tokens:,} tokens of KV",
        f"{as_served}{about.scheduler}, at most {about.max_batch} per iteration; {about.arrivals}, lengths {about.lengths}; "
        f"step times ±{about.calibration_error:.0%}{measured}; simulated in {about.wall_seconds:.1f} s",
        *([] if choice is None else [f"layout {choice}"]),
    ]
