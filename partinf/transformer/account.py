"""The second account of a step: the traced program itself, counted.

Tracing a step over an abstract mesh needs no device and allocates nothing, whatever the model's size; its jaxpr holds every collective
with the local shapes. Loops count as often as they run. This module reads programs and knows nothing of layouts or of the cost model,
so that a comparison of the two can fail.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from partinf.partition.sharding import abstract_mesh, whole
from partinf.plans import Bucket, Plan
from partinf.transformer.batch import stacked
from partinf.transformer.params import abstract_params
from partinf.transformer.step import abstract_state, build_step

_KINDS = {
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "psum_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "psum": "all-reduce",
    "psum2": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "ppermute": "collective-permute",
}

_DIMENSION_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "dot_general": lambda params: params["dimension_numbers"],
    "ragged_dot_general": lambda params: params["ragged_dot_dimension_numbers"].dot_dimension_numbers,
}
"""The products that are counted. Of grouped ones every row of the buffer is, taken or not, once; of matrices all groups' are."""

_VIEWS = ("reshape", "transpose", "squeeze")


@dataclass(frozen=True, order=True)
class Collective:
    """One kind of collective in a program.

    Attributes:
        op: all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute.
        axes: mesh axes of size > 1, in mesh order.
        num_bytes: payload of one call on one device: the output of an all-gather, the input of the others.
    """

    op: str
    axes: tuple[str, ...]
    dtype: str
    num_bytes: int


@dataclass(frozen=True, order=True)
class Dot:
    """One size of dot product in a program.

    Attributes:
        num_bytes: of its two operands and its result, as they are multiplied.
        stored_bytes: the same, but an operand that was widened before, and at most reshaped since, counts as it was stored, because
            compilers fuse that.
    """

    flops: int
    num_bytes: int
    stored_bytes: int


@dataclass
class Account:
    """What one step does on one device.

    Attributes:
        collectives: how often each collective runs.
        dots: how often each size of dot product runs.
    """

    collectives: Counter[Collective] = field(default_factory=Counter)
    dots: Counter[Dot] = field(default_factory=Counter)

    @property
    def dot_flops(self) -> int:
        """Two per multiply-add of every dot product."""
        return sum(dot.flops * count for dot, count in self.dots.items())

    @property
    def num_collectives(self) -> int:
        return sum(self.collectives.values())


def trace_account(plan: Plan, bucket: Bucket) -> Account:
    """Count the step of one bucket, traced over the plan's mesh without devices."""
    mesh = abstract_mesh(plan)
    everywhere = whole(mesh)
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), stacked(bucket, plan))
    step = build_step(plan, mesh, bucket, unrolled=False, plain=True)
    jaxpr = jax.make_jaxpr(step)(abstract_params(plan, mesh, False), abstract_state(plan, mesh, False), batch)
    return count(jaxpr.jaxpr, plan.axis_sizes)


def count(jaxpr: Any, sizes: Mapping[str, int]) -> Account:
    """Count a jaxpr whose mesh axes have these sizes.

    Raises:
        ValueError: for a loop whose trip count is not static.
    """
    account = Account()
    _count(jaxpr, 1, sizes, account)
    return account


def _count(jaxpr: Any, times: int, sizes: Mapping[str, int], account: Account) -> None:
    narrow: dict[Any, int] = {}  # bytes per element before a conversion
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "convert_element_type":
            narrow[equation.outvars[0]] = equation.invars[0].aval.dtype.itemsize
        elif name in _VIEWS and equation.invars[0] in narrow:
            narrow[equation.outvars[0]] = narrow[equation.invars[0]]
        if name in _KINDS:
            _count_collective(_KINDS[name], equation, times, sizes, account)
        elif name in _DIMENSION_NUMBERS:
            account.dots[_dot(equation, narrow)] += times
        elif name == "while":
            raise ValueError("a loop without a static trip count cannot be counted")
        for inner, repeats in _inner(equation):
            _count(inner, times * repeats, sizes, account)


def _count_collective(op: str, equation: Any, times: int, sizes: Mapping[str, int], account: Account) -> None:
    named = equation.params.get("axis_name", equation.params.get("axes"))
    used = set(named if isinstance(named, tuple | list) else (named,))
    axes = tuple(axis for axis, size in sizes.items() if axis in used and size > 1)
    if not axes:
        return
    for variable in equation.outvars if op == "all-gather" else equation.invars:
        shape = variable.aval
        payload = math.prod(shape.shape) * shape.dtype.itemsize
        account.collectives[Collective(op, axes, str(shape.dtype), payload)] += times


def _dot(equation: Any, narrow: Mapping[Any, int]) -> Dot:
    (contracting, _), _ = _DIMENSION_NUMBERS[equation.primitive.name](equation.params)
    contracted = math.prod(equation.invars[0].aval.shape[dim] for dim in contracting)
    num_bytes = stored_bytes = 0
    for variable in (*equation.invars[:2], *equation.outvars):
        size, itemsize = math.prod(variable.aval.shape), variable.aval.dtype.itemsize
        num_bytes += size * itemsize
        stored_bytes += size * min(itemsize, narrow.get(variable, itemsize))
    return Dot(2 * contracted * math.prod(equation.outvars[0].aval.shape), num_bytes, stored_bytes)


def _inner(equation: Any) -> Iterator[tuple[Any, int]]:
    """The jaxprs inside an equation and how often each runs."""
    repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner, repeats
