"""Continue prompts with a model of your own: plan, load, compile, and answer all prompts in one batch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partinf.cli.arguments import add_where, named_layout, named_slice
from partinf.errors import InvalidInput, collect, raise_offences

if TYPE_CHECKING:
    from partinf.api import Model
    from partinf.engine.request import RequestOutput, SamplingParams
    from partinf.hardware import Slice
    from partinf.layout import Layout
    from partinf.model_config import ModelConfig
    from partinf.plans import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="a Hugging Face directory, or a shipped model with weights")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    prompts.add_argument("--prompts", metavar="FILE", help="a file with one prompt per line; - reads standard input")
    add_where(parser, "devices to run on: local (those that are here), cpu:2x2x2 for virtual ones, h200:8, v5e:2x2, …")
    parser.add_argument("--weights", choices=("f32", "bf16", "int8"), help="storage of the weights (default: f32 on CPU, bf16 elsewhere)")
    parser.add_argument("--kv", choices=("f32", "bf16", "int8"), help="storage of the KV cache (default: as the activations)")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens to generate per prompt (default: 64)")
    parser.add_argument("--max-len", type=int, default=0, metavar="N", help="longest context to serve (default: the model's, at most 2048)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest tokens; 0 is off")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the tokens that hold mass P; 1 is off")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the samples")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be given several times")
    parser.add_argument("--format", choices=("text", "json"), default="text")


def run(args: argparse.Namespace) -> int:
    from partinf import api
    from partinf.cli import devices

    offences: list[str] = []
    prompts = collect(offences, lambda: _prompts(args))
    params = collect(offences, lambda: _sampling(args))
    target = collect(offences, lambda: named_slice(args.slice, args.mesh))
    devices.prepare(target)
    layout = collect(offences, lambda: named_layout(args.layout))
    config = collect(offences, lambda: api.check_loadable(args.model))
    raise_offences(offences)
    assert prompts is not None
    assert params is not None
    assert config is not None
    plan = _plan(args, config, target, layout, len(prompts))
    api.check_prompts(args.model, plan, prompts, params)
    model = _load(args, plan)
    outputs = _answer(model, prompts, params)
    if args.format == "json":
        print(json.dumps(_report(args, model, prompts, outputs), indent=2))
    else:
        for prompt, output in zip(prompts, outputs, strict=True):
            print(f"{prompt}{output.text}")
    return 0


def _plan(args: argparse.Namespace, config: ModelConfig, target: Slice | None, layout: Layout | None, num_prompts: int) -> Plan:
    from partinf import api
    from partinf.buckets import Capacity
    from partinf.workload import DType, Workload

    where = target if target is not None else api.find_slice("local", args.mesh)
    dtype = DType(args.weights or ("f32" if where.chip.family == "cpu" else "bf16"))
    kv = DType(args.kv) if args.kv else DType.F32 if dtype is DType.F32 else DType.BF16
    max_len = args.max_len or min(config.max_len or 2048, 2048)
    rows = min(num_prompts, 32)
    workload = Workload(batch=rows, input_len=max(1, max_len // 2), output_len=max_len // 2, weights=dtype, kv=kv)
    capacity = Capacity(max_rows=rows, max_len=max_len, prefill_tokens=min(256, max_len), random=args.temperature != 0)
    return api.plan(config, where, workload, layout=layout, capacity=capacity)


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt:
        return list(args.prompt)
    if args.prompts == "-":
        text = sys.stdin.read()
    else:
        path = Path(args.prompts)
        if not path.is_file():
            raise InvalidInput(f"--prompts {args.prompts}: no such file")
        text = path.read_text()
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InvalidInput(f"--prompts {args.prompts}: no prompt in it; one per line is expected")
    return lines


def _sampling(args: argparse.Namespace) -> SamplingParams:
    from partinf.engine.request import SamplingParams

    raise_offences([f"--max-len {args.max_len}; it must not be negative"] if args.max_len < 0 else [])
    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
    )


def _load(args: argparse.Namespace, plan: Plan) -> Model:
    from partinf import api
    from partinf.cli.progress import progress_bar

    print(f"{plan.model.name} on {plan.slice.name} ({plan.slice.mesh}): {plan.note or 'layout as given'}", file=sys.stderr)
    with progress_bar("compiling", len(plan.buckets)) as advance:
        return api.load(args.model, plan, on_compiled=lambda *_: advance(1))


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
        "compile_seconds": model.runner.compile_seconds,
        "outputs": [
            {"prompt": prompt, "text": output.text, "tokens": list(output.tokens), "finish_reason": output.finish_reason.value}
            for prompt, output in zip(prompts, outputs, strict=True)
        ],
    }
