"""The whole path on the devices here: plan a small trained model, split it in several ways, run it, check every answer."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partinf.cli.flags import Flags
from partinf.foundation.limits import MAX_REQUESTS

if TYPE_CHECKING:
    from rich.console import Console

    from partinf.demo_tasks import Task
    from partinf.engine.metrics import Summary
    from partinf.layout import Layout
    from partinf.model.config import ModelConfig
    from partinf.plans import Plan
    from partinf.workload import Workload

MODEL = "demo"
_MAX_ROWS = 16
_MAX_LEN = 64
_MAX_PROMPT = 32


@dataclass(frozen=True)
class Result:
    """One layout's run: right answers, what the engine counted, and the collectives of one decode step."""

    label: str
    num_right: int
    summary: Summary
    collectives: int
    generated_lens: tuple[int, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", default="48", metavar="N", help="requests to run under each layout (default: 48)")
    parser.add_argument("--seed", default="0", metavar="N", help="seed of the requests (default: 0)")
    parser.add_argument("--slice", default="local", metavar="NAME", help="devices to run on (default: those here, or 8 virtual ones)")
    parser.add_argument("--mesh", metavar="AXES", help="factorisation of the devices, such as 4x2")


def run(args: argparse.Namespace) -> int:
    from partinf.cli import devices
    from partinf.cli.arguments import named_slice

    flags = Flags(args)
    count, seed = flags.whole("requests", low=1, high=MAX_REQUESTS), flags.whole("seed")
    target = flags.collect(lambda: named_slice(args.slice, args.mesh))
    flags.collect(lambda: devices.prepare(target, virtual_devices=8))
    flags.check()
    from rich.console import Console

    from partinf import api
    from partinf.demo_tasks import mixed_tasks
    from partinf.model.load import load_model_config
    from partinf.workload import DType, Workload

    console = Console()
    where = target if target is not None else api.find_slice("local", args.mesh)
    model = load_model_config(MODEL)
    dtype = DType(where.chip.platform.default_type)
    workload = Workload(batch=_MAX_ROWS, input_len=16, output_len=16, weights=dtype, kv=dtype)
    chosen = _plan(model, where.name, where.mesh, workload, None)
    _explain_choice(console, chosen, workload)
    tasks = list(mixed_tasks(count, seed))
    plans = [("chosen by the planner", chosen)]
    plans += [(label, _plan(model, where.name, where.mesh, workload, layout)) for label, layout in _forced(tuple(where.axis_sizes)).items()]
    if where.num_devices > 1:
        plans.append(("one device, not split", _plan(model, f"{where.chip.name}:1", None, workload, None)))
    results = [_run_one(label, plan, tasks) for label, plan in plans]
    _show_results(console, results, chosen)
    return 0 if all(result.num_right == results[0].num_right for result in results) else 1


def _forced(axes: tuple[str, ...]) -> dict[str, Layout]:
    """The layouts that are run in addition to the chosen one: roles for the axes at hand."""
    from partinf.layout.files import make_layout

    everything = dict.fromkeys(axes, "ffn")
    first = everything | {axes[0]: "embed"} if len(axes) > 1 else everything
    batch, heads = dict.fromkeys(axes, "batch"), dict.fromkeys(axes, "heads")
    return {
        "1D weight-stationary": make_layout(everything, heads, heads),
        "2D weight-stationary": make_layout(first, batch, heads),
        "weight-gathered": make_layout(first, batch, heads, decode_gather=axes, prefill_gather=axes),
    }


def _plan(model: ModelConfig, slice_name: str, mesh: str | None, workload: Workload, layout: Layout | None) -> Plan:
    from partinf import api
    from partinf.buckets import Capacity

    capacity = Capacity(max_rows=_MAX_ROWS, max_len=_MAX_LEN, prefill_tokens=64, max_prompt_len=_MAX_PROMPT, random=False)
    return api.plan(model, api.find_slice(slice_name, mesh), workload, layout=layout, capacity=capacity)


def _explain_choice(console: Console, plan: Plan, workload: Workload) -> None:
    from partinf.cost.program import TILED
    from partinf.cost.step import step_ledger
    from partinf.layout import readable_name
    from partinf.model.weights import num_params
    from partinf.planner.question import Question
    from partinf.planner.show.table import print_step

    console.print(f"[bold]{plan.model.name}[/], {num_params(plan.model) / 1e3:.0f} k parameters, on {plan.slice.name} ({plan.slice.mesh})")
    console.print(f"chosen: [bold]{readable_name(plan.layout, plan.axis_sizes)}[/]. {plan.note}", soft_wrap=True)
    split = Question(plan.model, workload, program=TILED).evaluator(plan.slice).split(plan.layout, "decode", 0)
    print_step(console, "decode", split, step_ledger(split))
    console.print(
        "\nA model this small gains nothing from being split: one device holds it many times over, and every collective costs more than\n"
        "the work that it shares out. What is shown here is that every way of splitting it gives the same, right answers.\n",
        soft_wrap=True,
    )


def _run_one(label: str, plan: Plan, tasks: list[Task]) -> Result:
    from partinf import api
    from partinf.cli.progress import progress_bar
    from partinf.demo_tasks import check
    from partinf.engine.request import SamplingParams
    from partinf.transformer.account import trace_account

    decode = next(bucket for bucket in plan.buckets if not bucket.prefill_tokens)
    collectives = trace_account(plan, decode).num_collectives
    with progress_bar(f"{label}: compiling", len(plan.buckets)) as advance:
        model = api.load(MODEL, plan, on_compiled=lambda *_: advance(1))
    prompts = [task.prompt for task in tasks]
    model.generate(prompts[:1], SamplingParams(max_tokens=2))  # first-call costs stay out of the figures
    model.engine.metrics.clear()
    with progress_bar(f"{label}: running", len(tasks)) as advance:
        outputs = model.generate(
            prompts, SamplingParams(max_tokens=_MAX_LEN), on_token=lambda event: advance(1) if event.finish_reason else None
        )
    num_right = sum(check(task, output.text) for task, output in zip(tasks, outputs, strict=True))
    lens = tuple(len(output.tokens) for output in outputs)
    return Result(label, num_right, model.engine.metrics.summary(), collectives, lens)


def _show_results(console: Console, results: list[Result], plan: Plan) -> None:
    from rich import box
    from rich.table import Table

    from partinf.engine.policies.request_level import request_level_iterations

    table = Table(title=f"{len(results[0].generated_lens)} requests under each layout", box=box.SIMPLE_HEAD)
    table.add_column("layout", no_wrap=True)
    for heading in ("right", "tok/s", "TTFT ms", "ms/tok", "coll.", "steps"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        summary = result.summary
        table.add_row(
            result.label,
            f"{result.num_right}/{len(result.generated_lens)}",
            f"{summary.tokens_per_second:.0f}",
            f"{1e3 * summary.ttft.p50:.0f}",
            f"{1e3 * summary.time_per_token.p50:.1f}",
            f"{result.collectives}",
            f"{summary.iterations}",
        )
    console.print(table)
    rows = plan.cache.num_slots
    static = request_level_iterations(results[0].generated_lens, rows)
    console.print(
        "TTFT and time per token are medians over requests; coll.: collectives of one decode step; steps: iterations of the engine.\n"
        f"Requests join and leave between iterations. Request-level batching, {rows} at a time until the longest of them is done, "
        f"would have taken {static} iterations.",
        soft_wrap=True,
    )
    different = {result.label for result in results if result.generated_lens != results[0].generated_lens}
    if different or len({result.num_right for result in results}) > 1:
        console.print(f"[bold red]answers differ between layouts: {', '.join(sorted(different))}[/]")
