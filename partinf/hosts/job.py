"""Which processes a job has, and how this one joins them."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass

import numpy as np

from partinf.foundation.errors import InvalidInput, raise_offences
from partinf.hardware.platform import PLATFORMS
from partinf.hosts.group import Group
from partinf.hosts.watch import Bounds
from partinf.hosts.wire import Door, connect, own_addresses

NAMES = ("PARTINF_COORDINATOR", "PARTINF_NUM_PROCESSES", "PARTINF_PROCESS_ID")
_NOTE_BYTES = 4096  # of what the first process says of itself through jax
_CONNECT_SECONDS = 120.0


@dataclass(frozen=True)
class Job:
    """This process among those of a job.

    Attributes:
        host, port: where process 0 has jax's coordinator; "" and 0 where jax finds it by itself (Cloud TPU, GKE, Slurm).
        count, index: how many there are, and which this is; both None where jax finds them.
    """

    host: str = ""
    port: int = 0
    count: int | None = None
    index: int | None = None

    @classmethod
    def of(cls, coordinator: str | None, count: int | str | None, index: int | str | None, names: tuple[str, str, str] = NAMES) -> Job:
        """
        Args:
            coordinator: HOST:PORT. names: what the three are called where they were given.

        Raises:
            InvalidInput: everything that is missing or wrong.
        """
        given = dict(zip(names, (coordinator, count, index), strict=True))
        if all(value is None for value in given.values()):
            return cls()
        offences = [f"{name} is missing: a job of several processes needs {', '.join(given)}" for name, v in given.items() if v is None]
        host, _, port = (coordinator or "").rpartition(":")
        if coordinator is not None and (not host or not (port.isascii() and port.isdigit()) or not 0 < int(port[:9]) < 65536):
            offences.append(f"{names[0]} {coordinator}: HOST:PORT is needed")
        numbers = []
        for name, value in ((names[1], count), (names[2], index)):
            whole = value is not None and str(value).isascii() and str(value).isdecimal()
            numbers.append(int(str(value)) if whole else None)
            if value is not None and not whole:
                offences.append(f"{name} {value}; it must be a whole number, at least 0")
        if numbers[0] == 0:
            offences.append(f"{names[1]} 0; it must be at least 1")
        if numbers[0] and numbers[1] is not None and numbers[1] >= numbers[0]:
            offences.append(f"{names[2]} {numbers[1]}; valid: 0..{numbers[0] - 1}")
        raise_offences(offences)
        return cls(host.strip("[]"), int(port), *numbers)

    @property
    def address(self) -> str:
        """HOST:PORT of the coordinator."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether all processes are on this machine, so that nothing need listen to others."""
        return self.host == "localhost" or self.host == "::1" or self.host.startswith("127.")

    @classmethod
    def of_environment(cls) -> Job:
        """What $PARTINF_COORDINATOR, $PARTINF_NUM_PROCESSES and $PARTINF_PROCESS_ID say."""
        coordinator, count, index = (os.environ.get(name) for name in NAMES)
        return cls.of(coordinator, count, index)


def initialize(job: Job | None = None) -> None:
    """Make jax's processes one, before it looks for devices; on CPU their collectives go over Gloo.

    Args:
        job: as the environment says if not given.
    """
    import jax

    job = Job.of_environment() if job is None else job
    platform = PLATFORMS.get(jax.config.jax_platforms or os.environ.get("JAX_PLATFORMS", ""))
    if platform is not None and platform.virtual:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if job.count is None:
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(job.address, job.count, job.index, coordinator_bind_address=job.address if job.loopback else None)


def join(job: Job | None = None, bounds: Bounds | None = None) -> Group:
    """Join this process with the others of its job, before jax looks for devices.

    Args:
        job: as the environment says if not given: $PARTINF_COORDINATOR, $PARTINF_NUM_PROCESSES and $PARTINF_PROCESS_ID, or, without
            them, as jax finds it on Cloud TPU, GKE and Slurm.
        bounds: how long to wait for others before the job is ended.

    Raises:
        InvalidInput: a job that is not well described.
        RuntimeError: the others could not be found.
    """
    import jax

    job = Job.of_environment() if job is None else job
    initialize(job)
    return group(job, jax.process_index(), jax.process_count(), bounds)


def group(job: Job, index: int, count: int, bounds: Bounds | None = None) -> Group:
    """Connect this process with the others, once jax's processes are one."""
    name = f"process {index} ({socket.gethostname()[:40]}, pid {os.getpid()})"
    if count == 1:
        return Group(0, 1, name, {}, bounds)
    if index:
        addresses, token, first = json.loads(_through_jax(b""))
        links = connect([tuple(address) for address in addresses], bytes.fromhex(token), index, name, _CONNECT_SECONDS)
        return Group(index, count, name, {0: (first, links)}, bounds)
    door = Door.open(job.host if job.loopback else "")
    try:
        addresses = [(address, door.port) for address in ([job.host] if job.loopback else own_addresses(job.host))]
        _through_jax(json.dumps([addresses, door.token.hex(), name]).encode())
        return Group(0, count, name, door.accept(count, _CONNECT_SECONDS), bounds)
    finally:
        door.listener.close()


def _through_jax(note: bytes) -> bytes:
    """The note of the first process in every one, by a collective of the devices: the one way that exists before any address is known."""
    from jax.experimental import multihost_utils

    if len(note) > _NOTE_BYTES:
        raise InvalidInput(f"this machine has too many addresses ({len(note)} bytes); name one as the coordinator")
    padded = np.zeros(_NOTE_BYTES, np.uint8)
    padded[: len(note)] = np.frombuffer(note, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8)).rstrip(b"\0")
