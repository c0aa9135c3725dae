"""What linear layers share: the dot product's types, the norm over a split E, and gathering weight shards."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from partinf.hardware.platform import Form, Grouped, Platform, gathers_norm
from partinf.model.kinds import Activation, FeedForward, Norm
from partinf.partition.collectives import Axes, Frame, Split, move, take_split
from partinf.partition.quantize import Quantized
from partinf.transformer.batch import Batch
from partinf.transformer.kernels import choices, cpu, products
from partinf.transformer.kernels import rows as row_kernels
from partinf.transformer.params import Params
from partinf.transformer.routes import Routes


def made_for(routes: Routes) -> Platform | None:
    """The platform that a step is made for; the plain twin, which is there to be read, is made for none."""
    return None if routes.plain else routes.plan.slice.chip.platform


def row_by_row(x: jax.Array, routes: Routes) -> jax.Array:
    """x [T, ..] laid out token by token, where prompts pass experts on a TPU. Left to itself the compiler may turn all activations for the
    sake of one product, and then turns what comes back from the experts; without experts its own choice is as fast or faster."""
    platform, wanted = made_for(routes), routes.plan.model.experts and routes.bucket.prefill_tokens
    if platform is None or platform.grouped is not Grouped.TPU_KERNEL or not wanted:
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def native_rows(routes: Routes) -> bool:
    """Whether kernels for CPUs do what is done row by row."""
    platform = made_for(routes)
    return platform is not None and platform.tiles.native and cpu.available()


def live_tokens(batch: Batch, routes: Routes) -> jax.Array | None:
    """[T] whether a lane or token of the step is no padding; None where products read all rows anyway, or a device has a part of them."""
    if not _chooses(made_for(routes)) or routes.ways(routes.tokens) > 1:
        return None
    return jnp.concatenate([jnp.asarray(batch.decode.position) >= 0, jnp.asarray(batch.prefill.owner) >= 0])


def live_rows(batch: Batch, routes: Routes) -> jax.Array | None:
    """[D + S] the same of the rows from which tokens are sampled."""
    if not _chooses(made_for(routes)) or routes.ways(routes.replica) > 1:
        return None
    return jnp.concatenate([jnp.asarray(batch.decode.position) >= 0, jnp.asarray(batch.prefill.last) >= 0])


def dot(
    spec: str,
    x: jax.Array,
    weights: jax.Array | Quantized,
    dtype: jnp.dtype | None = None,
    platform: Platform | None = None,
    live: jax.Array | None = None,
) -> jax.Array:
    """An einsum that accumulates in float32 and returns the type of `x` (or `dtype`); int8 weights are scaled per output channel.

    Dimensions that stand side by side wherever they occur (heads and d_head) are merged for the product: XLA has a fast product of
    matrices on CPU, and a loop several times slower for anything else. Many rows come out row by row, and what else is wanted is a
    transposition of that: left to itself the einsum makes W · xᵀ, which whatever comes next would read against the grain.

    Args:
        platform: that the program is made for, if for any: where products have several forms, weights are met as they are stored in the
            one that takes least on this machine (`choices`). All are as exact.
        live: [T], false for rows of x that are padding, where that is known; they may come out as zeros.
    """
    dtype = x.dtype if dtype is None else dtype
    scale = None
    if isinstance(weights, Quantized):
        _, weight_letters, out_letters = spec.replace("->", ",").split(",")
        sizes = dict(zip(weight_letters, weights.shape, strict=True))
        scale = weights.scale.reshape([sizes.get(letter, 1) for letter in out_letters])
        weights = weights.values if _chooses(platform) else weights.values.astype(x.dtype)
    wanted = spec[spec.index(">") + 1 :]
    made = _row_by_row(spec) if x.shape[0] > products.FEW_ROWS[1] else wanted
    merged, x_shape, weights_shape, out_shape = _merged(spec.replace(wanted, made), x.shape, weights.shape)
    summed = dtype if scale is None and _chooses(platform) else jnp.dtype(jnp.float32)
    out = _product(merged, x.reshape(x_shape), weights.reshape(weights_shape), summed, platform, live).reshape(out_shape)
    out = out.transpose([made.index(letter) for letter in wanted])
    return (out if scale is None else out * scale).astype(dtype)


def _chooses(platform: Platform | None) -> bool:
    return platform is not None and platform.products is not None


def _row_by_row(spec: str) -> str:
    """The letters of an einsum's result in the order of its arguments: those of x first."""
    first, second, result = spec.replace("->", ",").split(",")
    return "".join(letter for letter in dict.fromkeys(first + second) if letter in result)


