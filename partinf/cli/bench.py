"""Serve requests as they arrive with the real engine on the devices here, and print what `simulate` prints."""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partinf.cli.arguments import add_pool, add_where, named_layout, named_slice, read_pool
from partinf.cli.figures import load_as_given, show
from partinf.cli.flags import Flags
from partinf.cli.load import OfferedLoad, add_load_arguments, read_load
from partinf.foundation.errors import raise_offences
from partinf.foundation.limits import MAX_BATCH, MAX_PAGES

if TYPE_CHECKING:
    from partinf.api import Model
    from partinf.buckets import Capacity
    from partinf.hardware.slices import Slice
    from partinf.layout import Layout
    from partinf.plans import Plan
    from partinf.simulation.report import RunReport
    from partinf.workload import DType

_DEFAULT_BATCH = 16
_MOST_LAG = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="a Hugging Face directory, or a shipped model")
    add_where(parser, "devices to run on: local (the devices of this machine), cpu:2x2x2 for virtual ones, h200:8, v5e:2x2, …")
    parser.add_argument("--weights", metavar="TYPE", help="of weights and activations: f32 or bf16 (default: f32 on CPU, bf16 elsewhere)")
    parser.add_argument("--random-weights", action="store_true", help="run a model without weights; the output repeats it")
    add_load_arguments(parser, requests=64, lengths="uniform:4-24:4-24", rate=4)  # with compiling half a minute
    parser.add_argument(
        "--host-pages", default="0", metavar="N", help="KV pages of host memory, for reactive and proactive eviction (default: 0)"
    )
    add_pool(parser)
    parser.add_argument(
        "--lag", default="1", metavar="N", help="steps in flight, beyond one per pipeline stage, before the oldest is awaited (default: 1)"
    )
    parser.epilog = "Example: partinf bench --model demo --scheduler mlfq --arrivals poisson:50 --requests 200"


@dataclass(frozen=True)
class _Place:
    """Where it runs and how it is stored, as given; None for what is not."""

    slice: Slice | None
    layout: Layout | None
    dtype: DType | None


def run(args: argparse.Namespace) -> int:
    from partinf import api
    from partinf.buckets import held
    from partinf.cli import devices
    from partinf.cli.model_place import check_programs, pool_text
    from partinf.workload import DType

    flags = Flags(args)
    target = flags.collect(lambda: named_slice(args.slice, args.mesh, args.hardware))
    flags.collect(lambda: devices.prepare(target))
    load = read_load(flags, _DEFAULT_BATCH)
    if args.weights == DType.INT8:
        flags.refuse("weights", "valid: f32, bf16")
    dtype = flags.optional_member("weights", DType)
    lag, host_pages = flags.whole("lag", high=_MOST_LAG), flags.whole("host_pages", high=MAX_PAGES)
    pool = read_pool(flags)
    swaps = args.eviction in ("reactive", "proactive")
    if swaps and args.host_pages == "0":
        flags.refuse("eviction", "pages are moved to host memory, and there is none; give --host-pages N")
    if host_pages and not swaps:
        flags.refuse("host_pages", "nothing is moved there; give --eviction reactive or proactive")
    layout = flags.collect(lambda: named_layout(args.layout))
    config = flags.collect(lambda: api.check_loadable(args.model, args.random_weights))
    load, config = flags.need(load), flags.need(config)
    longest = max(arrival.input_len + arrival.output_len for arrival in load.arrivals)
    raise_offences(config.context_offences(f"the longest request has {longest} tokens", longest))
    plan, capacity = _plan(args, load, longest, _Place(target, layout, dtype), pool)
    print(f"{pool_text(plan, capacity)}: {held(plan)}", file=sys.stderr)
    model = _load(args, plan, host_pages)
    check_programs(model)
    about, report = _bench(args, load, model, lag)
    show(about, report, args.format, _heading(about))
    if about.failed:
        print(f"partinf: error: {about.failed} requests failed; the model's logits were NaN or infinite", file=sys.stderr)
    return 1 if about.failed else 0


def _plan(args: argparse.Namespace, load: OfferedLoad, longest: int, place: _Place, pool: tuple[int, float]) -> tuple[Plan, Capacity]:
    """The plan, and what it should hold; `longest` is that of the requests, `pool` pages per shard and the share of memory."""
    from partinf import api
    from partinf.buckets import Capacity
    from partinf.engine.policies.registry import resident_batches
    from partinf.hardware.slices import on_this_machine
    from partinf.workload import DType, Workload

    where = on_this_machine(place.slice) if place.slice is not None else api.find_slice("local", args.mesh, args.hardware)
    dtype = place.dtype or DType(where.chip.platform.default_type)
    prompt = max(arrival.input_len for arrival in load.arrivals)
    rows = load.options.max_batch_size
    workload = Workload(batch=rows, input_len=prompt, output_len=max(1, longest - prompt), weights=dtype, kv=dtype)
    capacity = Capacity(
        max_rows=rows,
        max_len=longest,
        prefill_tokens=max(128, prompt),
        random=False,
        max_prompt_len=prompt,
        max_residents=min(MAX_BATCH, rows * resident_batches(load.scheduler)),
        kv_pages=pool[0],
        memory_share=pool[1],
    )
    return api.plan(args.model, where, workload, layout=place.layout, capacity=capacity), capacity


