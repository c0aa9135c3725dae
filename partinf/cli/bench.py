"""Serve requests as they arrive with the real engine on the devices here, and print what `simulate` prints."""

from __future__ import annotations

import argparse
import bisect
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partinf.cli.arguments import add_where, named_layout, named_slice
from partinf.cli.serving import Load, add_load_arguments, need, read_load, said_of_load, show, whole

if TYPE_CHECKING:
    from partinf.api import Model
    from partinf.engine.estimates import Estimates
    from partinf.plans import Plan
    from partinf.simulation.report import RunReport

_DEFAULT_BATCH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="a Hugging Face directory, or a shipped model")
    add_where(parser, "devices to run on: local (those that are here), cpu:2x2x2 for virtual ones, h200:8, v5e:2x2, …")
    parser.add_argument("--weights", choices=("f32", "bf16"), help="type of weights and activations (default: f32 on CPU, bf16 elsewhere)")
    parser.add_argument("--random-weights", action="store_true", help="run a model without weights; the output repeats it")
    add_load_arguments(parser, requests=64, lengths="uniform:4-24:4-24")
    parser.add_argument(
        "--host-pages", default="0", metavar="N", help="KV pages of host memory, for reactive and proactive eviction (default: 0)"
    )
    parser.add_argument(
        "--lag", default="1", metavar="N", help="steps in flight, beyond one per pipeline stage, before the oldest is awaited (default: 1)"
    )
    parser.epilog = "Example: partinf bench --model demo --scheduler mlfq --arrivals poisson:50 --requests 200"


def run(args: argparse.Namespace) -> int:
    from partinf import api
    from partinf.cli import devices
    from partinf.errors import collect, raise_offences

    offences: list[str] = []
    target = collect(offences, lambda: named_slice(args.slice, args.mesh, args.hardware))
    devices.prepare(target)
    load = read_load(args, offences, _DEFAULT_BATCH)
    lag, host_pages = whole(args, "lag", offences), whole(args, "host_pages", offences)
    swaps = args.eviction in ("reactive", "proactive")
    if swaps and args.host_pages == "0":
        offences.append(f"--eviction {args.eviction}: pages are moved to host memory, and there is none; give --host-pages N")
    if host_pages and not swaps:
        offences.append(f"--host-pages {host_pages}: nothing is moved there; give --eviction reactive or proactive")
    layout = collect(offences, lambda: named_layout(args.layout))
    config = collect(offences, lambda: api.check_loadable(args.model, args.random_weights))
    if args.trace and not Path(args.trace).absolute().parent.is_dir():
        offences.append(f"--trace {args.trace}: there is no directory {Path(args.trace).absolute().parent}")
    load, config = need(offences, load), need(offences, config)
    longest = max(arrival.input_len + arrival.output_len for arrival in load.arrivals)
    raise_offences(config.context_offences(f"the longest request has {longest} tokens", longest))
    plan = _plan(args, load, longest, target, layout)
    model = _load(args, plan, host_pages)
    about, report = _bench(args, load, model, lag)
    show(about, report, args.format, _heading(about))
    if about.failed:
        print(f"partinf: error: {about.failed} requests failed; the model's logits were no numbers (NaN or infinite)", file=sys.stderr)
    return 1 if about.failed else 0


def _plan(args: argparse.Namespace, load: Load, longest: int, target: Any, layout: Any) -> Plan:
    from partinf import api
    from partinf.buckets import Capacity
    from partinf.engine.policies.registry import resident_batches
    from partinf.workload import DType, Workload

    where = target if target is not None else api.find_slice("local", args.mesh, args.hardware)
    dtype = DType(args.weights or where.chip.platform.default_type)
    prompt = max(arrival.input_len for arrival in load.arrivals)
    rows = load.options.max_batch_size
    workload = Workload(batch=rows, input_len=prompt, output_len=max(1, longest - prompt), weights=dtype, kv=dtype)
    capacity = Capacity(max_rows=rows, max_len=longest, prefill_tokens=max(128, prompt), random=False, max_prompt_len=prompt)
    plan = api.plan(args.model, where, workload, layout=layout, capacity=capacity)
    return replace(plan, cache=replace(plan.cache, num_slots=plan.cache.num_slots * resident_batches(load.scheduler)))


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
    lag: int
    arrivals: str
    lengths: str
    seed: int
    calibration_source: str
    decode_seconds: float
    failed: int