def _product(spec: str, x: jax.Array, weights: jax.Array, dtype: jnp.dtype, platform: Platform | None, live: jax.Array | None) -> jax.Array:
    """An einsum that adds in float32, in the form that the machine chose where there is a choice."""
    first, second, result = spec.replace("->", ",").split(",")
    if (first[1:], result) != (second[1:], first[0] + second[0]) or x.ndim != 2:  # not rows by rows, which forms are made for
        return jnp.einsum(spec, x, weights.astype(x.dtype), preferred_element_type=jnp.float32).astype(dtype)
    form = choices.current().form(x, weights) if _chooses(platform) else Form.XLA
    return products.made(form, x, weights, live, dtype)


@functools.cache
def _merged(spec: str, *shapes: tuple[int, ...]) -> tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The einsum with every run of letters that occurs only as a whole merged into its first letter; both arguments' shapes under it,
    and the shape of the result under `spec`."""
    terms = spec.replace("->", ",").split(",")
    sizes = {letter: size for term, shape in zip(terms, shapes, strict=False) for letter, size in zip(term, shape, strict=True)}
    result = tuple(sizes[letter] for letter in terms[2])
    merged = True
    while merged:
        merged = False
        for first, second in {pair for term in terms for pair in itertools.pairwise(term)}:
            if all((first + second in term) == (first in term) == (second in term) for term in terms):
                terms = [term.replace(first + second, first) for term in terms]
                sizes[first] *= sizes[second]
                merged = True
                break
    first_shape, second_shape = (tuple(sizes[letter] for letter in term) for term in terms[:2])
    return f"{terms[0]},{terms[1]}->{terms[2]}", first_shape, second_shape, result


def norm(x: jax.Array, weights: Params, name: str, axes: Axes, routes: Routes) -> jax.Array:
    """The model's norm of x [T, E.axes] with the whole weight [E] `weights[name]` and its bias, as far as it has them."""
    model = routes.plan.model
    plain = not model.norm.centred and x.ndim == 2 and routes.ways(axes) == 1
    if plain and native_rows(routes) and row_kernels.takes(x, model.embed_dim):
        return row_kernels.norm(x, weights[name], model.norm_eps, model.norm.offset, routes.live)
    found = normalised(x, model.norm, model.norm_eps, model.embed_dim, axes, routes)
    return weighted(found, x.dtype, weights, name, axes, routes)


def normalised(x: jax.Array, by: Norm, eps: float, width: int, axes: Axes, routes: Routes, real: np.ndarray | None = None) -> jax.Array:
    """x [T, .., C.axes] normalised over its last dimension, which is `width` in all, in float32.

    Of few rows every device gathers what all have found in their parts, which takes half the hops of a sum, and adds that up itself.

    Args:
        real: [parts, C.axes], which entries of every part are not padding, where some are; those that are hold 0.
    """
    wide = x.astype(jnp.float32)
    split = tuple(axis for axis in axes if routes.sizes[axis] > 1)
    few = bool(split) and gathers_norm(x.shape[0] * (2 if by.centred else 1) * routes.ways(split))
    if by.centred:
        mean, variance = (_moments_gathered if few else _moments)(wide, width, split, routes, real)
        return (wide - mean[..., None]) * lax.rsqrt(variance[..., None] + eps)
    squares = jnp.sum(wide * wide, axis=-1)
    squares = jnp.sum(_gathered(squares, split, routes), axis=0) if few else _summed(squares, split)
    return wide * lax.rsqrt(squares[..., None] / width + eps)


