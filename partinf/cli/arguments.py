"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path

from partinf.errors import InvalidInput
from partinf.hardware.chips import Chip
from partinf.hardware.hardware_file import check_devices, read_hardware
from partinf.hardware.slices import Slice, parse_slice
from partinf.layout import Layout, load_layout


def add_where(parser: argparse.ArgumentParser, slice_help: str) -> None:
    """`--slice`, `--mesh` and `--layout`."""
    parser.add_argument("--slice", default="local", metavar="NAME", help=slice_help)
    parser.add_argument("--mesh", metavar="AXES", help="another factorisation of the slice's axes: 4x2, or x0:2,x1:2,y:4 on a torus")
    parser.add_argument("--layout", default="auto", metavar="NAME|FILE|auto", help="a layout of layouts/, a saved plan, or auto: chosen")
    add_hardware(parser)


def add_hardware(parser: argparse.ArgumentParser) -> None:
    """`--hardware`."""
    text = "what partinf calibrate wrote, for the chip of --slice (default: for local devices, the user's file for them)"
    parser.add_argument("--hardware", metavar="FILE", help=text)


def named_hardware(file: str | None) -> Chip | None:
    """The chip of a hardware file; None where none was named."""
    return None if file is None else read_hardware(Path(file))


def named_slice(text: str, mesh: str | None, hardware: str | None = None) -> Slice | None:
    """The slice that was asked for; None for `local`, which only jax can tell.

    Raises:
        InvalidInput: no slice, or a hardware file of another chip or number of devices.
    """
    chip = named_hardware(hardware)
    if text == "local":
        return None
    slice_ = parse_slice(text, mesh, chip)
    if chip is not None:
        if slice_.chip is not chip:
            raise InvalidInput(f"--hardware {hardware} is of {chip.name}, --slice {text} of {slice_.chip.name}")
        check_devices(chip, slice_.num_devices)
    return slice_


def named_layout(text: str) -> Layout | None:
    """A shipped layout or a layout file; None for `auto`.

    Raises:
        InvalidInput: an unknown name (nearest one), or what is wrong with the file.
    """
    return None if text == "auto" else load_layout(text)