def _bench(args: argparse.Namespace, load: Load, model: Model, lag: int) -> tuple[_About, RunReport]:
    from partinf.cli.progress import progress_bar
    from partinf.cost.calibration import calibration_for
    from partinf.engine.engine import Engine
    from partinf.engine.policies.registry import make_policy
    from partinf.engine.request import FinishReason
    from partinf.layout import readable_name
    from partinf.model.weights import num_params
    from partinf.simulation.play import WallClock, play
    from partinf.simulation.report import Machine, RunReport
    from partinf.simulation.schedule_trace import ScheduleTrace

    plan = model.plan
    estimates = measured_estimates(model)
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
    arrivals, lengths = said_of_load(args)
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
        lag=lag,
        arrivals=arrivals,
        lengths=lengths,
        seed=int(args.seed),
        calibration_source=calibration_for(chip).source,
        decode_seconds=estimates.decode,
        failed=engine.metrics.summary().finished.get(FinishReason.FAILED, 0),
    )
    machine = Machine(num_params(plan.model), plan.slice.num_chips, chip.peak_bf16)
    return about, RunReport.of(engine.metrics, seconds, refused, load.bounds, machine)


def measured_estimates(model: Model, repeats: int = 5, agree: Callable[[list[float]], list[float]] = lambda times: times) -> Estimates:
    """Times of a step with a prompt and of a decode step, medians measured on requests of this model's own, and of the copy of a page. A
    bucket pads all prompts that it holds alike, so there is one time for each size of the buckets that take prompts.

    Args:
        agree: makes of the times of this process those that all processes of a group take.
    """
    from partinf.engine.engine import Engine
    from partinf.engine.estimates import Estimates
    from partinf.engine.request import SamplingParams

    engine, limits = Engine(model.runner), model.runner.limits
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    sizes = sorted({bucket.prefill_tokens // limits.num_prefill_shards for bucket in model.plan.buckets if bucket.prefill_tokens})
    times = []
    for size in sizes:
        prompt = [1] * max(1, min(size, limits.max_context - 4))
        outputs = [engine.generate([prompt], params)[0] for _ in range(repeats + 1)][1:]  # the first has first-call costs
        times.append(statistics.median(output.ttft or 0.0 for output in outputs))
    decode = statistics.median(output.time_per_token or times[-1] for output in outputs)
    page = _page_seconds(model.runner) if limits.num_host_pages else 0.0
    decode, page, *times = agree([decode, page, *times])

    def first_iteration(tokens: int) -> float:
        whole, rest = divmod(tokens, sizes[-1])
        return whole * times[-1] + (times[bisect.bisect_left(sizes, rest)] if rest else 0.0)

    return Estimates(first_iteration, decode, page, page, limits.pages_for)


def _page_seconds(runner: Any, repeats: int = 20) -> float:
    """Time to copy one KV page to host memory or back, measured on groups that go there and back; the pages' content stays."""
    from partinf.engine.step import PageCopy, PrefillChunk, RowSampling, Step

    pages = tuple(range(min(16, runner.limits.pages_per_shard, runner.limits.num_host_pages)))
    copy = PageCopy(pages, pages, shard=0)
    fetched = Step(prefill=(PrefillChunk(0, 0, (1,), 0, (0,), True, RowSampling()),))  # its token is on the host once all is done

    def seconds(steps: list[Step]) -> float:
        started = time.perf_counter()
        for step in steps:
            runner.submit(step)
            runner.collect()
        return time.perf_counter() - started

    there_and_back = [Step(swap_out=(copy,)), Step(swap_in=(copy,))]
    seconds([*there_and_back, fetched])  # first-call costs
    taken = seconds([*there_and_back * repeats, fetched]) - seconds([fetched])
    return max(0.0, taken) / (2 * repeats * len(pages))


def _heading(about: _About) -> list[str]:
    weights = "random weights" if about.random_weights else "its weights"
    return [
        f"[bold]{about.model}[/] ({weights}, {about.weights}) on {about.slice} ({about.mesh}): {about.layout}",
        f"{about.programs} programs compiled, {about.programs_loaded} loaded in {about.compile_seconds:.1f} s, "
        f"{about.compiled_while_serving} compiled while serving",
        f"{about.scheduler}, at most {about.max_batch} per iteration; {about.arrivals}, lengths {about.lengths}",
    ]