def _moments(wide: jax.Array, width: int, split: Axes, routes: Routes, real: np.ndarray | None) -> tuple[jax.Array, jax.Array]:
    """Mean and variance [T, ..] of wide [T, .., C.split], in two passes: where the mean lies far above the deviation, the mean of squares
    less the square of the mean is nothing but rounding."""
    mean = _summed(jnp.sum(wide, axis=-1), split) / width
    away = _zero_padding(wide - mean[..., None], split, real)
    return mean, _summed(jnp.sum(away * away, axis=-1), split) / width


def _moments_gathered(wide: jax.Array, width: int, split: Axes, routes: Routes, real: np.ndarray | None) -> tuple[jax.Array, jax.Array]:
    """The same of wide [T, C.split], both passes over each part, which are put together by what their means differ in (Chan, Golub and
    LeVeque, 1983)."""
    counts = np.full(routes.ways(split), float(wide.shape[-1]), np.float32) if real is None else real.sum(axis=-1, dtype=np.float32)
    own = jnp.sum(wide, axis=-1) / (wide.shape[-1] if real is None else jnp.maximum(jnp.asarray(counts), 1.0)[lax.axis_index(split)])
    away = _zero_padding(wide - own[..., None], split, real)
    found = _gathered(jnp.stack([own, jnp.sum(away * away, axis=-1)]), split, routes)  # [parts, 2, T]
    means, squares, counts = found[:, 0], found[:, 1], counts[:, None]
    mean = jnp.sum(counts * means, axis=0) / width
    return mean, jnp.sum(squares + counts * (means - mean[None]) ** 2, axis=0) / width


def _zero_padding(x: jax.Array, split: Axes, real: np.ndarray | None) -> jax.Array:
    """x [T, .., C.split] with 0 for what is padding."""
    if real is None:
        return x
    mine = jnp.asarray(real, jnp.float32)[lax.axis_index(split) if split else 0]
    return x * mine.reshape(*[1] * (x.ndim - 1), -1)


def _summed(found: jax.Array, split: Axes) -> jax.Array:
    return lax.psum(found, split) if split else found


def _gathered(found: jax.Array, split: Axes, routes: Routes) -> jax.Array:
    """What each device along `split` found, [.., T], on all of them: [parts, .., T]. Rows are filled up to whole lanes: of fewer a TPU's
    compiler makes a sum of arrays of zeros, which has twice the hops."""
    rows = found.shape[-1]
    short = -rows % routes.plan.slice.chip.platform.lanes
    filled = jnp.pad(found, [(0, 0)] * (found.ndim - 1) + [(0, short)]) if short else found
    return lax.all_gather(filled, split)[..., :rows]


def weighted(normed: jax.Array, dtype: jnp.dtype, weights: Params, name: str, axes: Axes, routes: Routes) -> jax.Array:
    """What was normalised, [T, E.axes], with the weight and the bias of a norm, as far as it has them, in `dtype`."""
    by = routes.plan.model.norm
    if by.weighted:
        normed = scaled(normed, embed_vector(weights[name], axes, routes), by, dtype)
    return normed.astype(dtype) + embed_vector(weights[f"{name}_bias"], axes, routes) if by.biased else normed.astype(dtype)


def scaled(normed: jax.Array, weight: jax.Array, by: Norm, dtype: jnp.dtype) -> jax.Array:
    """What was normalised times a norm's weight, or 1 + weight: that in float32, as the models that have it were trained."""
    if by.offset:
        return (normed.astype(jnp.float32) * (by.offset + weight.astype(jnp.float32))).astype(dtype)
    return normed.astype(dtype) * weight


