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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from partinf.foundation.caches import EXECUTABLES, OFF, private_directory, usable
from partinf.partition.sharding import platform_of
from partinf.plans import Plan
from partinf.transformer.kernels import choices
from partinf.transformer.kernels import cpu as cpu_kernels
from partinf.transformer.machine import host

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
            InvalidInput: a directory that cannot be made, or that another user may write to.
        """
        self.directory = private_directory(directory)
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

    def store(self, key: str, compiled: Any) -> None:
        """Keep a program; without effect for one that jax cannot serialise, or on a full disk."""
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
    """A program from the cache, or compiled and stored there."""
    started = time.perf_counter()
    program = None if cache is None else cache.load(key, list(mesh.devices.flat))
    if program is not None:
        return program, Obtained(loaded=1, load_seconds=time.perf_counter() - started)
    if cache is None:
        program = compile_program()
    else:
        with nullcontext() if platform_of(mesh).keeps_cached else _compiled_anew():
            program = compile_program()
        cache.store(key, program)
    return program, Obtained(compiled=1, compile_seconds=time.perf_counter() - started)


_switch = threading.Lock()
_compiling = 0  # programs that are compiled anew at this moment, by several threads


@contextmanager
def _compiled_anew() -> Iterator[None]:
    """Keep jax's own cache of compilations out of it, where what that cache returns is serialised without its code.

    jax decides once whether it has a cache, until it is reset.
    """
    global _compiling
    with _switch:
        ours = bool(_compiling or (jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir))
        _compiling += ours
        if ours and _compiling == 1:
            jax.config.update("jax_enable_compilation_cache", False)
            compilation_cache.reset_cache()
    try:
        yield
    finally:
        with _switch:
            _compiling -= ours
            if ours and not _compiling:
                jax.config.update("jax_enable_compilation_cache", True)
                compilation_cache.reset_cache()


def open_cache(directory: str | Path | None = None) -> ExecutableCache | None:
    """The cache in this directory, in that of $PARTINF_CACHE_DIR, or in the user's own; None where it is called `off` or cannot be used.

    Raises:
        InvalidInput: the directory that is given cannot be used.
    """
    if directory:
        return None if str(directory) == OFF else ExecutableCache(Path(directory))
    found = usable(EXECUTABLES)
    return None if found is None else ExecutableCache(found)


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
        (host(), cpu_kernels.available(), choices.current().table)
        if platform_of(mesh).host_code
        else "",  # which also lets XLA find it in what is loaded
        plan.as_dict("predicted", "note", "buckets"),
        (plan.extended, plan.constrained, plan.carried_rows, *program),
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
