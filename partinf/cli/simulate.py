"""Serve requests as they arrive on a slice that need not be here: the engine over the cost model, on a virtual clock."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from partinf.cli.arguments import add_hardware, named_layout, read_slice, say_lengths, say_slice
from partinf.cli.figures import said_of_load, show
from partinf.cli.flags import Flags
from partinf.cli.load import OfferedLoad, add_load_arguments, read_load
from partinf.foundation.limits import MAX_BATCH, MAX_HOST_BYTES, MAX_LEN, MAX_PAGES, MAX_SECONDS

if TYPE_CHECKING:
    from partinf.cost.pricing import Pricing
    from partinf.plans import Plan
    from partinf.simulation.report import RunReport
    from partinf.simulation.sizing import Sizing

_DEFAULT_BATCH = 64
_MOST = {"max_len": MAX_LEN, "prefill_tokens": MAX_LEN, "page_size": MAX_LEN, "kv_pages": MAX_PAGES, "residents": MAX_BATCH, "stages": 4096}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME|DIR", help="a model of models/, a .toml file, or a Hugging Face directory")
    parser.add_argument(
        "--slice", required=True, metavar="SLICE", help="CHIP:SHAPE such as v4:4x4x4, a cloud's name such as v5e-16, or either with *COUNT"
    )
    parser.add_argument("--mesh", metavar="AXES", help="another factorisation of the slice's axes")
    add_hardware(parser)
    parser.add_argument("--layout", default="auto", metavar="NAME|FILE|auto", help="a layout of layouts/, a saved plan, or auto: chosen")
    parser.add_argument("--weights", default="bf16", metavar="TYPE", help="bf16, int8 or f32 (default: bf16)")
    parser.add_argument("--kv", default="bf16", metavar="TYPE", help="bf16, int8 or f32 (default: bf16)")
    parser.add_argument("--calibration", default="fitted", metavar="MODE", help="fitted: measured constants; none: the pure roofline")
    parser.add_argument(
        "--program",
        metavar="KIND",
        help="tiled (what runs; default), plain, or a published one: looped (the paper's), jax-llm-examples, tensor-parallel",
    )
    add_load_arguments(parser, requests=1000, lengths="chat")
    parser.add_argument("--max-len", default="0", metavar="N", help="longest context (default: the longest request)")
    parser.add_argument("--prefill-tokens", default="0", metavar="N", help="prompt tokens per iteration (default: the longest context)")
    parser.add_argument("--page-size", default="16", metavar="N", help="tokens per KV page (default: 16)")
    parser.add_argument("--kv-pages", default="0", metavar="N", help="KV pages per shard (default: what memory is left)")
    parser.add_argument(
        "--residents", default="0", metavar="N", help="sequences that may hold pages (default: 4 batches where one can preempt)"
    )
    parser.add_argument("--host-memory", default="64", metavar="GB", help="host memory per chip for swapped pages (default: 64)")
    parser.add_argument(
        "--stages", default="0", metavar="N", help="pipeline stages of the layout that is chosen (default: as many as are best)"
    )
    parser.add_argument("--overhead-us", default="0", metavar="US", help="added to every iteration for the host (default: 0)")
    parser.add_argument("--random-weights", action="store_true", help="accepted and repeated: a simulation reads no weights")
    parser.epilog = "Example: partinf simulate --model llama-3-8b --slice v5e:2x4 --scheduler mlfq --arrivals poisson:4 --requests 500"


def run(args: argparse.Namespace) -> int:
    from partinf.engine.policies.registry import resident_batches

    flags = Flags(args)
    load = read_load(flags, _DEFAULT_BATCH)
    numbers = {name: flags.whole(name, high=most) for name, most in _MOST.items()}
    host, overhead = flags.number("host_memory", high=MAX_HOST_BYTES / 1e9), flags.number("overhead_us", high=1e6 * MAX_SECONDS)
    bound = _bind(flags, load, numbers["stages"])
    load, (plan, pricing) = flags.need(load), flags.need(bound)
    longest = max(arrival.input_len + arrival.output_len for arrival in load.arrivals)
    max_len = numbers["max_len"] or min(longest, plan.model.longest_context or longest)
    residents = numbers["residents"] or min(MAX_BATCH, resident_batches(load.scheduler) * load.options.max_batch_size)
    sizing = _sizing(load.options.max_batch_size, residents, max_len, numbers, host * 1e9, overhead / 1e6)
    say_lengths(plan.model, max(longest, max_len))
    if args.slice != "local":
        say_slice(plan.slice)
    about, report = _simulate(args, load, plan, pricing, sizing)
    show(about, report, args.format, _heading(about))
    return 0


def _bind(flags: Flags, load: OfferedLoad | None, stages: int) -> tuple[Plan, Pricing] | None:
    """The plan and how it is priced; None where something is wrong, which the flags' offences say."""
    from partinf.cost.calibration import calibration_for
    from partinf.cost.pricing import Pricing
    from partinf.cost.program import PROGRAMS
    from partinf.model.load import load_model_config
    from partinf.plans import Plan
    from partinf.workload import DType

    args = flags.args
    model = flags.collect(lambda: load_model_config(args.model))
    if args.slice.startswith("auto"):
        flags.refuse("slice", "requests are served on one slice; `partinf plan` finds it")
    slice_ = None if args.slice.startswith("auto") else flags.collect(lambda: read_slice(args.slice, args.mesh, args.hardware))
    layout = flags.collect(lambda: named_layout(args.layout))
    weights, kv = flags.member("weights", DType), flags.member("kv", DType)
    program = flags.optional_word("program", PROGRAMS)
    calibration = None if slice_ is None else flags.collect(lambda: calibration_for(slice_.chip, args.calibration))
    if flags.offences or model is None or slice_ is None or calibration is None or load is None:
        return None
    if layout is None:
        from partinf.simulation.serving_plan import Traffic, serving_plan

        traffic = Traffic.of(load.arrivals, load.options.max_batch_size)
        plan = flags.collect(lambda: serving_plan(model, slice_, traffic, weights, kv, args.calibration, stages or None))
    else:
        plan = flags.collect(lambda: Plan(model, slice_, layout, weights, kv))
    return None if plan is None else (plan, Pricing(slice_, calibration, program=None if program is None else PROGRAMS[program]))


