"""What CPUs run in C++ instead of XLA: the core of attention (`cpu_attention.cc`, `cpu_prompts.cc`), products (`cpu_products.cc`, by
`products`), those of experts among them (`cpu_experts.cc`), what stands between products (`cpu_rows.cc`, by `rows`), and what is read off
logits (`cpu_logits.cc`).

Pages and weights are read where they lie, once, by all cores. The machine's own C++ compiler makes the library when it is first wanted,
for the CPU of the machine, in about eight seconds; it is cached next to the compiled programs (`partinf.foundation.caches`).
Without a compiler XLA's forms are used, which give the same and take longer; a warning says so once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from absl import logging

from partinf.foundation.caches import NATIVE, OFF, temporary, usable
from partinf.foundation.errors import InvalidInput
from partinf.hardware.platform import CPU, Form
from partinf.partition.quantize import Quantized
from partinf.transformer.cache import KeysValues, Stored
from partinf.transformer.machine import host

COMPILER_VARIABLE = "CXX"
_PARTS = "attention.cc attention.h experts.cc logits.cc products.cc products.h prompt_tile.h prompts.cc rows.cc vectors.h"
_SOURCES = tuple(Path(__file__).with_name(f"cpu_{part}") for part in _PARTS.split())
_TARGETS = ("decode", "prefill", "product", "grouped", "logit_ends", "norm", "gated", "heads")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC")
WIDTH = 16  # numbers of a vector: of rows that kernels take there are whole ones, d_head among them
_SECONDS = 300
_NONE = np.zeros((0,), np.int32)
_NARROW = {Form.PANELS_OF_PAIRS: 1, Form.TILES: 2}  # forms in which prompts' numbers of bfloat16 meet, as cpu_prompts.cc numbers them


def fits(pages: KeysValues) -> bool:
    """Whether the kernels take these pages [.., S, Q], and this machine has the kernels."""
    known = isinstance(pages.keys, Quantized) or pages.keys.dtype in (jnp.float32, jnp.bfloat16, jnp.uint16)
    return known and pages.keys.shape[-1] % WIDTH == 0 and available()


def decode(
    q: jax.Array, stored: Stored, position: jax.Array, scale: float, cap: float, least: jax.Array | None, form: Form = Form.PANELS
) -> tuple[jax.Array, jax.Array]:
    """Attention of one query per lane over the lane's own pages.

    Args:
        q: [B, K, G, Q]. position: [B], the last that is visible in the lane's pages, -1 for none. scale: of scores. cap: c in
            c·tanh(score/c), 0 for none. least: [B], the first that is visible; None for the first that there is. form: as of `prefill`, but
            that pairs are no faster for so few queries.

    Returns:
        [B, K, G, Q], 0 for lanes that saw nothing, and the logarithm of the sum of exp(score) [B, K, G], float32.
    """
    own = jnp.bfloat16 if form is Form.TILES and takes_narrow(form, stored.pages, q) else jnp.float32
    shapes = (jax.ShapeDtypeStruct(q.shape, own), jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32))
    call = jax.ffi.ffi_call(target("decode"), shapes)
    visible = _ints(position), _ints(_NONE if least is None else least)
    numbers = {"scale": np.float32(scale), "cap": np.float32(cap)}
    out, mass = call(q.astype(own), *_plain(stored.pages), _ints(stored.rows), *visible, **numbers)
    return out.astype(q.dtype), mass


def prefill(
    q: jax.Array,
    owner: jax.Array,
    position: jax.Array,
    new: KeysValues,
    key_owner: jax.Array,
    key_position: jax.Array,
    context: tuple[Stored, jax.Array, jax.Array] | None,
    scale: float,
    cap: float,
    window: int,
    floor: jax.Array | None,
    form: Form = Form.PANELS,
) -> tuple[jax.Array, jax.Array]:
    """Attention of prompt tokens over those of the same owner up to their position, and over what is stored of it.

    Args:
        q: [T, H, Q]. owner, position: [T]; owner -1 is padding. new: [K, M, Q] of the keys with `key_owner` and `key_position` [M].
        context: the pages [slots, n] of some owners; who they are, and how many positions each has there, [slots].
        scale, cap: as of `decode`. window: positions that a token sees, its own included; 0 for all. floor: [T], with a window, how many of
            the positions in the pages lie before it. form: how bfloat16 is multiplied, with bfloat16 or int8 in the pages; in float32 but
            for the forms of pairs and tiles, where the weights of values are rounded to bfloat16 too.

    Returns:
        [T, H, Q], 0 for tokens that saw nothing, and the logarithm of the sum of exp(score) [T, H], float32.
    """
    narrow = takes_narrow(form, None if context is None else context[0].pages, q, new.keys, new.values)
    own = jnp.bfloat16 if narrow else jnp.float32
    if context is None:
        none = _ints(_NONE)
        empty = jnp.zeros((0, 1, q.shape[-1]), jnp.uint16 if narrow else jnp.float32)
        context = Stored(KeysValues(empty, empty), none.reshape(0, 1)), none, none
    stored, slots, lengths = context
    shapes = (jax.ShapeDtypeStruct(q.shape, own), jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32))
    call = jax.ffi.ffi_call(target("prefill"), shapes)
    queries = q.astype(own), _ints(owner), _ints(position)
    fresh = new.keys.astype(own), new.values.astype(own), _ints(key_owner), _ints(key_position)
    earlier = _ints(stored.rows), _ints(slots), _ints(lengths), _ints(_NONE if floor is None else floor)
    numbers = {"scale": np.float32(scale), "cap": np.float32(cap), "window": np.int32(window)}
    out, mass = call(*queries, *fresh, *_plain(stored.pages), *earlier, **numbers, form=np.int32(_NARROW[form] if narrow else 0))
    return out.astype(q.dtype), mass


def takes_narrow(form: Form, pages: KeysValues | None, *numbers: jax.Array) -> bool:
    """Whether queries and keys [.., Q] are multiplied in this form as they are, in bfloat16, with these pages."""
    narrow = all(x.dtype == jnp.bfloat16 and x.shape[-1] % (2 * WIDTH) == 0 for x in numbers)
    return narrow and form in _NARROW and (pages is None or isinstance(pages.keys, Quantized) or pages.keys.dtype != jnp.float32)


def fits_groups(x: jax.Array, weights: jax.Array) -> bool:
    """Whether `grouped` takes rows [R, E] and matrices [X, F, E], and this machine has it."""
    known = x.dtype in (jnp.float32, jnp.bfloat16) and weights.dtype in (jnp.float32, jnp.bfloat16, jnp.int8)
    return known and weights.shape[2] % (2 * WIDTH) == 0 and weights.shape[1] % 4 == 0 and available()


def grouped(x: jax.Array, weights: jax.Array, sizes: jax.Array, form: Form = Form.PANELS) -> jax.Array:
    """Rows [R, E], those of the first group first, each with the matrix of its group, [X, F, E] → [R, F] float32.

    Args:
        sizes: [X], rows of each group; rows beyond their sum are given anything. Matrices of groups without rows are not read. form: in
            tiles, for bfloat16, or not.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], weights.shape[1]), jnp.float32)
    return jax.ffi.ffi_call(target("grouped"), shape)(x, weights, _ints(sizes), tiles=np.int32(form is Form.TILES))


