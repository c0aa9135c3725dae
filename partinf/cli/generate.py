"""Continue prompts with a model of your own: plan, load, compile, and answer all prompts in one batch."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from partinf.cli import running
from partinf.errors import collect

if TYPE_CHECKING:
    from partinf.api import Model
    from partinf.engine.request import RequestOutput, SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    prompts.add_argument("--prompts", metavar="FILE", help="a file with one prompt per line; - reads standard input")
    running.add_arguments(parser)
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens to generate per prompt (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest tokens; 0 is off")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the tokens that hold mass P; 1 is off")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the samples")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be given several times")
    parser.add_argument("--format", choices=("text", "json"), default="text")


def run(args: argparse.Namespace) -> int:
    from partinf import api

    place = running.Running(args)
    prompts = collect(place.offences, lambda: running.read_lines(args.prompt, args.prompts, "--prompts")) or []
    params = collect(place.offences, lambda: _sampling(args))
    plan = place.plan(min(max(len(prompts), 1), 32), random=args.temperature != 0)
    assert params is not None
    api.check_prompts(args.model, plan, prompts, params)
    model = place.load(plan)
    outputs = _answer(model, prompts, params)
    if args.format == "json":
        print(json.dumps(_report(args, model, prompts, outputs), indent=2))
    else:
        for prompt, output in zip(prompts, outputs, strict=True):
            print(f"{prompt}{output.text}")
    return running.tell_failures("prompt", {index: output.error for index, output in enumerate(outputs) if output.error is not None})


def _sampling(args: argparse.Namespace) -> SamplingParams:
    from partinf.engine.request import SamplingParams

    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
    )


def _answer(model: Model, prompts: list[str], params: SamplingParams) -> list[RequestOutput]:
    from partinf.cli.progress import progress_bar

    with progress_bar("generating", len(prompts)) as advance:
        return model.generate(prompts, params, on_token=lambda event: advance(1) if event.finish_reason else None)


def _report(args: argparse.Namespace, model: Model, prompts: list[str], outputs: list[RequestOutput]) -> dict[str, Any]:
    from partinf.layout import readable_name

    plan = model.plan
    return {
        "model": args.model,
        "slice": plan.slice.name,
        "mesh": plan.slice.mesh,
        "layout": readable_name(plan.layout, plan.axis_sizes),
        "programs": model.runner.num_compiled,
        "programs_loaded": model.runner.num_loaded,
        "compile_seconds": model.runner.compile_seconds,
        "outputs": [
            {"prompt": prompt, "text": output.text, "tokens": list(output.tokens), "finish_reason": output.finish_reason.value}
            | ({} if output.error is None else {"error": str(output.error)})
            for prompt, output in zip(prompts, outputs, strict=True)
        ],
    }