def _sizing(rows: int, residents: int, max_len: int, numbers: dict[str, int], host_bytes: float, overhead: float) -> Sizing:
    from partinf.simulation.sizing import Sizing

    return Sizing(
        max_rows=rows,
        max_residents=residents,
        max_len=max_len,
        prefill_tokens=numbers["prefill_tokens"] or max_len,
        page_size=numbers["page_size"] or 16,
        host_bytes=host_bytes,
        kv_pages=numbers["kv_pages"],
        overhead_seconds=overhead,
    )


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
    scheduler: str
    max_batch: int
    eviction: str
    arrivals: str
    lengths: str
    seed: int
    random_weights: bool
    program: str
    calibration_error: float
    calibration_measured: bool
    calibration_source: str
    wall_seconds: float


def _simulate(args: argparse.Namespace, load: OfferedLoad, plan: Plan, pricing: Pricing, sizing: Sizing) -> tuple[_About, RunReport]:
    from partinf.cli.progress import progress_bar
    from partinf.engine.engine import Engine
    from partinf.engine.policies.registry import make_policy
    from partinf.layout import readable_name
    from partinf.model.weights import num_params
    from partinf.simulation.play import play
    from partinf.simulation.report import Machine, RunReport
    from partinf.simulation.schedule_trace import ScheduleTrace
    from partinf.simulation.sizing import cost_runner

    started = time.perf_counter()
    runner, price = cost_runner(plan, pricing, sizing)
    policy = make_policy(load.scheduler, load.options, price.estimates(runner.limits))
    trace = ScheduleTrace() if args.trace else None
    engine = Engine(
        runner, policy=policy, clock=runner.clock, prefix_caching=args.prefix_caching, on_step=None if trace is None else trace.on_step
    )
    with progress_bar("simulating", len(load.arrivals)) as advance:
        refused = play(engine, load.arrivals, runner.clock, next_finish=lambda: runner.next_finish, on_finished=advance)
    if trace is not None:
        trace.write(Path(args.trace))
    arrivals, lengths = said_of_load(args)
    about = _About(
        model=plan.model.name,
        slice=plan.slice.name,
        stages=plan.num_stages,
        bubbles=runner.bubbles,
        mesh=plan.slice.mesh,
        layout=readable_name(plan.layout, plan.axis_sizes),
        kv_tokens=runner.limits.pages_per_shard * runner.limits.num_shards * sizing.page_size,
        scheduler=load.scheduler,
        max_batch=load.options.max_batch_size,
        eviction=args.eviction,
        arrivals=arrivals,
        lengths=lengths,
        seed=int(args.seed),
        random_weights=args.random_weights,
        program=pricing.program.name,
        calibration_error=pricing.calibration.error,
        calibration_measured=pricing.calibration.measured,
        calibration_source=pricing.calibration.source,
        wall_seconds=time.perf_counter() - started,
    )
    machine = Machine(num_params(plan.model), plan.slice.num_chips, plan.slice.chip.peak_bf16)
    return about, RunReport.of(engine.metrics, runner.clock.now - load.arrivals[0].time, refused, load.bounds, machine)


def _heading(about: _About) -> list[str]:
    stages = f", {about.stages} stages ({about.bubbles:.1%} bubbles)" if about.stages > 1 else ""
    measured = "" if about.calibration_measured else ", nothing measured on this chip"
    if "partinf calibrate" in about.calibration_source:
        measured = f", {about.calibration_source}"
    return [
        f"[bold]{about.model}[/] on {about.slice} ({about.mesh}){stages}: {about.layout}; {about.kv_tokens} tokens of KV",
        f"{about.scheduler}, at most {about.max_batch} per iteration; {about.arrivals}, lengths {about.lengths}; "
        f"step times ±{about.calibration_error:.0%}{measured}; simulated in {about.wall_seconds:.1f} s",
    ]
