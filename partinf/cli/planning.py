"""The input of `plan` and `explain`: flags read into a model, a slice and a workload, all offences at once."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partinf.cli.arguments import add_hardware, add_pricing, check_skew, is_auto, read_skew, read_slice, say_lengths, say_slice
from partinf.cli.flags import ANY, Flags

if TYPE_CHECKING:
    from partinf.hardware.slices import Slice
    from partinf.layout import Layout
    from partinf.model.config import ModelConfig
    from partinf.planner.question import Question
    from partinf.workload import Workload


@dataclass(frozen=True)
class PlanInput:
    """The input of a search, from the command line.

    Attributes:
        slice: the slice; with `auto`, one chip of the kind of which the slice is to be found.
    """

    question: Question
    slice: Slice
    auto: bool = False

    @property
    def model(self) -> ModelConfig:
        return self.question.model

    @property
    def workload(self) -> Workload:
        return self.question.workload


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The flags that several commands share. Numbers and names are read later, so that every wrong one is reported."""
    anywhere = "CHIP:SHAPE such as v4:4x4x4, h200:8, cpu:2x2x2, a cloud's name such as v5litepod-16, v5p-8 or h100x8, or local"
    known = "a model of models/, a .toml file, or a Hugging Face directory"
    parser.add_argument("--model", required=required, metavar="NAME|DIR", help=known)
    parser.add_argument("--slice", required=required, metavar="SLICE", help=anywhere)
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help="a factorisation of the axes: 4x4, x0:2,x1:2,y:4 (default: the slice's own, or a finer one if it is faster)",
    )
    add_hardware(parser)
    parser.add_argument(
        "--phase", metavar="PHASE", help="decode or prefill: plan for one step of this phase (default: plan for the whole workload)"
    )
    parser.add_argument("--batch", default="1", metavar="N", help="sequences (default: 1)")
    parser.add_argument("--prefill-batch", metavar="N", help="prompts prefilled together, then decoded in --batch (default: --batch)")
    parser.add_argument("--input", default="0", metavar="N", help="prompt tokens per request")
    parser.add_argument("--output", default="0", metavar="N", help="generated tokens per request")
    parser.add_argument("--context", metavar="N", help="tokens in the cache at the decode step (default: input + output/2)")
    parser.add_argument("--weights", default="bf16", metavar="TYPE", help="storage of weights: bf16, int8 or f32 (default: bf16)")
    parser.add_argument("--kv", default="bf16", metavar="TYPE", help="storage of the KV cache: bf16, int8 or f32 (default: bf16)")
    parser.add_argument("--bandwidth-model", default="axis", metavar="MODEL", help="axis: links per torus axis; paper: all links together")
    add_pricing(parser)


def read(flags: Flags) -> PlanInput:
    """Model, slice and workload, and everything else that is wrong with the flags.

    Raises:
        InvalidInput: every offence of every flag, one line each.
    """
    from partinf.checkpoint.described import read_model
    from partinf.cost.collectives import BandwidthModel
    from partinf.cost.program import PROGRAMS
    from partinf.planner.question import Question

    args = flags.args
    model = flags.collect(lambda: read_model(args.model))
    slice_ = flags.collect(lambda: read_slice(args.slice, args.mesh, args.hardware))
    workload = _workload(flags)
    bandwidth_model = flags.member("bandwidth_model", BandwidthModel)
    calibration = flags.word("calibration", ("fitted", "none"))
    program, skew = flags.optional_word("program", PROGRAMS), read_skew(flags)
    check_skew(flags, skew, model)
    flags.check()
    model, slice_, workload = flags.need(model), flags.need(slice_), flags.need(workload)
    say_lengths(model, max(workload.max_context, workload.decode_context))
    auto = is_auto(args.slice)
    if not auto and args.slice != "local":
        say_slice(slice_)
    chosen = None if program is None else PROGRAMS[program]
    return PlanInput(Question(model, workload, calibration, bandwidth_model, chosen, skew), slice_, auto)


def named(wanted: PlanInput, name: str) -> tuple[Layout, int]:
    """A layout by name or file, its roles for the axes of the slice, and its padded heads.

    Raises:
        InvalidInput: an unknown layout, one of more kinds of axes than the slice has axes, or one that cannot hold the model.
    """
    from partinf.foundation.errors import InvalidInput, raise_offences
    from partinf.layout.files import load_layout
    from partinf.planner.evaluate import heads_for
    from partinf.plans import layout_for, layout_offences

    given = load_layout(name)
    try:
        layout = layout_for(wanted.slice, given)
        padded = 0
        if offences := layout_offences(wanted.model, wanted.slice, layout):
            padded = heads_for(wanted.model, layout, wanted.slice.axis_sizes) or 0
            offences = layout_offences(wanted.model, wanted.slice, layout, padded)
        raise_offences(offences)
    except InvalidInput as error:
        raise InvalidInput([f"--layout {name}: {offence}" for offence in error.offences]) from None
    return layout, padded


def _workload(flags: Flags) -> Workload | None:
    """The workload of the flags; None where some of it is wrong. Its ranges are known to `Workload`."""
    from partinf.workload import DType, Objective, Workload

    args = flags.args
    # A number that could not be read has its own line; here it stands for one that is no offence.
    batch, input_len, output_len, context_len, prefill_batch = (
        flags.optional_whole(name, *ANY) for name in ("batch", "input", "output", "context", "prefill_batch")
    )
    batch, input_len = 1 if batch is None else batch, 1 if input_len is None else input_len
    if (prefill_batch or 1) > max(batch, 1):
        flags.refuse("prefill_batch", f"more prompts than are decoded together, --batch {args.batch}")
    if args.phase == "decode" and not context_len and args.input == "0" and args.context is None:
        flags.offences.append("--phase decode needs --context, the tokens in the cache (or --input and --output)")
    limit = flags.optional_number("max_latency_ms", *ANY) if hasattr(args, "max_latency_ms") else None
    rate = flags.optional_number("arrivals", *ANY) if hasattr(args, "arrivals") else None
    if prefill_batch is None and any(getattr(args, name, None) is not None for name in ("ttft", "tpot")):
        prefill_batch = 1  # requests that have bounds of their own come one by one
    weights, kv = flags.member("weights", DType), flags.member("kv", DType)
    objective = flags.member("objective", Objective) if hasattr(args, "objective") else Objective.LATENCY
    return flags.collect(
        lambda: Workload(
            batch=batch,
            input_len=input_len,
            output_len=output_len or 0,
            context_len=context_len,
            phase=args.phase,
            weights=weights,
            kv=kv,
            objective=objective,
            max_latency=None if limit is None else limit / 1e3,
            prefill_batch=prefill_batch,
            arrival_rate=rate,
        )
    )