def _load(args: argparse.Namespace, plan: Plan, host_pages: int) -> Model:
    from partinf import api
    from partinf.cli.progress import progress_bar

    with progress_bar("compiling", len(plan.buckets)) as advance:
        compiled = lambda *_: advance(1)  # noqa: E731
        return api.load(args.model, plan, random_weights=args.random_weights, on_compiled=compiled, num_host_pages=host_pages)


@dataclass(frozen=True)
class _About:
    """What was run, as `--format json` says it."""

    model: str
    slice: str
    mesh: str
    layout: str
    weights: str
    random_weights: bool
    programs: int
    programs_loaded: int
    compile_seconds: float
    compiled_while_serving: int
    scheduler: str
    max_batch: int
    eviction: str
    host_pages: int
    memory: dict[str, Any]
    lag: int
    arrivals: str
    lengths: str
    seed: int
    calibration_source: str
    decode_seconds: float
    failed: int


def _bench(args: argparse.Namespace, load: OfferedLoad, model: Model, lag: int) -> tuple[_About, RunReport]:
    from partinf.buckets import held
    from partinf.cli.progress import progress_bar
    from partinf.cost.calibration import calibration_for
    from partinf.engine.engine import Engine
    from partinf.engine.policies.registry import make_policy
    from partinf.engine.request import FinishReason
    from partinf.layout import readable_name
    from partinf.measure.estimates import measured_estimates
    from partinf.model.weights import active_params
    from partinf.simulation.play import WallClock, play
    from partinf.simulation.report import Machine, RunReport
    from partinf.simulation.schedule_trace import ScheduleTrace

    plan = model.plan
    estimates = measured_estimates(model.runner, model.plan.buckets)
    trace, clock = ScheduleTrace() if args.trace else None, WallClock()
    policy = make_policy(load.scheduler, load.options, estimates)
    on_step = None if trace is None else trace.on_step
    engine = Engine(model.runner, policy=policy, clock=clock, lag=lag, prefix_caching=args.prefix_caching, on_step=on_step)
    rng = random.Random(load.arrivals[0].input_len)
    compiled, started = model.runner.num_compiled, clock()
    with progress_bar("serving", len(load.arrivals)) as advance:
        refused = play(
            engine, load.arrivals, clock, prompt=lambda _, n: rng.choices(range(plan.model.vocab_size), k=n), on_finished=advance
        )
    seconds = clock() - started - load.arrivals[0].time
    if trace is not None:
        trace.write(Path(args.trace))
    chip = plan.slice.chip
    arrivals, lengths = load_as_given(args)
    about = _About(
        model=plan.model.name,
        slice=plan.slice.name,
        mesh=plan.slice.mesh,
        layout=readable_name(plan.layout, plan.axis_sizes),
        weights=plan.weights.value,
        random_weights=args.random_weights,
        programs=model.runner.num_compiled,
        programs_loaded=model.runner.num_loaded,
        compile_seconds=model.runner.compile_seconds,
        compiled_while_serving=model.runner.num_compiled - compiled,
        scheduler=load.scheduler,
        max_batch=load.options.max_batch_size,
        eviction=args.eviction,
        host_pages=model.runner.limits.num_host_pages,
        memory=held(plan).as_json() | {"programs_need": model.runner.needed_bytes},
        lag=lag,
        arrivals=arrivals,
        lengths=lengths,
        seed=int(args.seed),
        calibration_source=calibration_for(chip).source,
        decode_seconds=estimates.decode,
        failed=engine.metrics.summary().finished.get(FinishReason.FAILED, 0),
    )
    machine = Machine(active_params(plan.model), plan.slice.num_chips, chip.peak_bf16)
    return about, RunReport.of(engine.metrics, seconds, refused, load.bounds, machine)


def _heading(about: _About) -> list[str]:
    weights = "random weights" if about.random_weights else "its weights"
    return [
        f"[bold]{about.model}[/] ({weights}, {about.weights}) on {about.slice} ({about.mesh}): {about.layout}",
        f"{about.programs} programs compiled, {about.programs_loaded} loaded in {about.compile_seconds:.1f} s, "
        f"{about.compiled_while_serving} compiled while serving",
        f"{about.scheduler}, at most {about.max_batch} per iteration; {about.arrivals}, lengths {about.lengths}",
    ]
