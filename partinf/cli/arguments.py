"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path

from partinf import resources
from partinf.hardware import Slice, parse_slice
from partinf.layout import Layout, layout_from_toml


def add_where(parser: argparse.ArgumentParser, slice_help: str) -> None:
    """`--slice`, `--mesh` and `--layout`."""
    parser.add_argument("--slice", default="local", metavar="NAME", help=slice_help)
    parser.add_argument("--mesh", metavar="AXES", help="another factorisation of the slice's axes: 4x2, or x0:2,x1:2,y:4 on a torus")
    parser.add_argument("--layout", default="auto", metavar="NAME|FILE|auto", help="a layout of layouts/, a saved plan, or auto: chosen")


def named_slice(text: str, mesh: str | None) -> Slice | None:
    """The slice that was asked for; None for `local`, which only jax can tell."""
    return None if text == "local" else parse_slice(text, mesh)


def named_layout(text: str) -> Layout | None:
    """A shipped layout or a layout file; None for `auto`.

    Raises:
        InvalidInput: an unknown name (nearest one), or what is wrong with the file.
    """
    if text == "auto":
        return None
    path = Path(text) if Path(text).is_file() else resources.find("layouts", text)
    layout, _ = layout_from_toml(path.read_text(), str(path))
    return layout
