"""The mixture of experts, written once for every role assignment.

With t the axes that split tokens in the dense layers of the phase, X, f and e those that still split the experts, F and E of their
matrices after gathering, and τ all that split none of these (nor layers):

    1. [T.t, E.w] → all-gather of rows over t∖τ, slice over τ∖t, all-gather of E        h [T.τ, E]
    2. the router, in float32, the same on all devices along X, f and e                 experts [T.τ, k], weights [T.τ, k]
    3. rows of the experts held, sorted by expert, R = T.τ · min(k, X.X) places         rows [R, E.e], sizes [X.X]
    4. rows · W_in                                                                      [R, 2, F.f] {e unreduced}
       reduce-scatter over e into F, bias, activation, all-gather over e                [R, F.f]
    5. · W_out, bias, times the weights, added up by token                              [T.τ, E.e] {Xf unreduced}
    6. reduce-scatter of rows over t∖τ, of E over what splits it between sublayers      [T.t, E.w]

Where the phase exchanges rows, along the axes D = t ∩ X, these are no axes of X in the steps above but of τ, with W ways:

    2b. all-gather over D of the routes, experts and the bits of weights side by side   [W·T.τ, 2k] int32
        rows to the devices that hold one of their experts (all-to-all of [W, T.τ, E.e])
                                                                                        [W·T.τ, E.e]
    3. to 5. with the rows that arrived                                                 [W·T.τ, E.e] {X∖D, f unreduced}
    5b. the same way back to where they came from, and added up there                   [T.τ, E.e] {X∖D, f unreduced}

Rows move as one array, decode lanes before prompt tokens, in any order: they come back where they were. Step 6 is one `move` where E.e and
E.w are digits of one order (`ExpertAxes.in_order`); elsewhere E is made whole there and sliced, for experts' E is stored in runs of e's
own order. What is added up joins the partial sums of a product with W_out or W_O next to it where both are split alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from partinf.hardware.platform import Grouped
from partinf.model.kinds import Experts
from partinf.partition.collectives import Split, move, take_split
from partinf.partition.quantize import Quantized
from partinf.transformer.dispatch import Routed, sent
from partinf.transformer.ffn import activated
from partinf.transformer.grouped import Sorted, added_up, grouped_dot, sorted_by_expert
from partinf.transformer.linear import made_for
from partinf.transformer.params import OneOf, Params
from partinf.transformer.router import routed
from partinf.transformer.routes import Routes

MATRICES = ("wx_in", "wx_out", "bx_in", "bx_out")
"""What is split as experts are: `gather_experts` brings it together."""


@dataclass(frozen=True)
class Partial:
    """What is still to be reduced: [rows, E] and how both are split."""

    array: jax.Array
    split: Split


def gathered_rows(normed: jax.Array, routes: Routes) -> jax.Array:
    """What experts read: [T.t, E.between] → [T.τ, E]."""
    axes = routes.experts
    frame = routes.frame(axes.rows, routes.weight_stored)
    return move(normed, frame, Split(routes.tokens, routes.between), Split(axes.tokens))


def shares_gather(routes: Routes) -> bool:
    """Whether what experts read is what the dense matrices next to them read: [T.t, E]."""
    frame = routes.frame(routes.experts.rows, routes.weight_stored)
    return routes.phase.loop is None and frame.same(Split(routes.experts.tokens), Split(routes.tokens, routes.embed))


def experts(weights: Params, hidden: jax.Array, of: Experts, routes: Routes) -> Partial:
    """Rows [T.τ, E] through their experts: [T.τ, E.e] {Xf unreduced}, in the type of the rows.

    Args:
        weights: of the layer, the experts' gathered already (`gather_experts`).
    """
    axes = routes.experts
    chosen, by = routed(weights, hidden, of)
    hidden = take_split(hidden, 1, axes.embed_stored, axes.embed, routes.sizes)  # [T.τ, E.e]
    here, back = sent(Routed(hidden, chosen, by), of.count, routes)
    rows = sorted_by_expert(_held(here.experts, of, routes), of.count // routes.ways(axes.experts), whole=not axes.experts)
    copies = here.rows.at[rows.token].get(mode="promise_in_bounds", wrap_negative_indices=False)
    out = _through(weights, copies, rows, of, routes)
    added = back(added_up(out, here.weights, rows, made_for(routes)).astype(hidden.dtype))
    return Partial(added, Split(axes.tokens, axes.embed, tuple(a for a in axes.experts if a not in axes.exchanged) + axes.ffn))


def _held(chosen: jax.Array, of: Experts, routes: Routes) -> jax.Array:
    """The numbers of experts among those that this device holds; as many as these for the others, and for what is no expert."""
    axes, rest = routes.experts, of.count
    if not axes.experts_stored:
        return chosen
    here, local = chosen < of.count, jnp.zeros_like(chosen)
    for axis in axes.experts_stored:
        size = routes.sizes[axis]
        rest //= size
        digit = chosen // rest % size
        if axis in axes.experts:
            here &= digit == lax.axis_index(axis)
        else:
            local = local * size + digit
    return jnp.where(here, local * rest + chosen % rest, of.count // routes.ways(axes.experts))


def _through(weights: Params, x: jax.Array, rows: Sorted, of: Experts, routes: Routes) -> jax.Array:
    """Rows [R, E.e] through their expert: [R, E.e] {f unreduced}."""
    axes, each, platform = routes.experts, of.each, made_for(routes)
    hidden = grouped_dot(x, weights["wx_in"], rows, x.dtype, platform, "experts_in")  # [R, 2, F.f] {e unreduced}
    frame, digits = routes.frame((), axes.hidden, 0, 2), axes.ffn + axes.embed
    hidden = move(hidden, frame, Split((), axes.ffn, axes.embed), Split((), digits))  # [R, 2, F.fe]
    if "bx_in" in weights:
        bias = take_split(weights["bx_in"], 2, tuple(a for a in axes.hidden if a not in axes.ffn), axes.embed, routes.sizes)
        hidden = hidden + bias[rows.expert]
    hidden = activated(hidden, each, routes)  # [R, F.fe]
    hidden = move(hidden, routes.frame((), axes.hidden), Split((), digits), Split((), axes.ffn))  # [R, F.f]
    biased = "bx_out" in weights
    out = grouped_dot(hidden, weights["wx_out"], rows, jnp.float32 if biased else x.dtype, platform, "experts_out")
    if biased:
        out = out + jnp.where(_first_along(axes.ffn, routes), weights["bx_out"], 0).astype(jnp.float32)[rows.expert]
    return out.astype(x.dtype)


def _first_along(axes: tuple[str, ...], routes: Routes) -> jax.Array:
    """Whether this device is the first along these axes: the one that adds what is added once."""
    first = jnp.asarray(True)
    for axis in axes:
        if routes.sizes[axis] > 1:
            first &= lax.axis_index(axis) == 0
    return first


def reduced(partial: Partial, routes: Routes) -> jax.Array:
    """What experts added up, as the residual is split: [T.t, E.between]."""
    axes, wanted = routes.experts, Split(routes.tokens, routes.between)
    if axes.in_order:
        return move(partial.array, routes.frame(axes.rows, axes.embed_digits), partial.split, wanted)
    whole = Split(routes.tokens)
    added = move(partial.array, routes.frame(axes.rows, axes.embed_digits), partial.split, whole)
    return move(added, routes.frame(axes.rows, routes.weight_stored), whole, wanted)


def joins(partial: Partial, source: Split, routes: Routes) -> bool:
    """Whether it can be added to partial sums that are split as `source`, rows in the order of the dense layers, and reduced with them."""
    frame = routes.frame(routes.experts.rows, routes.experts.embed_digits)
    return routes.experts.in_order and frame.same(partial.split, source)


def left_stacked(routes: Routes) -> tuple[str, ...]:
    """The matrices of `MATRICES` that products read where they lie among those of all layers: a slice would copy them."""
    platform = made_for(routes)
    stacked = platform is not None and platform.grouped is Grouped.TPU_KERNEL and not routes.phase.gather_experts
    return ("wx_in", "wx_out") if stacked else ()


def gather_experts(layer: Params, routes: Routes) -> Params:
    """What a layer has of `MATRICES` with the shards of the axes that the phase gathers experts over brought together: d_ff and d_model of
    each expert, then experts."""
    return {name: _gathered(layer[name], name, routes) for name in MATRICES if name in layer}


def _gathered(weights: jax.Array | Quantized | OneOf, name: str, routes: Routes) -> jax.Array | Quantized | OneOf:
    if not routes.phase.gather_experts:
        return weights
    dims = {"wx_in": (2, 3), "wx_out": (2, 1), "bx_in": (2, None), "bx_out": (None, 1)}[name]  # of F and E
    if not isinstance(weights, Quantized):
        return _gathered_array(weights, *dims, routes)
    ffn, embed = dims
    scale = _gathered_array(
        weights.scale, None if ffn in weights.contracted_dims else ffn, None if embed in weights.contracted_dims else embed, routes
    )
    return Quantized(_gathered_array(weights.values, ffn, embed, routes), scale, weights.contracted)


def _gathered_array(x: jax.Array, ffn: int | None, embed: int | None, routes: Routes) -> jax.Array:
    """An array [X.x, ..] whose dimensions `ffn` and `embed` are split as those of the matrices."""
    axes = routes.experts
    for dim, stored, kept in (
        (ffn, axes.ffn_stored, axes.ffn),
        (embed, axes.embed_stored, axes.embed),
        (0, axes.experts_stored, axes.experts),
    ):
        if dim is not None:
            x = move(x, routes.frame(stored, (), dim, dim), Split(stored), Split(kept))
    return x
