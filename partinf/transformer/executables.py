"""Compiled programs on disk: a second start loads what the first one compiled.

An entry is named by a digest of everything that a program depends on: the source of this package, jax and its compiler, flags, devices
and host, plan, and which program it is. So a stale entry is never found, and one that is damaged or that this machine cannot load is
compiled again and replaced. Entries are written whole or not at all. Loading one runs code in it: the directory must be the user's own.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from partinf.hardware.platform import Platform
from partinf.partition.sharding import platform_of
from partinf.plans import Plan
from partinf.transformer.kernels import cpu as cpu_kernels
from partinf.transformer.machine import DIRECTORY_VARIABLE, OFF, host, kept, own

_MAGIC = b"partinf executable 1\n"
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")
_MAX_BYTES = 16 << 30


@dataclass(frozen=True)
class Obtained:
    """Programs that were made ready.

    Attributes:
        compiled, loaded: how many. compile_seconds, load_seconds: time for each of them, summed, though several are made at once.
    """

    compiled: int = 0
    loaded: int = 0
    compile_seconds: float = 0.0
    load_seconds: float = 0.0

    def __add__(self, other: Obtained) -> Obtained:
        return Obtained(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


class ExecutableCache:
    """Programs in a directory, at most `max_bytes` of them; those that were not used for longest go first."""

    def __init__(self, directory: Path, max_bytes: int = _MAX_BYTES) -> None:
        """
        Raises:
            InvalidInput: a directory that cannot be made, or that somebody else may write to.
        """
        self.directory = own(directory)
        self._max_bytes = max_bytes

    def load(self, key: str, devices: Sequence[jax.Device]) -> Any | None:
        """The program of this key on these devices; None where there is none, or none that can be loaded."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            digest, payload = content[len(_MAGIC) : len(_MAGIC) + 32], content[len(_MAGIC) + 32 :]
            if not content.startswith(_MAGIC) or hashlib.sha256(payload).digest() != digest:
                return None
            serialized, in_tree, out_tree = pickle.loads(payload)
            compiled = serialize_executable.deserialize_and_load(serialized, in_tree, out_tree, devices[0].client, tuple(devices))
        except Exception:  # whatever is wrong with an entry, compiling again puts it right
            return None
        with suppress(OSError):
            os.utime(path)
        return compiled

    def store(self, key: str, compiled: Any, platform: Platform) -> None:
        """Keep a program; without effect for one that jax cannot serialise, or on a full disk.

        What jax's own cache of compilations returns is serialised without its code on some platforms, so nothing is kept beside that there.
        """
        if not platform.keeps_cached and jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir:
            return
        try:
            payload = pickle.dumps(serialize_executable.serialize(compiled))
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError, pickle.PicklingError):
            return
        with suppress(OSError):
            self._write(self._path(key), _MAGIC + hashlib.sha256(payload).digest() + payload)
            self._make_room()

    def _write(self, path: Path, content: bytes) -> None:
        handle, name = tempfile.mkstemp(dir=self.directory, prefix="writing-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    def _make_room(self) -> None:
        entries = sorted((entry.stat().st_mtime, entry.stat().st_size, entry) for entry in self.directory.glob("*.executable"))
        excess = sum(size for _, size, _ in entries) - self._max_bytes
        for _, size, entry in entries[:-1]:
            if excess <= 0:
                return
            entry.unlink(missing_ok=True)
            excess -= size

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.executable"


def obtain(cache: ExecutableCache | None, key: str, mesh: Mesh, compile_program: Callable[[], Any]) -> tuple[Any, Obtained]:
    """A program from the cache, or compiled and kept there."""
    started = time.perf_counter()
    program = None if cache is None else cache.load(key, list(mesh.devices.flat))
    if program is not None:
        return program, Obtained(loaded=1, load_seconds=time.perf_counter() - started)
    program = compile_program()
    if cache is not None:
        cache.store(key, program, platform_of(mesh))
    return program, Obtained(compiled=1, compile_seconds=time.perf_counter() - started)


def open_cache(directory: str | Path | None = None) -> ExecutableCache | None:
    """The cache in this directory, in that of $PARTINF_CACHE_DIR, or in the user's own; None where it is called `off`."""
    chosen = directory or os.environ.get(DIRECTORY_VARIABLE) or ""
    if str(chosen) == OFF:
        return None
    return ExecutableCache(Path(chosen) if chosen else kept("executables"))


def program_key(plan: Plan, mesh: Mesh, *program: Any) -> str:
    """The name of a program of this plan.

    Args:
        program: what tells it from others of the plan, with a representation that says everything: a bucket, flags, a name.
    """
    devices = list(mesh.devices.flat)
    parts = (
        _source(),
        (jax.__version__, jaxlib.__version__, devices[0].client.platform, devices[0].client.platform_version),
        [os.environ.get(flag, "") for flag in _FLAGS],
        [(device.id, device.device_kind) for device in devices],
        (mesh.axis_names, mesh.devices.shape, jax.process_index(), jax.process_count()),
        (host(), cpu_kernels.available()) if platform_of(mesh).host_code else "",  # which also lets XLA find it in what is loaded
        replace(plan, predicted=(), note="", buckets=()),
        (plan.rich, plan.carried_rows, *program),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


@cache
def _source() -> str:
    """A digest of this package's source."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted((*root.rglob("*.py"), *root.rglob("*.cc"), *root.rglob("*.h"))):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
