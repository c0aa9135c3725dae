"""Log-probabilities of given texts under a model of your own, by prefill alone."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from partinf.cli.flags import FORMATS, Flags
from partinf.cli.model_place import ModelPlace, as_prompts, as_text, read_lines, tell_failures
from partinf.cli.model_place import add_arguments as add_arguments_of_place

if TYPE_CHECKING:
    from rich.console import Console

    from partinf.engine.admission import Prompt
    from partinf.execution.score import Scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument(
        "--text", action="append", metavar="TEXT", help="a text, or token ids for a model without a tokenizer; may be given several times"
    )
    texts.add_argument("--texts", metavar="FILE", help="a file with one text per line; - reads standard input")
    add_arguments_of_place(parser)
    parser.add_argument("--format", default="table", metavar="FORMAT", help="table or json")


def run(args: argparse.Namespace) -> int:
    flags = Flags(args)
    place = ModelPlace(flags)
    lines = flags.collect(lambda: read_lines(args.text, args.texts, "--texts")) or []
    flags.word("format", FORMATS)
    flags.check()
    texts = as_prompts(args.model, lines)
    plan = place.plan(min(max(len(texts), 1), 32), random=False, part_of_memory=0.5)  # a scorer has pages of its own
    scores = place.load(plan, compile_steps=False).score(texts)
    if args.format == "json":
        fields = ("num_tokens", "padded_tokens", "seconds", "mfu", "chip_ms_per_token")
        found = [
            {"text": text, "logprobs": one, "total": None, "error": str(scores.errors[index])}
            if index in scores.errors
            else {"text": text, "logprobs": one, "total": sum(one)}
            for index, (text, one) in enumerate(zip(texts, scores.logprobs, strict=True))
        ]
        print(json.dumps({"model": args.model, "scores": found} | {name: getattr(scores, name) for name in fields}, indent=2))
    else:
        from rich.console import Console

        _show(Console(), texts, scores)
    return tell_failures("text", scores.errors)


def _show(console: Console, texts: list[Prompt], scores: Scores) -> None:
    from partinf.foundation.terminal import plain_table

    table = plain_table(">tokens", ">log-probability", ">per token", "text")
    for index, (text, one) in enumerate(zip(texts, scores.logprobs, strict=True)):
        sums = ("failed", "failed") if index in scores.errors else (f"{sum(one):.3f}", f"{sum(one) / len(one):.3f}")
        table.add_row(f"{len(one)}", *sums, as_text(text), style=None)
    console.print(table, markup=False)
    console.print(
        f"{scores.num_tokens} tokens in {scores.seconds:.3g} s, {scores.padded_tokens - scores.num_tokens} of padding; "
        f"MFU {scores.mfu:.2%}, {scores.chip_ms_per_token:.3g} chip-ms per token",
        highlight=False,
    )
