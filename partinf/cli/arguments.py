"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from partinf.foundation.errors import InvalidInput
from partinf.foundation.limits import MAX_PAGES

if TYPE_CHECKING:  # a command's help needs none of these
    from partinf.cli.flags import Flags
    from partinf.hardware.slices import Slice
    from partinf.layout import Layout
    from partinf.model.config import ModelConfig
    from partinf.plans import Plan


def add_where(parser: argparse.ArgumentParser, slice_help: str) -> None:
    """`--slice`, `--mesh` and `--layout`."""
    parser.add_argument("--slice", default="local", metavar="NAME", help=slice_help)
    parser.add_argument("--mesh", metavar="AXES", help="another factorisation of the slice's axes: 4x2, or x0:2,x1:2,y:4 on a torus")
    add_layout(parser)
    add_hardware(parser)


def add_layout(parser: argparse.ArgumentParser) -> None:
    """`--layout`."""
    parser.add_argument("--layout", default="auto", metavar="NAME|FILE|auto", help="a layout of layouts/, a saved plan, or auto: chosen")


def add_pricing(parser: argparse.ArgumentParser) -> None:
    """`--calibration`, `--program` and `--routing-skew`: how steps are priced."""
    parser.add_argument("--calibration", default="fitted", metavar="MODE", help="fitted: measured constants; none: the pure roofline")
    text = "tiled: what runs (default); plain; or a published one: looped (the paper's), jax-llm-examples, tensor-parallel"
    parser.add_argument("--program", metavar="KIND", help=text)
    text = "exponent of the power law by which routers prefer some experts: 0 for uniform routing (default); 1.01 was seen in DeepSeek R1"
    parser.add_argument("--routing-skew", default="0", metavar="ALPHA", help=f"{text}, 1.2 in Qwen3-235B-A22B (docs/planning.md)")


def read_skew(flags: Flags) -> float:
    """`--routing-skew`."""
    from partinf.cost.routing import MOST_SKEW

    return flags.number("routing_skew", high=MOST_SKEW)


def check_skew(flags: Flags, skew: float, model: ModelConfig | None) -> None:
    """What is wrong with asking a skew of this model joins the offences of the flags; nothing where there is no model."""
    from partinf.cost.routing import skew_offences

    if model is not None:
        flags.offences += [f"--{line}" for line in skew_offences(skew, model.name, model.experts is not None)]


def add_pod(parser: argparse.ArgumentParser | argparse._ArgumentGroup, output: str) -> None:
    """The flags of a run on a slice that is created for it; `output` is the flag of the directory that its files go to."""
    parser.add_argument("--description", type=Path, metavar="FILE", help="project, zone, time to live and more; see tpu_scripts/README.md")
    parser.add_argument("--run-id", metavar="ID", help="name of the run (default: the current time)")
    parser.add_argument(output, type=Path, default=Path("pod-runs"), metavar="DIR", help="where its files go (default: pod-runs)")
    parser.add_argument("--dry-run", action="store_true", help="print exactly the commands that would be executed")
    parser.add_argument("--yes", action="store_true", help="do not ask before creating a large slice")
    parser.add_argument("--poll-seconds", default="20", metavar="S", help="seconds between two polls of a machine (default: 20)")


def add_saved_plan(parser: argparse.ArgumentParser) -> None:
    """`--plan`."""
    text = "what partinf plan --save wrote: model, slice, mesh, layout and storage types; --model then gives the model's directory"
    parser.add_argument("--plan", metavar="FILE", help=text)


