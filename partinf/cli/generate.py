"""Continue prompts with a model of your own: plan, load, compile, and answer all prompts in one batch."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from partinf.cli.flags import ANY, Flags
from partinf.cli.model_place import ModelPlace, as_prompts, as_text, read_lines, tell_failures
from partinf.cli.model_place import add_arguments as add_arguments_of_place

if TYPE_CHECKING:
    from partinf.api import Model
    from partinf.engine.admission import Prompt
    from partinf.engine.request import RequestOutput, SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a prompt, or token ids for a model without a tokenizer; may be given several times",
    )
    prompts.add_argument("--prompts", metavar="FILE", help="a file with one prompt per line; - reads standard input")
    add_arguments_of_place(parser)
    parser.add_argument("--max-tokens", default="64", metavar="N", help="tokens to generate per prompt (default: 64)")
    parser.add_argument("--temperature", default="0", metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-k", default="0", metavar="K", help="sample among the K likeliest tokens; 0 is off")
    parser.add_argument("--top-p", default="1", metavar="P", help="sample among the tokens that hold mass P; 1 is off")
    parser.add_argument("--seed", metavar="N", help="seed of the samples")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be given several times")
    parser.add_argument("--format", default="text", metavar="FORMAT", help="text or json")


def run(args: argparse.Namespace) -> int:
    from partinf import api
    from partinf.buckets import wanted_by

    flags = Flags(args)
    place = ModelPlace(flags)
    lines = flags.collect(lambda: read_lines(args.prompt, args.prompts, "--prompts")) or []
    params = _sampling(flags)
    flags.word("format", ("text", "json"))
    flags.check()
    prompts = as_prompts(args.model, lines)
    plan = place.plan(min(max(len(prompts), 1), 32), random=flags.need(params).temperature != 0)
    params = flags.need(params)
    lengths = api.check_prompts(args.model, plan, prompts, params)
    model = place.load(plan, buckets=wanted_by(plan, lengths, params.max_tokens))
    outputs = _answer(model, prompts, params)
    if args.format == "json":
        print(json.dumps(_report(args, model, prompts, outputs), indent=2))
    else:
        for prompt, output in zip(prompts, outputs, strict=True):
            print(f"{as_text(prompt, output.tokens)}{output.text}")
    return tell_failures("prompt", {index: output.error for index, output in enumerate(outputs) if output.error is not None})


def _sampling(flags: Flags) -> SamplingParams | None:
    """How to sample; None where some of it is wrong. The ranges are known to `SamplingParams`."""
    from partinf.engine.request import SamplingParams

    before = len(flags.offences)
    max_tokens, top_k, seed = (flags.optional_whole(name, *ANY) for name in ("max_tokens", "top_k", "seed"))
    temperature, top_p = (flags.number(name, *ANY) for name in ("temperature", "top_p"))
    if len(flags.offences) > before or max_tokens is None or top_k is None:
        return None
    stop = tuple(flags.args.stop)
    return flags.collect(lambda: SamplingParams(max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop))


def _answer(model: Model, prompts: list[Prompt], params: SamplingParams) -> list[RequestOutput]:
    from partinf.cli.progress import progress_bar

    with progress_bar("generating", len(prompts)) as advance:
        return model.generate(prompts, params, on_token=lambda event: advance(1) if event.finish_reason else None)


def _report(args: argparse.Namespace, model: Model, prompts: list[Prompt], outputs: list[RequestOutput]) -> dict[str, Any]:
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