def embed_vector(vector: jax.Array, axes: Axes, routes: Routes) -> jax.Array:
    """The part [1, E.axes] of a whole vector [E]."""
    return take_split(vector, 0, routes.weight_stored, axes, routes.sizes)[None, :]


def activate(hidden: jax.Array, of: FeedForward) -> jax.Array:
    """The FFN's nonlinearity on hidden [T, 2, F] (gate, up) or [T, 1, F] → [T, F]."""
    functions = {
        Activation.SILU: jax.nn.silu,
        Activation.GELU: lambda x: jax.nn.gelu(x, approximate=False),
        Activation.GELU_TANH: jax.nn.gelu,
        Activation.GELU_SIGMOID: lambda x: x * jax.nn.sigmoid(1.702 * x),
        Activation.RELU: jax.nn.relu,
        Activation.RELU2: lambda x: jnp.square(jax.nn.relu(x)),
    }
    gate, up = hidden[:, 0], hidden[:, -1]
    if of.clamp:
        gate, up = jnp.minimum(gate, of.clamp), jnp.clip(up, -of.clamp, of.clamp)
    first = functions[of.activation](gate)
    if not of.gated:
        return first
    return first * (up + of.up_offset if of.up_offset else up)


def capped(x: jax.Array, cap: float) -> jax.Array:
    """c·tanh(x/c), so that nothing is beyond c; x itself where there is no cap."""
    return cap * jnp.tanh(x / cap) if cap else x


ENTERING, LEAVING = ("wq", "wkv", "w_in"), ("wo", "w_out")
"""The matrices before the cores of a layer, and those after them."""


def gather_weights(layer: Params, names: tuple[str, ...], routes: Routes) -> Params:
    """Those of these weights that a layer has, the shards of the phase's gathered axes brought together: F, H and K over f, E over e."""
    names = tuple(name for name in names if name in layer)
    if not routes.phase.gather:
        return {name: layer[name] for name in names}
    heads, kv, hidden = routes.head_digits, routes.kv_digits, routes.hidden_digits
    stored_kv = tuple(axis for axis in kv if axis in routes.ffn_stored)
    used_kv = tuple(axis for axis in kv if axis in routes.ffn)
    where = {  # leaf: digits and positions of its output-like dimension (H, K or F) and of E, and the axes that split the former
        "wq": (heads, 0, 2, routes.ffn_stored, routes.ffn),
        "wkv": (kv, 1, 3, stored_kv, used_kv),
        "wo": (heads, 1, 0, routes.ffn_stored, routes.ffn),
        "w_in": (hidden, 1, 2, routes.ffn_stored, routes.ffn),
        "w_out": (hidden, 1, 0, routes.ffn_stored, routes.ffn),
    }
    gathered = {}
    for name in names:
        digits, row_dim, col_dim, stored, used = where[name]
        source, target = Split(stored, routes.embed_stored), Split(used, routes.embed)
        frame = routes.frame(digits, routes.weight_stored, row_dim, col_dim)
        weights = layer[name]
        if isinstance(weights, Quantized):
            values = move(weights.values, frame, source, target)
            gathered[name] = Quantized(values, _gather_scale(weights, frame, source, target), weights.contracted)
        else:
            gathered[name] = move(weights, frame, source, target)
    return gathered


def _gather_scale(weights: Quantized, frame: Frame, source: Split, target: Split) -> jax.Array:
    """Scales [output dimensions] follow their weight: those of W_O and W_out run over E, the others over H, K or F."""
    if frame.col_dim in weights.contracted_dims:
        return move(weights.scale, frame, Split(source.rows), Split(target.rows))  # the rows stand where they stand in the weight
    only_embed = Frame((), frame.cols, frame.sizes, 1, 0)
    return move(weights.scale, only_embed, Split(cols=source.cols), Split(cols=target.cols))