def read_saved_plan(flags: Flags) -> Plan | None:
    """The plan of `--plan`, whose model takes the place of a `--model` that was not given; None where there is none, or where something is
    wrong with it or with related flags, whose offences say so."""
    args = flags.args
    if args.plan is None:
        if args.model is None:
            flags.offences.append("--model is missing: a model, or --plan FILE, a saved plan that names one")
        return None
    from partinf.foundation import documents
    from partinf.planner.files import SavedPlan

    for name in ("slice", "mesh", "layout", "weights", "kv"):
        if flags.given(name):
            flags.refuse(name, f"--plan {args.plan} says that already; leave one of them out")
    where = f"plan {args.plan}"
    found = flags.collect(
        lambda: SavedPlan.of(documents.read_text(Path(args.plan), where, documents.TOML_BYTES), args.plan, args.model, args.hardware)
    )
    if found is None:
        return None
    args.model = args.model or found.model
    return found.plan


def add_pool(parser: argparse.ArgumentParser) -> None:
    """`--kv-pages` and `--memory-share`."""
    parser.add_argument("--kv-pages", default="0", metavar="N", help="KV pages per shard (default: as many as memory holds)")
    shares = "0.9, and a quarter on CPUs, whose memory is the machine's"
    text = f"share of the memory left by weights, programs and activations that becomes KV pages (default: {shares})"
    parser.add_argument("--memory-share", metavar="SHARE", help=text)


def read_pool(flags: Flags) -> tuple[int, float]:
    """Pages per shard, and the share of memory; 0 where they are not given."""
    if flags.given("kv_pages") and flags.given("memory_share"):
        flags.refuse("memory_share", "--kv-pages says how many pages there are; leave one of them out")
    pages, share = flags.whole("kv_pages", high=MAX_PAGES), flags.optional_number("memory_share", high=1.0, above=True)
    return pages, share or 0.0


def add_hardware(parser: argparse.ArgumentParser) -> None:
    """`--hardware`."""
    text = "what partinf calibrate wrote, for the chip of --slice (default: for local devices, the user's file for them)"
    parser.add_argument("--hardware", metavar="FILE", help=text)


def named_slice(text: str, mesh: str | None, hardware: str | None = None) -> Slice | None:
    """The slice of the flags; None for `local`, which only jax knows.

    Raises:
        InvalidInput: no slice, or a hardware file of another chip or number of devices.
    """
    from partinf.hardware.hardware_file import slice_of

    return None if text == "local" else slice_of(text, mesh, hardware)


def read_slice(text: str, mesh: str | None, hardware: str | None = None) -> Slice:
    """The slice to plan for: `local` asks jax for the local devices, `auto:CHIP` is one chip.

    Raises:
        InvalidInput: what is no slice, or a hardware file of other devices.
    """
    from partinf.hardware.hardware_file import read_hardware, slice_of

    if is_auto(text):
        from partinf.planner.slices import one_chip

        if mesh:
            raise InvalidInput(f"--mesh {mesh}: a mesh belongs to one slice, and --slice {text} tries many")
        return one_chip(text.partition(":")[2], None if hardware is None else read_hardware(Path(hardware)))
    if text != "local":
        return slice_of(text, mesh, hardware)
    from partinf.cli import devices

    devices.prepare(None, virtual_devices=8)
    from partinf.api import find_slice

    return find_slice(text, mesh, hardware)


def is_auto(text: str) -> bool:
    """Whether a slice is to be found: `auto:CHIP`."""
    return text.partition(":")[0] == "auto"


def named_layout(text: str) -> Layout | None:
    """A shipped layout or a layout file; None for `auto`.

    Raises:
        InvalidInput: an unknown name (nearest one), or what is wrong with the file.
    """
    from partinf.layout.files import load_layout

    return None if text == "auto" else load_layout(text)


def say_lengths(model: ModelConfig, longest: int) -> None:
    """Say on standard error that requests are longer than the model's context, where they are: a plan or a simulation of them is made all
    the same, since only sizes matter."""
    for line in model.context_offences(f"requests of {longest} tokens", longest):
        print(f"partinf: note: {line}", file=sys.stderr)


def say_slice(slice_: Slice) -> None:
    """Warn on standard error if no cloud rents a slice of this shape; it is planned for all the same."""
    if slice_.not_rented:
        print(f"partinf: note: {slice_.not_rented}", file=sys.stderr)
