"""A product of two matrices in each form that it has (`Form`): XLA's, and the CPU's own kernels (`cpu_products.cc`)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from partinf.hardware.platform import Form
from partinf.transformer.kernels import cpu as cpu_kernels

_NUMBERS = {form: number for number, form in enumerate(tuple(Form)[2:])}  # as cpu_products.cc numbers them
FEW_ROWS = (2, 64)  # of float32, whose products XLA makes in halves
_OUTPUTS = 4  # of a product: a multiple of this
_INPUTS = {form: 32 if form in (Form.ROWS_OF_PAIRS, Form.PANELS_OF_PAIRS, Form.TILES) else 16 for form in _NUMBERS}
_TYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "int8"}
_FORMS = {
    "f32": (Form.XLA, Form.ROWS, Form.PANELS),
    "bf16": (Form.XLA, Form.WIDENED, Form.ROWS_OF_PAIRS, Form.PANELS, Form.PANELS_OF_PAIRS, Form.TILES),
    "int8": (Form.XLA, Form.ROWS, Form.PANELS, Form.PANELS_OF_PAIRS, Form.TILES),
}


def kind_of(x: jax.Array, weights: jax.Array) -> str | None:
    """The type of a product as choices name it; None where there is nothing to choose. Pairs are of bfloat16 on both sides."""
    found = _TYPES.get(weights.dtype.name)
    return found if x.dtype == (jnp.float32 if found == "f32" else jnp.bfloat16) else None


def forms(kind: str) -> tuple[Form, ...]:
    """The forms that this machine has for weights of a type."""
    return tuple(form for form in _FORMS[kind] if form not in _NUMBERS or _has(form))


def fits(form: Form, x: jax.Array, weights: jax.Array) -> bool:
    """Whether the form takes x [T, E] and weights [F, E], which a kernel does by its sizes and where there is one."""
    return form not in _NUMBERS or (cpu_kernels.available() and weights.shape[1] % _INPUTS[form] == 0 and weights.shape[0] % _OUTPUTS == 0)


def leaves_out(form: Form) -> bool:
    """Whether rows that hold nothing cost nothing."""
    return form in _NUMBERS


def made(form: Form, x: jax.Array, weights: jax.Array, live: jax.Array | None = None, dtype: Any = jnp.float32) -> jax.Array:
    """x [T, E] · weights [F, E] → [T, F], added in float32, weights as they are stored.

    Args:
        live: [T], false for rows that hold nothing: in a kernel of ours they cost nothing and come out as zeros. dtype: of what comes out.

    Raises:
        ValueError: `live` says it of more or fewer rows than there are.
    """
    if live is not None and live.shape != x.shape[:1]:
        raise ValueError(f"{live.shape} rows that hold something or nothing, of x {x.shape}")
    if form in _NUMBERS:
        own = dtype if dtype in (jnp.float32, jnp.bfloat16) else jnp.float32
        shape = jax.ShapeDtypeStruct((x.shape[0], weights.shape[0]), own)
        rows = jnp.zeros((0,), jnp.int32) if live is None else live.astype(jnp.int32)
        return jax.ffi.ffi_call(cpu_kernels.target("product"), shape)(x, weights, rows, form=np.int32(_NUMBERS[form])).astype(dtype)
    weights = weights.astype(x.dtype)
    if form is Form.WIDENED and x.dtype == jnp.bfloat16:
        x = x.astype(jnp.float32)
        weights = _widened(weights, x)
    return _by_xla(x, weights).astype(dtype)


def _by_xla(x: jax.Array, weights: jax.Array) -> jax.Array:
    """A few float32 rows meet the two halves of a matrix as a batch of two: XLA on CPU has a fast product for that, and takes up to three
    times as long for the whole matrix; bfloat16, one row and many rows are as fast whole."""
    if weights.shape[0] % 2 or x.dtype != jnp.float32 or not FEW_ROWS[0] <= x.shape[0] <= FEW_ROWS[1]:
        return jnp.einsum("te,fe->tf", x, weights, preferred_element_type=jnp.float32)
    halves = weights.reshape(2, -1, weights.shape[1])
    return jnp.einsum("te,hfe->htf", x, halves, preferred_element_type=jnp.float32).swapaxes(0, 1).reshape(x.shape[0], -1)


def _widened(weights: jax.Array, x: jax.Array) -> jax.Array:
    """bfloat16 weights as float32, made when x (float32) is there. With nothing to wait for, and it waits for no barrier, XLA on CPU would
    widen the weights of all layers first: into memory instead of a cache, and twice their size of it. So the bits of a number of x, shifted
    until none is left, go among those that widening adds."""
    nothing = lax.bitcast_convert_type(x[(0,) * x.ndim], jnp.uint32) >> 16 >> 16
    high = lax.bitcast_convert_type(weights, jnp.uint16).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(high | nothing, jnp.float32)


@functools.cache
def _has(form: Form) -> bool:
    return cpu_kernels.available() and (form is not Form.TILES or cpu_kernels.has_tiles())
