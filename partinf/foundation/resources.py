"""The data files that ship with partinf: models, saved layouts, and tables inside the package.

Models and layouts are top-level folders of the repository, because people read and add to them. A wheel carries copies under
`partinf/_data/`; a checkout and an editable install use the folders themselves. This module is the only one that knows the difference.
Everything is returned as a real path, since weights are mapped into memory from it.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Literal

from partinf.foundation.errors import InvalidInput, nearest

Shipped = Literal["models", "layouts"]


def names(kind: Shipped) -> list[str]:
    """The names that `find` knows, sorted."""
    return sorted(_entries(kind))


def find(kind: Shipped, name: str) -> Path:
    """The file `<name>.toml`, or for a model that comes with weights the folder `<name>/`, which wins where both exist.

    Raises:
        InvalidInput: Nothing of that name ships with partinf. The message gives the nearest name.
    """
    entries = _entries(kind)
    if name not in entries:
        raise InvalidInput(f"unknown {kind.removesuffix('s')} '{name}'{nearest(name, entries)}")
    return entries[name]


def package_file(name: str) -> Path:
    """A file that lives inside the package itself, such as a table of constants.

    Raises:
        FileNotFoundError: The installation is broken; names of such files do not come from users.
    """
    path = _package() / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is missing from the installed package at {path.parent}")
    return path


def python_path() -> str:
    """The PYTHONPATH with which a process that is started finds this very package, wherever it runs."""
    return os.pathsep.join([str(_package().parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def _package() -> Path:
    return Path(str(files("partinf")))


def _folder(kind: Shipped) -> Path:
    inside_wheel = _package() / "_data" / kind
    return inside_wheel if inside_wheel.is_dir() else _package().parent / kind


def _entries(kind: Shipped) -> dict[str, Path]:
    folder = _folder(kind)
    if not folder.is_dir():
        return {}
    entries = {path.name.removesuffix(".toml"): path for path in folder.glob("*.toml")}
    if kind == "models":
        entries |= {path.name: path for path in folder.iterdir() if (path / "config.json").is_file()}
    return entries
