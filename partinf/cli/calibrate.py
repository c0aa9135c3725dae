"""Measure the devices that are here, and write what was found as a hardware file."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partinf.cli.flags import FORMATS, Flags
from partinf.foundation.limits import MAX_SECONDS

if TYPE_CHECKING:
    from partinf.hardware.chips import Chip
    from partinf.measure.probes import Probe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--types", metavar="LIST", default="f32,bf16,int8", help="of weights (default: f32,bf16,int8)")
    parser.add_argument("--devices", default="0", metavar="N", help="virtual CPU devices to measure (default: JAX_NUM_CPU_DEVICES or 1)")
    parser.add_argument("--seconds", default="30", metavar="S", help="for timing; compiling comes beside it (default: 30)")
    parser.add_argument("--output", metavar="FILE", help="(default: the user's configuration, where --slice local finds it)")
    parser.add_argument(
        "--products", metavar="show|again", help="the form of each product on this CPU and its times, measured again or not"
    )
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
    count, seconds = flags.whole("devices", high=devices.MAX_VIRTUAL), flags.number("seconds", high=MAX_SECONDS, above=True)
    flags.word("format", FORMATS)
    flags.target("output")
    if args.products is not None:
        flags.word("products", ("show", "again"))
    flags.check()
    devices.prepare(None, virtual_devices=max(1, count))
    if args.products is not None:
        return _products(again=args.products == "again", as_json=args.format == "json")
    from partinf.hardware.hardware_file import default_path, write_hardware
    from partinf.measure.calibrate import calibrate, predicted_seconds

    started = time.perf_counter()
    say = lambda stage: print(stage, file=sys.stderr)  # noqa: E731
    chip, probes = calibrate(tuple(dict.fromkeys(DType(name) for name in names)), seconds, say)
    rates = chip.rates
    assert rates is not None
    path = Path(args.output) if args.output else default_path(rates.device_kind, rates.devices)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(write_hardware(chip))
    predicted = predicted_seconds(chip, probes)
    if args.format == "json":
        print(json.dumps(_json(chip, path, probes, predicted, time.perf_counter() - started), indent=2))
    else:
        _show(chip, path, probes, predicted, time.perf_counter() - started, used=not args.output)
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
        told = [f"{form} up to {rows}" for rows, form in lines[:-1]] + [f"{lines[-1][1]} beyond" if len(lines) > 1 else str(lines[0][1])]
        table.add_row(kind, ", ".join(told))
    console.print(table)
    if found.times:
        rows = [count for count, _ in max((each.measured for each in found.times), key=len)]
        title = "\nµs of a product with a matrix of 1024 · 1024 on one core, by rows"
        times = plain_table("weights", "form", *(f">{count}" for count in rows), title=title)
        for each in found.times:
            took = dict(each.measured)
            times.add_row(each.kind, each.form, *(f"{1e6 * took[count]:.3g}" if count in took else "" for count in rows))
        console.print(times)
    if found.unsettled:
        console.print(f"\nTimes of {', '.join(found.unsettled)} did not settle; a table holds there. Measure again on a quiet machine.")
    elif not found.times:
        console.print("\nNothing was measured; a table holds: nothing is kept between starts, or the kernels cannot be made.")
    if found.times and where is not None:
        console.print(f"\nKept in {where}; compiled programs depend on it.", highlight=False)
    return 0


def _json(chip: Chip, path: Path, probes: list[Probe], predicted: list[float], seconds: float) -> dict[str, Any]:
    from dataclasses import asdict

    rates = chip.rates
    assert rates is not None
    steps = [
        {"name": probe.name, "seconds": probe.timing.seconds, "spread": probe.timing.spread, "predicted_seconds": price}
        for probe, price in zip(probes, predicted, strict=True)
    ]
    return {"file": str(path), "chip": chip.name, "seconds": seconds, "rates": asdict(rates), "steps": steps}


def _show(chip: Chip, path: Path, probes: list[Probe], predicted: list[float], seconds: float, used: bool) -> None:
    from partinf.foundation.terminal import plain_table, wide_console

    console, rates = wide_console(), chip.rates
    assert rates is not None
    count = f"{rates.devices} devices" if rates.devices > 1 else "one device"
    console.print(
        f"{chip.name}: {count} of kind {rates.device_kind}, measured in {seconds:.0f} s; figures are of one of them\n", highlight=False
    )
    table = plain_table("weights", *(f">{rows:.0f}" for rows in rates.products[0][1].sizes), title="Products, GFLOP/s by rows")
    for name, curve in rates.products:
        table.add_row(name, *(f"{rate / 1e9:.3g}" for rate in curve.rates))
    console.print(table)
    for name, found in rates.types:
        console.print(
            f"{name}: decode attention {found.decode_kv / 1e9:.3g} GB/s of KV and {found.decode_flops / 1e9:.3g} GFLOP/s, prompt attention "
            f"{found.prompt_flops / 1e9:.3g} GFLOP/s, between products {found.activations / 1e9:.3g} GB/s, choice of a token "
            f"{found.choice / 1e9:.3g} GB/s, {found.op_seconds * 1e6:.3g} µs per operation, {found.step_seconds * 1e6:.3g} µs per step",
            highlight=False,
        )
    console.print(f"memory {rates.memory / 1e9:.3g} GB/s", highlight=False)
    for rate in rates.collectives:
        text = (
            f"{rate.op} among {rate.ways}: {rate.seconds * 1e6:.3g} µs, bytes at {1 / rate.factor if rate.factor else float('inf'):.2g} ×"
        )
        console.print(f"{text} the links' {chip.switch_bandwidth / 1e9 or chip.link_bandwidth / 1e9:.3g} GB/s", highlight=False)
    steps = plain_table("step", ">measured", ">±", ">predicted", ">", title="\nSteps that the rates were fitted to, ms")
    for probe, price in zip(probes, predicted, strict=True):
        took = probe.timing.seconds
        steps.add_row(probe.name, f"{1e3 * took:.3g}", f"{probe.timing.spread:.0%}", f"{1e3 * price:.3g}", f"{price / took - 1:+.0%}")
    console.print(steps)
    console.print(f"\nMedian error {rates.error:.0%}. Written to {path}.", highlight=False)
    if used:
        console.print("Slice local uses it from now on; elsewhere, pass --hardware FILE.", highlight=False)
