"""Measure the local devices, and write what was found as a hardware file.

In the user's configuration the file changes what `--slice local` plans from then on, so the command asks before it writes there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partinf.cli.flags import FORMATS, Flags
from partinf.foundation.limits import MAX_SECONDS

if TYPE_CHECKING:
    from partinf.hardware.chips import Chip
    from partinf.measure.probes import Probe

_SECONDS = 30.0  # for timing
_MOST_SECONDS = 110.0  # for all, unless the user names seconds: what comes after the last round takes the rest of two minutes
_LOADED = 0.25  # of the cores, by work of others
_UNSTEADY = 0.1  # half the distance of the quartiles over the median
_ASKS = "the result changes what is planned for slice local from now on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--types", metavar="LIST", default="f32,bf16,int8", help="of weights (default: f32,bf16,int8)")
    parser.add_argument("--devices", default="0", metavar="N", help="virtual CPU devices to measure (default: JAX_NUM_CPU_DEVICES or 1)")
    parser.add_argument(
        "--seconds", metavar="S", help="seconds of timing, not counting compilation (default: 30, or less to end within two minutes)"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="the file to write (default: the user's configuration, where --slice local finds it)"
    )
    parser.add_argument(
        "--products", metavar="show|again", help="print the kernel that each product uses on this CPU, with its times; again measures first"
    )
    parser.add_argument("--yes", action="store_true", help="replace the user's configuration, and so change later plans, without asking")
    parser.add_argument("--format", default="table", metavar="FORMAT", help="table or json")
    parser.epilog = "Example: partinf calibrate && partinf plan --model llama-125m --slice local --batch 8 --input 128 --output 64"


def run(args: argparse.Namespace) -> int:
    from partinf.cli import devices
    from partinf.workload import DType

    flags, names = Flags(args), args.types.split(",")
    for name in names:
        if name not in list(DType):
            flags.refuse("types", f"'{name}' is no type; valid: {', '.join(DType)}")
    if "int8" in names and "bf16" not in names:
        flags.refuse("types", "activations of int8 weights are bf16; measure bf16 too")
    count, seconds = flags.whole("devices", high=devices.MAX_VIRTUAL), flags.optional_number("seconds", high=MAX_SECONDS, above=True)
    flags.word("format", FORMATS)
    flags.target("output")
    if args.products is not None:
        flags.word("products", ("show", "again"))
    elif not args.output and not args.yes and not sys.stdin.isatty():
        flags.offences.append(f"{_ASKS}, and there is no terminal to ask: --yes agrees, --output FILE writes the rates elsewhere")
    flags.check()
    devices.prepare(None, virtual_devices=max(1, count))
    if args.products is not None:
        return _products(again=args.products == "again", as_json=args.format == "json")
    from partinf.hardware.hardware_file import default_path, write_hardware
    from partinf.measure.calibrate import calibrate, predicted_seconds

    started = time.perf_counter()
    say = lambda stage: print(stage, file=sys.stderr)  # noqa: E731
    _warn_if_loaded()
    latest = math.inf if seconds is not None else started + _MOST_SECONDS
    chip, probes = calibrate(tuple(dict.fromkeys(DType(name) for name in names)), seconds or _SECONDS, say, latest)
    rates = chip.rates
    assert rates is not None
    took, predicted = time.perf_counter() - started, predicted_seconds(chip, probes)
    path = Path(args.output) if args.output else default_path(rates.device_kind, rates.devices)
    if args.format == "table":
        _show(chip, probes, predicted, took)
    _warn_if_unsteady([spread for _, spread in rates.spread])
    written = bool(args.output or args.yes) or _agreed(path)
    if written:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(write_hardware(chip))
    if args.format == "json":
        print(json.dumps(_json(chip, path if written else None, probes, predicted, took), indent=2, allow_nan=False))
    else:
        print(_ending(path, written, used=not args.output))
    return 0


def _products(again: bool, as_json: bool) -> int:
    """Show which form products take on this machine's CPU, and what was measured for it."""
    from partinf.foundation.terminal import plain_table, wide_console
    from partinf.transformer.kernels import choices

    found = choices.measure_again() if again else choices.current()
    if as_json:
        print(choices.to_json(found))
        return 0
    console, where = wide_console(), choices.path()
    table = plain_table("weights", "form", title="Form of a product, up to so many rows")
    for kind, lines in found.table:
        forms = [f"{form} up to {rows}" for rows, form in lines[:-1]] + [f"{lines[-1][1]} beyond" if len(lines) > 1 else str(lines[0][1])]
        table.add_row(kind, ", ".join(forms))
    console.print(table)
    if found.times:
        rows = [count for count, _ in max((each.measured for each in found.times), key=len)]
        title = "\nµs of a product with a matrix of 1024 · 1024 on all cores, by rows"
        times = plain_table("weights", "form", *(f">{count}" for count in rows), title=title)
        for each in found.times:
            took = dict(each.measured)
            times.add_row(each.kind, each.form, *(f"{1e6 * took[count]:.3g}" if count in took else "" for count in rows))
        console.print(times)
    if found.unsettled:
        console.print(
            f"\nTimes of {', '.join(found.unsettled)} did not settle; the default table is used for them. Measure again on an idle machine."
        )
    elif not found.times:
        console.print(
            "\nNothing was measured; the default table is used, because there is no cache directory or the kernels cannot be compiled."
        )
    if found.times:
        share = f"Other programs took {found.others:.0%} of the machine meanwhile"
        console.print(f"\n{share}: other forms may be faster. Measure again when it is idle." if found.doubtful else f"\n{share}.")
    if found.times and where is not None:
        console.print(f"\nStored in {where}; compiled programs depend on it.", highlight=False)
    return 0