def logit_ends(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of every row of logits [R, V], float32: the largest, where it first stands, and the sum of exp(logit − largest), [R] each. NaN, no
    place and NaN for a row with a NaN; a sum of 0 for a row of -inf alone."""
    count = logits.shape[:1]
    shapes = tuple(jax.ShapeDtypeStruct(count, dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32))
    return tuple(jax.ffi.ffi_call(target("logit_ends"), shapes)(logits))


@functools.cache
def available() -> bool:
    """Whether this machine has the kernels: made now, if they are not there yet, and made known to XLA."""
    if os.environ.get(COMPILER_VARIABLE) == OFF:
        return False
    try:
        library = _loaded()
    except (InvalidInput, OSError, subprocess.SubprocessError) as error:
        logging.warning("CPU steps run by XLA alone, which takes longer: their kernels cannot be made (%s)", _reason(error))
        return False
    for name in _TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, f"partinf_{name}"))
        jax.ffi.register_ffi_target(target(name), handler, platform=CPU.name)
    return True


def has_tiles() -> bool:
    """Whether this machine, where it has the kernels, multiplies matrices of bfloat16 in a unit of its own (AMX)."""
    return bool(_loaded().partinf_has_tiles())


def target(name: str) -> str:
    """The name by which XLA knows a kernel."""
    return f"partinf_{name}_{digest()}"


@functools.cache
def _loaded() -> ctypes.CDLL:
    return ctypes.CDLL(str(_library()))


def _library() -> Path:
    """The library of these sources for this machine, made if it is not there: where it is cached, else among the temporary files."""
    kept = usable(NATIVE)
    if kept is not None:
        try:
            return _made_in(kept)
        except OSError:  # it cannot be written to
            pass
        except subprocess.CalledProcessError as error:
            if "No space left" not in error.stderr:
                raise
    return _made_in(temporary(NATIVE))


def _made_in(folder: Path) -> Path:
    path = folder / f"cpu_kernels-{digest()}.so"
    if _whole(path):
        return path
    compiler = next(filter(None, map(shutil.which, (os.environ.get(COMPILER_VARIABLE, "c++"), "g++", "clang++"))), None)
    if compiler is None:
        raise InvalidInput(f"no C++ compiler; install one, or name it in ${COMPILER_VARIABLE}")
    with tempfile.TemporaryDirectory(dir=folder, prefix="making-") as making:
        sources = [source for source in _SOURCES if source.suffix == ".cc"]
        objects = [Path(making) / f"{source.stem}.o" for source in sources]
        includes = f"-I{jax.ffi.include_dir()}"
        with ThreadPoolExecutor(len(sources)) as pool:  # at once: each takes seconds
            commands = [
                (compiler, *_FLAGS, includes, "-c", str(source), "-o", str(to)) for source, to in zip(sources, objects, strict=True)
            ]
            list(pool.map(_run, commands))
        made = Path(making) / "whole.so"
        _run((compiler, *_FLAGS, "-shared", *map(str, objects), "-o", str(made)))
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())  # a loader reads no further than the library's own end
        os.replace(made, path)  # atomic, even if another process makes it at this moment
    return path


def _run(command: tuple[str, ...]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)


def _whole(path: Path) -> bool:
    """Whether this is a library that was made here: a damaged one may end the process that loads it."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@functools.cache
def digest() -> str:
    """Names what the library depends on: its sources, how they are compiled, and the machine."""
    parts = ([path.read_bytes() for path in _SOURCES], _FLAGS, jaxlib.__version__, host())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):  # what the compiler wrote so far is bytes here, whatever `text` is
        return f"the compiler took longer than {error.timeout:g} s"
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else repr(error))


def _plain(pages: KeysValues) -> tuple[Any, ...]:
    """Keys, values and their scales as the kernels take them; scales are empty where there are none."""
    if isinstance(pages.keys, Quantized):
        size = pages.keys.shape[1]
        return pages.keys.values, pages.values.values, pages.keys.scale.reshape(-1, size), pages.values.scale.reshape(-1, size)
    bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x  # noqa: E731
    none = jnp.zeros((0, 0), jnp.float32)
    return bits(pages.keys), bits(pages.values), none, none


def _ints(x: jax.Array) -> jax.Array:
    return jnp.asarray(x).astype(jnp.int32)
