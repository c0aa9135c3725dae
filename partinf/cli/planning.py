"""What `plan` and `explain` are asked for: flags read into a model, a slice and a workload, all offences at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from partinf.cli.arguments import add_hardware

if TYPE_CHECKING:
    from partinf.hardware.chips import Chip
    from partinf.hardware.slices import Slice
    from partinf.model.config import ModelConfig
    from partinf.planner.question import Question
    from partinf.workload import Workload

_T = TypeVar("_T")


@dataclass(frozen=True)
class Asked:
    """A search as asked for on the command line.

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
    anywhere = "CHIP:SHAPE such as v4:4x4x4, v5e:4x4, h200:8, cpu:2x2x2, or local"
    known = "a model of models/, a .toml file, or a Hugging Face directory"
    parser.add_argument("--model", required=required, metavar="NAME|DIR", help=known)
    parser.add_argument("--slice", required=required, metavar="SLICE", help=anywhere)
    parser.add_argument("--mesh", metavar="AXES", help="another factorisation of the axes: x0:2,x1:2,y:4, or 4x2 for switched chips")
    add_hardware(parser)
    parser.add_argument("--phase", metavar="PHASE", help="decode or prefill: judge one step of it; neither: the whole workload")
    parser.add_argument("--batch", default="1", metavar="N", help="sequences (default: 1)")
    parser.add_argument("--prefill-batch", metavar="N", help="prompts prefilled together, to be decoded in --batch (default: all of it)")
    parser.add_argument("--input", default="0", metavar="N", help="prompt tokens per request")
    parser.add_argument("--output", default="0", metavar="N", help="generated tokens per request")
    parser.add_argument("--context", metavar="N", help="tokens in the cache at the decode step (default: input + output/2)")
    parser.add_argument("--weights", default="bf16", metavar="TYPE", help="storage of weights: bf16, int8 or f32 (default: bf16)")
    parser.add_argument("--kv", default="bf16", metavar="TYPE", help="storage of the KV cache: bf16, int8 or f32 (default: bf16)")
    parser.add_argument("--bandwidth-model", default="axis", metavar="MODEL", help="axis: links per torus axis; paper: all links together")
    parser.add_argument("--calibration", default="fitted", metavar="MODE", help="fitted: measured constants; none: the pure roofline")
    parser.add_argument(
        "--program",
        metavar="KIND",
        help="looped: collectives unrolled into matmuls (the paper; default for TPUs); tiled: what runs today (elsewhere); plain",
    )


def read(args: argparse.Namespace, objective: str = "latency", max_latency_ms: str | None = None, extra: Iterable[str] = ()) -> Asked:
    """Model, slice and workload.

    Raises:
        InvalidInput: every offence of every flag, one line each.
    """
    from partinf.cost.collectives import BandwidthModel
    from partinf.cost.pricing import PROGRAMS
    from partinf.errors import nearest, raise_offences
    from partinf.model.load import load_model_config
    from partinf.planner.question import Question
    from partinf.workload import DType, Objective, Workload

    offences = list(extra)
    model = _collect(offences, lambda: load_model_config(args.model))
    slice_ = _collect(offences, lambda: read_slice(args.slice, args.mesh, args.hardware))
    flags = ("batch", "prefill-batch", "input", "output", "context")
    numbers = {flag: _whole(flag, getattr(args, flag.replace("-", "_")), offences) for flag in flags}
    if (numbers["prefill-batch"] or 1) > max(_or(numbers["batch"], 1), 1):
        offences.append(f"--prefill-batch {args.prefill_batch}: more prompts than are decoded together, --batch {args.batch}")
    limit = _number("max-latency-ms", max_latency_ms, offences)
    rate = _number("arrivals", getattr(args, "arrivals", None), offences)
    weights = _enum("weights", DType, args.weights, offences)
    kv = _enum("kv", DType, args.kv, offences)
    aim = _enum("objective", Objective, objective, offences)
    bandwidth_model = _enum("bandwidth-model", BandwidthModel, args.bandwidth_model, offences)
    if args.calibration not in ("fitted", "none"):
        offences.append(f"--calibration {args.calibration}: valid: fitted, none")
    if args.program is not None and args.program not in PROGRAMS:
        offences.append(f"--program {args.program}: unknown{nearest(args.program, PROGRAMS)}")
    if args.phase == "decode" and not numbers["context"] and not numbers["input"] and args.context is None:
        offences.append("--phase decode needs --context, the tokens in the cache (or --input and --output)")
    workload = _collect(
        offences,
        lambda: Workload(
            batch=_or(numbers["batch"], 1),
            # A number that could not be read has its own line; here it stands for one that is no offence.
            input_len=_or(numbers["input"], 1),
            output_len=_or(numbers["output"], 0),
            context_len=numbers["context"],
            phase=args.phase,
            weights=weights or DType.BF16,
            kv=kv or DType.BF16,
            objective=aim or Objective.LATENCY,
            max_latency=None if limit is None else limit / 1e3,
            prefill_batch=numbers["prefill-batch"],
            arrival_rate=rate,
        ),
    )
    raise_offences(offences)
    # Whatever is None left an offence.
    assert model is not None
    assert slice_ is not None
    assert workload is not None
    assert bandwidth_model is not None
    question = Question(model, workload, args.calibration, bandwidth_model, PROGRAMS.get(args.program))
    return Asked(question, slice_, _is_auto(args.slice))