def _warn_if_loaded() -> None:
    """Other work takes time from what is measured; more than a part of the cores, and the rates are not those of the machine."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > _LOADED * cores:
        print(
            f"partinf: warning: the machine is busy ({load:.1f} processes were running on {cores} cores in the last minute); "
            "rates will be too low; calibrate when the machine is idle",
            file=sys.stderr,
        )


def _warn_if_unsteady(spreads: list[float]) -> None:
    typical = statistics.median(spreads)
    if typical > _UNSTEADY:
        print(
            f"partinf: warning: repeated measurements vary by ±{typical:.0%} in the median; other work was using the devices",
            file=sys.stderr,
        )


def _agreed(path: Path) -> bool:
    """Ask whether later plans shall use what was measured."""
    known = " in place of what was measured before" if path.exists() else ""
    print(f"\n{_ASKS}. Write {path}{known}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _ending(path: Path, written: bool, used: bool) -> str:
    if not written:
        return "\nNothing was written; plans do not change."
    return f"\nWritten to {path}. " + ("Slice local uses it from now on." if used else "Pass it to other commands as --hardware FILE.")


def _json(chip: Chip, path: Path | None, probes: list[Probe], predicted: list[float], seconds: float) -> dict[str, Any]:
    """What was found; a rate that is too high to be noticed is None."""
    from dataclasses import asdict

    assert chip.rates is not None
    rates = asdict(chip.rates)
    rates["types"] = [(name, {key: _finite(value) for key, value in found.items()}) for name, found in rates["types"]]
    steps = [
        {"name": probe.name, "seconds": probe.timing.seconds, "spread": probe.timing.spread, "predicted_seconds": price}
        for probe, price in zip(probes, predicted, strict=True)
    ]
    return {"file": None if path is None else str(path), "chip": chip.name, "seconds": seconds, "rates": rates, "steps": steps}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rate(value: float, unit: str) -> str:
    """A rate in billions of a unit; an infinite one was too fast to measure."""
    return f"{value / 1e9:.3g} {unit}" if math.isfinite(value) else "too fast to measure"


def _show(chip: Chip, probes: list[Probe], predicted: list[float], seconds: float) -> None:
    from partinf.foundation.terminal import plain_table, wide_console

    console, rates = wide_console(), chip.rates
    assert rates is not None
    count = f"{rates.devices} devices" if rates.devices > 1 else "one device"
    console.print(
        f"{chip.name}: {count} of kind {rates.device_kind}, measured in {seconds:.0f} s; figures are per device\n", highlight=False
    )
    table = plain_table("weights", *(f">{rows:.0f}" for rows in rates.products[0][1].sizes), title="Products, GFLOP/s by rows")
    for name, curve in rates.products:
        table.add_row(name, *(f"{rate / 1e9:.3g}" for rate in curve.rates))
    console.print(table)
    for name, found in rates.types:
        console.print(
            f"{name}: decode attention {_rate(found.decode_kv, 'GB/s')} of KV and {_rate(found.decode_flops, 'GFLOP/s')}, prompt attention "
            f"{_rate(found.prompt_flops, 'GFLOP/s')}, between products {_rate(found.activations, 'GB/s')}, choice of a token "
            f"{_rate(found.choice, 'GB/s')}, {found.op_seconds * 1e6:.3g} µs per operation, {found.step_seconds * 1e6:.3g} µs per step",
            highlight=False,
        )
    least = f", the least operation {rates.pace.small_seconds * 1e6:.3g} µs" if rates.pace else ""
    console.print(f"memory {rates.memory / 1e9:.3g} GB/s{least}", highlight=False)
    for rate in rates.collectives:
        links = f"the links' {chip.switch_bandwidth / 1e9 or chip.link_bandwidth / 1e9:.3g} GB/s"
        bytes_ = f"bytes at {1 / rate.factor:.2g} × {links}" if rate.factor else "no measurable time for its bytes"
        console.print(f"{rate.op} among {rate.ways}: {rate.seconds * 1e6:.3g} µs, {bytes_}", highlight=False)
    steps = plain_table("step", ">measured", ">±", ">predicted", ">", title="\nSteps that the rates were fitted to, ms")
    for probe, price in zip(probes, predicted, strict=True):
        took = probe.timing.seconds
        steps.add_row(probe.name, f"{1e3 * took:.3g}", f"{probe.timing.spread:.0%}", f"{1e3 * price:.3g}", f"{price / took - 1:+.0%}")
    console.print(steps)
    console.print(f"\nMedian error {rates.error:.0%}.", highlight=False)
