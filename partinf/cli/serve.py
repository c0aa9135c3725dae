"""Serve a model over HTTP: plan, load, compile, and answer as OpenAI's servers do."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from partinf.cli.flags import Flags
from partinf.cli.model_place import ModelPlace
from partinf.cli.model_place import add_arguments as add_arguments_of_place
from partinf.cli.served_engine import SCHEDULER, ServedEngine, add_engine_arguments
from partinf.foundation.errors import InvalidInput
from partinf.foundation.limits import MAX_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from partinf.api import Model
    from partinf.engine.engine import Engine
    from partinf.hosts import Group
    from partinf.plans import Plan
    from partinf.serve.chat_template import ChatTemplate
    from partinf.serve.server import Loaded, Options

    _Make = Callable[[Model], Engine]

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+")
_KEY_VARIABLE = "PARTINF_API_KEY"
_WHOLE = {
    "port": (0, (1 << 16) - 1),
    "seed": (0, (1 << 63) - 1),
    "max_connections": (1, 1 << 16),
    "max_body_bytes": (1, 1 << 30),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments_of_place(parser, "--max-model-len")
    where = parser.add_argument_group("address and clients")
    where.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0 listens on every interface (default: 127.0.0.1)")
    where.add_argument("--port", default="8000", metavar="N", help="0 takes a free one (default: 8000)")
    where.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"require this key of clients; several may be given; also {_KEY_VARIABLE}",
    )
    where.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="model names to accept; responses carry the first (default: --model)"
    )
    where.add_argument("--chat-template", metavar="FILE", help="a template to use instead of the model's own")
    where.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="allow pages of this origin in browsers, such as https://chat.example.org; several may be given; * for all (default: none)",
    )
    where.add_argument(
        "--tool-call-parser",
        default="auto",
        metavar="NAME",
        help="how the model writes tool calls: hermes, llama3_json, mistral, pythonic, or auto, by its chat template (default: auto)",
    )
    from partinf.engine.policies.registry import described

    batch = parser.add_argument_group("the engine")
    batch.add_argument("--scheduler", default=SCHEDULER, metavar="NAME", help=f"{described()} (default: {SCHEDULER})")
    add_engine_arguments(batch)
    batch.add_argument("--seed", default="0", metavar="N", help="seed of requests that give none (default: 0)")
    bounds = parser.add_argument_group("bounds")
    bounds.add_argument("--max-connections", default="1024", metavar="N", help="connections open at once; more get a 503 (default: 1024)")
    bounds.add_argument(
        "--max-body-bytes", default=str(8 << 20), metavar="N", help="size of a request; larger ones get a 413 (default: 8 MiB)"
    )
    bounds.add_argument(
        "--shutdown-timeout", default="20", metavar="S", help="seconds that requests in flight may take after SIGTERM (default: 20)"
    )
    others = parser.add_argument_group("several processes", "Every process runs the same command; only process 0 has clients.")
    others.add_argument("--multi-host", action="store_true", help="join the processes that jax finds (Cloud TPU, GKE, Slurm)")
    others.add_argument("--coordinator", metavar="HOST:PORT", help="if jax does not find them: a free port of process 0's machine")
    others.add_argument("--num-processes", metavar="N", help="number of processes")
    others.add_argument("--process-id", metavar="I", help="index of this process, from 0")
    others.add_argument(
        "--stall-timeout", default="300", metavar="S", help="seconds that one step may take before every process ends (default: 300)"
    )
    parser.add_argument("--access-log", action="store_true", help="log a line per request, without its body")
    parser.epilog = "Example: partinf serve --model demo --port 8000"


def run(args: argparse.Namespace) -> int:
    from partinf.hosts import Bounds, Job, join

    flags = Flags(args)
    _read(flags)
    served = ServedEngine.read(flags)
    names = ("--coordinator", "--num-processes", "--process-id")
    job = flags.collect(lambda: Job.of(args.coordinator, args.num_processes, args.process_id, names)) or Job()
    bounds = flags.collect(lambda: Bounds(stall=args.stall_timeout)) or Bounds()
    if args.multi_host and job.count is not None:
        flags.offences.append(f"--multi-host and {', '.join(names)}: the former lets jax find what the latter say; give one of them")
    place = ModelPlace(flags, job.count or 1)
    template = flags.collect(lambda: _chat_template(args))
    flags.check()
    group = join(job, bounds) if args.multi_host or (job.count or 1) > 1 else None
    plan = served.plan(place)
    make = lambda model: _engine(args, served, model, group)  # noqa: E731
    if group is not None and not group.leads:
        return _follow(place, plan, group, make)
    count = served.mask_threads
    masks = f"slow grammars on {count} {'thread' if count == 1 else 'threads'}" if count else "all grammars between steps"
    return _serve(args, place, plan, template, group, make, masks)


def _follow(place: ModelPlace, plan: Plan, group: Group, make: _Make) -> int:
    """A process that has devices and no clients. The signal to stop goes to process 0, which lets this one end when it has drained."""
    from partinf.hosts import JobEnded
    from partinf.serve.server import say

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        model = place.load(plan, group=group)
        say(f"{group.name} of {group.count}, following process 0")
        group.follow(make(model))
    except JobEnded:  # its reason has been printed
        return 1
    return 0


def _serve(
    args: argparse.Namespace, place: ModelPlace, plan: Plan, template: ChatTemplate | None, group: Group | None, make: _Make, settings: str
) -> int:
    """The process that clients know; `settings` is part of what is logged when it is ready."""
    from partinf.hosts import JobEnded
    from partinf.serve.server import Loaded, listen, serve

    def load() -> Loaded:
        model = place.load(plan, group=group)
        runner = model.runner
        note = f"{runner.num_compiled} programs compiled, {runner.num_loaded} loaded in {runner.compile_seconds:.1f} s"
        if group is not None:
            note += f", {group.count} processes"
        note += "; no chat template" if template is None else f"; chat template: {template.where}"
        note += f"; {settings}"
        return Loaded(make(model), model.tokenizer, template, note)

    with listen(args.host, args.port) as listener:
        try:
            ended = serve(listener, load, _options(args))
        except JobEnded:
            return 1
    if group is not None:
        group.close()
    if not ended:  # in the middle of a compilation or of a step that hangs; the interpreter's own exit would wait for it
        sys.stderr.flush()
        os._exit(0)
    return 0


def _read(flags: Flags) -> None:
    """Put the numbers in the place of their texts; what is wrong joins the flags' offences."""
    from partinf.serve.tool_calls import FORMATS

    args = flags.args
    flags.word("tool_call_parser", ("auto", *FORMATS))
    for name, (low, high) in _WHOLE.items():
        setattr(args, name, flags.optional_whole(name, low, high))
    for name in ("shutdown_timeout", "stall_timeout"):
        setattr(args, name, flags.number(name, high=MAX_SECONDS))
    flags.offences += [
        f"--cors-origin {origin}: it is no origin; write it as browsers do, https://chat.example.org or http://localhost:3000, or * for all"
        for origin in args.cors_origin
        if origin != "*" and _ORIGIN.fullmatch(origin) is None
    ]
    if any(not key for key in args.api_key):
        flags.offences.append("--api-key: an empty key would admit every client; leave the flag out for that")


