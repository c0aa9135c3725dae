"""What code that was compiled for this machine depends on, and where it is kept."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

from partinf.errors import InvalidInput

DIRECTORY_VARIABLE = "PARTINF_CACHE_DIR"
OFF = "off"


@cache
def host() -> str:
    """What code for this machine's CPU depends on."""
    text = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        text = "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
    return f"{platform.machine()} {platform.processor()}\n{text}"


def kept(name: str) -> Path:
    """The directory of this name in that of $PARTINF_CACHE_DIR or, if there is none or it is called `off`, in the user's cache."""
    chosen = os.environ.get(DIRECTORY_VARIABLE) or OFF
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "partinf"
    return (home if chosen == OFF else Path(chosen)) / name


def own(directory: Path) -> Path:
    """The same directory, made if it is not there.

    Raises:
        InvalidInput: one that cannot be made, or that somebody else may write to: what it holds is run.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError as error:
        raise InvalidInput(f"cache {directory}: {error.strerror}; name another directory, or '{OFF}'") from error
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InvalidInput(f"cache {directory}: others may write to it, and what it holds is run; make it yours, mode 700")
    return directory
