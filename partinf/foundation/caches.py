"""Where partinf keeps what a later start loads: compiled steps, jax's own cache of compilations, and the CPU's kernels.

One variable rules them all: `PARTINF_CACHE_DIR` names the directory, `off` keeps nothing; by default it is the user's own. A cache saves
time and no more, so one that cannot be used is a warning and never a failure. This module imports nothing heavy: part of it has to be
settled before jax is imported.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from partinf.foundation.errors import InvalidInput

DIRECTORY_VARIABLE = "PARTINF_CACHE_DIR"
OFF = "off"
EXECUTABLES, XLA, NATIVE = "executables", "xla", "native"


def cache_directory(kind: str) -> Path | None:
    """Where caches of this kind are stored; None where nothing is to be stored. Makes nothing.

    Compiled steps lie directly in a directory that is named, as in one that `partinf.load` is given.
    """
    chosen = os.environ.get(DIRECTORY_VARIABLE, "").strip()
    if chosen.lower() == OFF:
        return None
    try:
        if chosen:
            named = Path(chosen).expanduser().absolute()
            return named if kind == EXECUTABLES else named / kind
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "partinf" / kind
    except RuntimeError:  # a user without a home
        return None


def usable(kind: str) -> Path | None:
    """The directory of `cache_directory`, made; None, with one warning per process, where it cannot be made or is not the user's own."""
    directory = cache_directory(kind)
    if directory is None:
        return None
    try:
        named = cache_directory(EXECUTABLES)
        if named == directory.parent:  # a user who may write there could replace this directory by another
            private_directory(named)
        return private_directory(directory)
    except InvalidInput as error:
        _warn_once(str(error))
        return None


def temporary(kind: str) -> Path:
    """For what has to lie in a file and is not to be retained: the user's own directory among the temporary ones.

    Raises:
        InvalidInput: it cannot be made, or belongs to another user.
    """
    return private_directory(private_directory(Path(tempfile.gettempdir()) / f"partinf-{os.getuid()}") / kind)


def private_directory(directory: Path) -> Path:
    """The same directory, made if it is not there.

    Raises:
        InvalidInput: one that cannot be made, or that another user may write to: what it holds is executed.
    """
    try:
        for folder in reversed(directory.parents):  # mkdir(parents=True) would give the mode to the last alone
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.stat()
    except OSError as error:
        what = "not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise InvalidInput(f"cache {directory}: {what}; name another directory, or '{OFF}'") from error
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InvalidInput(f"cache {directory}: others may write to it, and what it holds is run; make it yours, mode 700")
    return directory


_warned: list[str] = []  # what was reported: one directory is the reason for every kind of cache


def _warn_once(reason: str) -> None:
    if _warned:
        return
    _warned.append(reason)
    logging.getLogger(__name__).warning("partinf: nothing is kept for the next start: %s", reason)