def _chat_template(args: argparse.Namespace) -> ChatTemplate | None:
    from partinf import api
    from partinf.serve.chat_template import load_chat_template

    try:
        directory = None if args.model is None else api.weights_directory(args.model)
    except InvalidInput:  # reported already
        return None
    return load_chat_template(directory, None if args.chat_template is None else Path(args.chat_template))


def _options(args: argparse.Namespace) -> Options:
    from partinf.serve.bodies import Bounds
    from partinf.serve.server import Options
    from partinf.serve.tool_calls import FORMATS

    keys = [*args.api_key, *([key] if (key := os.environ.get(_KEY_VARIABLE)) else [])]
    return Options(
        names=args.served_model_name or [args.model],
        api_keys=keys,
        bounds=Bounds(body_bytes=args.max_body_bytes),
        max_connections=args.max_connections,
        drain_seconds=args.shutdown_timeout,
        access_log=args.access_log,
        tool_format=FORMATS.get(args.tool_call_parser),
        cors_origins=args.cors_origin,
    )


def _engine(args: argparse.Namespace, served: ServedEngine, model: Model, group: Group | None) -> Engine:
    """An engine whose first iterations have run; all processes of a group make the same."""
    from partinf.measure.estimates import measured_estimates

    estimates = measured_estimates(model.runner, model.plan.buckets, agree=(lambda times: times) if group is None else group.share)
    runner = model.runner if group is None else group.runner(model.runner)
    replicas = None if group is None else group.replicas
    return served.engine(runner, estimates, tokenizer=model.tokenizer, eos_ids=model.engine.eos_ids, seed=args.seed, replicas=replicas)