def read_slice(text: str, mesh: str | None, hardware: str | None = None) -> Slice:
    """The slice of `--slice`, `--mesh` and `--hardware`; `local` asks jax for the devices that are here, `auto:CHIP` is one chip.

    Raises:
        InvalidInput: what is no slice, or a hardware file of other devices.
    """
    from partinf.cli.arguments import named_hardware, named_slice

    if _is_auto(text):
        return _one_chip(text, mesh, named_hardware(hardware))
    slice_ = named_slice(text, mesh, hardware)
    if slice_ is not None:
        return slice_
    from partinf.cli import devices

    devices.prepare(None, virtual_devices=8)
    from partinf.api import find_slice

    return find_slice(text, mesh, hardware)


def _is_auto(text: str) -> bool:
    return text.partition(":")[0] == "auto"


def _one_chip(text: str, mesh: str | None, measured: Chip | None) -> Slice:
    from partinf.errors import nearest, raise_offences
    from partinf.hardware.chips import chips
    from partinf.hardware.slices import make_slice

    name = text.partition(":")[2]
    known = {**chips(), measured.name: measured} if measured is not None else chips()
    offences = []
    if name not in known:
        offences.append(f"--slice {text}: expected auto:CHIP{nearest(name, known)}")
    if measured is not None and measured.platform.virtual:
        offences.append(f"--slice {text}: a hardware file of a CPU holds for its number of devices alone, and auto tries many")
    if mesh:
        offences.append(f"--mesh {mesh}: a mesh belongs to one slice, and --slice {text} tries many")
    raise_offences(offences)
    chip = known[name]
    return make_slice(chip, (1,) * (chip.torus_dims or 1))


def _collect(offences: list[str], make: Callable[[], _T]) -> _T | None:
    from partinf.errors import InvalidInput

    try:
        return make()
    except InvalidInput as error:
        offences += error.offences
        return None


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _whole(flag: str, text: str | None, offences: list[str]) -> int | None:
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        offences.append(f"--{flag} {text}: a whole number is needed")
        return None


def _number(flag: str, text: str | None, offences: list[str]) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        offences.append(f"--{flag} {text}: a number is needed")
        return None


def _enum(flag: str, kind: Callable[[str], _T], text: str, offences: list[str]) -> _T | None:
    from partinf.errors import nearest

    try:
        return kind(text)
    except ValueError:
        known = [str(member.value) for member in kind]  # type: ignore[attr-defined]
        close = nearest(text, known)
        offences.append(f"--{flag} {text}: valid: {', '.join(known)}" + (close if close.startswith("; did") else ""))
        return None
