"""Run a described experiment in the chosen place, and show predicted and measured times."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partinf.cli.arguments import add_pod
from partinf.cli.flags import FORMATS, Flags
from partinf.foundation import documents
from partinf.foundation.errors import InvalidInput
from partinf.foundation.extras import RUN, need
from partinf.foundation.limits import MAX_SECONDS
from partinf.foundation.units import figures as shown

if TYPE_CHECKING:
    from partinf.experiment.description import Experiment

PLACES = {
    "simulator": "the engine over the cost model",
    "here": "the devices of this process",
    "processes": "as many processes on this machine as the description says; they share the devices of a CPU slice",
    "pod": "a TPU slice, created, and deleted afterwards",
    "worker": "this process and the others of a pod; for a pod's workers",
}
_RESULT = "result.json"
_TIMEOUT = 3600.0
_LISTED = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", type=Path, metavar="FILE", help="the description, a TOML file; see experiments/on_a_pod")
    places = "; ".join(f"{name}: {what}" for name, what in PLACES.items())
    parser.add_argument("--on", default="simulator", metavar="PLACE", help=f"{places} (default: simulator)")
    parser.add_argument("--output", metavar="FILE", help="write the result to this file as JSON")
    parser.add_argument("--format", default="table", metavar="FORMAT", help="table or json")
    add_pod(parser.add_argument_group("on a pod"), "--pod-output")
    parser.epilog = "Example: partinf run experiments/on_a_pod/demo.toml --on processes"


def run(args: argparse.Namespace) -> int:
    from partinf.experiment.description import read_experiment

    flags = Flags(args)
    flags.word("on", PLACES)
    flags.word("format", FORMATS)
    flags.target("output")
    args.poll_seconds = flags.number("poll_seconds", high=MAX_SECONDS)
    if args.on == "pod" and args.description is None:
        flags.offences.append("--on pod needs --description: which project pays, where and for how long")
    experiment = flags.need(flags.collect(lambda: read_experiment(args.experiment)))
    found = _run(args, experiment)
    if found is None:
        return 0
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=1) + "\n")
    if args.format == "json":
        print(json.dumps(found, indent=1))
    else:
        _show(found)
    return 0


def _run(args: argparse.Namespace, experiment: Experiment) -> Any:
    """The result; None where it is another process's to tell."""
    if args.on == "simulator":
        from partinf.experiment.simulate import simulate

        return simulate(experiment)
    if args.on == "processes":
        need(RUN, "--on processes")
        return _on_processes(args, experiment)
    if args.on == "pod":
        return _on_pod(args, experiment)
    need(RUN, f"--on {args.on}")
    from partinf.cli import devices

    if args.on == "here":
        devices.prepare(experiment.target())
        return _execute(experiment)
    from partinf.hosts import join

    slice_ = experiment.target()
    if slice_.chip.platform.virtual:
        # Not what the user has set but what the experiment says: all processes together have the devices of its slice.
        each = slice_.num_devices // int(os.environ.get("PARTINF_NUM_PROCESSES", "1"))
        os.environ |= slice_.chip.platform.environment(each)
    devices.prepare(slice_)
    group = join()
    found = _execute(experiment)
    group.close()
    if not group.leads:
        return None
    if os.environ.get("PARTINF_RESULTS"):
        (Path(os.environ["PARTINF_RESULTS"]) / _RESULT).write_text(json.dumps(found, indent=1) + "\n")
    return found


def _execute(experiment: Experiment) -> Any:
    from partinf.experiment.execute import execute

    return execute(experiment, lambda text: print(text, file=sys.stderr, flush=True))


def _on_processes(args: argparse.Namespace, experiment: Experiment) -> Any:
    from partinf.experiment.together import run_local

    slice_ = experiment.target()
    if not slice_.chip.platform.virtual:
        raise InvalidInput(f"--on processes: slice {slice_.name} is no CPU slice; processes of one machine share its devices only there")
    command = [sys.executable, "-m", "partinf", "run", str(args.experiment), "--on", "worker", "--format", "json"]
    with tempfile.TemporaryDirectory() as results:
        run_local(command, experiment.processes, slice_.num_devices // experiment.processes, Path(results), _TIMEOUT)
        return documents.read_json(Path(results) / _RESULT)


def _on_pod(args: argparse.Namespace, experiment: Experiment) -> Any:
    """Launch the experiment with the pod scripts: every worker runs it as one process of a whole."""
    from partinf.experiment.pod import launch

    folder = launch(experiment, args.experiment, args.description, args)
    return None if folder is None else documents.read_json(folder / "worker-0" / "results" / _RESULT)


def _show(found: dict[str, Any]) -> None:

    from partinf.foundation.terminal import plain_table, wide_console

    console, plan, where, figures = wide_console(), found["plan"], found["where"], found["figures"]
    place = "simulated" if where["kind"] == "simulator" else f"{where['devices']} × {where['device_kind']}, {where['processes']} processes"
    console.print(f"[bold]{plan['model']}[/] on {plan['slice']} ({plan['mesh']}): {plan['layout']}; {place}", highlight=False)
    console.print(f"constants: {found['constants']['source']}, ±{found['constants']['error']:.0%}", highlight=False)
    generated = figures["throughput"]["generated_tokens_per_second"]
    console.print(
        f"{len(found['requests'])} requests in {found['counters']['iterations']} iterations and {figures['seconds']:.3g} s: "
        f"{shown(generated)} tokens/s",
        highlight=False,
    )
    for step in found["steps"]:
        headings = ("entry", "collective", ">count", ">predicted ms", ">measured ms", ">measured / predicted")
        table = plain_table(*headings, title=f"\n{step['step']}")
        key = lambda entry: -entry["count"] * (entry["measured_seconds"] or entry["predicted_seconds"])  # noqa: E731
        for entry in sorted(step["entries"], key=key)[:_LISTED]:
            op = f"{entry['op']}({''.join(entry['axes'])})" if entry["op"] else ""
            table.add_row(entry["name"], op, str(entry["count"]), *_times_and_ratio(entry, entry["count"]))
        table.add_row("entries that were timed alone", "", "", "", _ms(step["entries_measured_seconds"]), "")
        table.add_row("the whole step", "", "", *_times_and_ratio(step, 1))
        console.print(table)


def _times_and_ratio(row: dict[str, Any], count: int) -> tuple[str, str, str]:
    predicted, measured = count * row["predicted_seconds"], row["measured_seconds"]
    if measured is None:
        return _ms(predicted), "–", "–"
    ratio = f"{count * measured / predicted:.2f}" if predicted else "–"
    return _ms(predicted), _ms(count * measured), ratio


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else shown(1e3 * seconds)
