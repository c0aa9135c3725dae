"""What must be settled before jax is imported: which platform, how many virtual CPU devices, and where compiled programs are stored."""

from __future__ import annotations

import os

from partinf.foundation.caches import XLA, usable
from partinf.foundation.errors import InvalidInput
from partinf.foundation.rounding import ceil_div
from partinf.hardware.platform import CPU, has_accelerator
from partinf.hardware.slices import Slice

MAX_VIRTUAL = 1024


def prepare(slice_: Slice | None = None, virtual_devices: int = 1, num_processes: int = 1) -> None:
    """Set jax's environment; variables that the user has set win.

    Args:
        slice_: the slice to run on; None for the local devices.
        virtual_devices: CPU devices to make where no accelerator is there and no slice is given.
        num_processes: how many processes have the devices together.

    Raises:
        InvalidInput: more virtual devices than one process can have.
    """
    if slice_ is not None:
        virtual, count = slice_.chip.platform.virtual, ceil_div(slice_.num_devices, num_processes)
    else:
        virtual, count = not has_accelerator(), virtual_devices
    if virtual and count > MAX_VIRTUAL:
        raise InvalidInput(f"{count:,} virtual devices; a process makes at most {MAX_VIRTUAL:,}, with threads and memory of their own each")
    if virtual:
        for name, value in CPU.environment(count).items():
            os.environ.setdefault(name, value)
    directory = usable(XLA)
    if directory is not None and os.access(directory, os.W_OK):  # jax warns of every program that it cannot write
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(directory))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
