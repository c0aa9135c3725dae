"""Parameters on devices: shapes, shardings and initial values, derived from the declarations of `partinf.model.weights`.

The tree is a plain dict; `layers` is one dict of arrays stacked on a leading layer dimension (a scan runs over it), or a tuple with
one dict per layer (unrolled, faster on CPU). Where layers differ in their weights, those with the same are stacked together: `layers` is a
dict of such dicts, by `group_name`. A pipeline stage has of each group as many as every other one, in the order of its layers.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from partinf.foundation.errors import InvalidInput
from partinf.hardware.platform import lies_turned
from partinf.model.config import ModelConfig
from partinf.model.weights import Declared, declare_ends, declare_layers, group_name, held_bytes
from partinf.partition.quantize import Quantized, quantize
from partinf.partition.sharding import in_order, sharding
from partinf.plans import Plan
from partinf.workload import DType

Params = dict[str, Any]

_TYPES = {DType.F32: jnp.float32, DType.BF16: jnp.bfloat16}


@dataclass(frozen=True)
class OneOf:
    """One layer of a stacked weight, not sliced yet: code that needs only a part of it takes that part in the same slice."""

    layers: Any
    index: Any


def declare(model: ModelConfig, unrolled: bool) -> Params:
    """The tree of declarations of a whole model."""
    groups = declare_layers(model)
    of_kind = {kind: group.weights for group in groups for kind in group.kinds}
    layers: Any = tuple(dict(of_kind[kind]) for kind in model.kind_of_layers)
    if not unrolled:
        stacks = [{name: _stacked(d, group.count) for name, d in group.weights.items()} for group in groups]
        layers = stacks[0] if len(stacks) == 1 else {group_name(number): stack for number, stack in enumerate(stacks)}
    return {**declare_ends(model), "layers": layers}


def _stacked(d: Declared, count: int) -> Declared:
    return replace(d, shape=(count, *d.shape), letters="N" + d.letters)


class Stacks:
    """Stacked layers by the number of a layer and its kind.

    Attributes:
        num_groups: of layers with the same weights.
    """

    def __init__(self, layers: Params, model: ModelConfig) -> None:
        """
        Args:
            layers: of the parameter tree, all or those of one pipeline stage. model: with as many layers.
        """
        groups = declare_layers(model)
        self.num_groups = len(groups)
        self._group_of_kind = {kind: number for number, group in enumerate(groups) for kind in group.kinds}
        self._stacks = [layers] if len(groups) == 1 else [layers[group_name(number)] for number in range(len(groups))]
        before, self._place = Counter[int](), []  # of every layer, the layers of its group before it
        for kind in model.kind_of_layers:
            self._place.append(before[self._group_of_kind[kind]])
            before[self._group_of_kind[kind]] += 1

    def layer(self, index: Any, kind: int) -> tuple[Params, Any]:
        """The stack that layer `index` of this kind lies in, and its place there."""
        stack = self._stacks[self._group_of_kind[kind]]
        if self.num_groups == 1:
            return stack, index
        return stack, self._place[index] if isinstance(index, int) else jnp.asarray(self._place)[index]


def activation_dtype(plan: Plan) -> jnp.dtype:
    """The type of activations, norms and biases, and of weights that are not quantised."""
    return jnp.dtype(_TYPES[plan.weights.activations])


def runnable_model(plan: Plan) -> ModelConfig:
    """The architecture as it is stored and computed, with its padded heads.

    Raises:
        InvalidInput: a plan that cannot be run.
    """
    if plan.runnable is not None:
        raise InvalidInput(f"model {plan.model.name} can be planned but not run yet on {plan.slice.name}: {plan.runnable}")
    return plan.padded_model


def abstract_params(plan: Plan, mesh: Mesh | AbstractMesh, unrolled: bool) -> Params:
    """The tree as `jax.ShapeDtypeStruct`s with shardings: what loaders, checkpoints and the compiler take. Matrices of experts that a
    kernel reads where they lie have the order of their dimensions in memory too (`Platform.pins`).

    Raises:
        InvalidInput: a plan that cannot be run, or separate layers where stages split them.
    """
    if unrolled and plan.num_stages > 1:
        raise InvalidInput(f"{plan.num_stages} stages hold their layers stacked, so that one program runs on all: unrolled=False")
    dtype = activation_dtype(plan)

    def matrix(d: Declared, kind: Any) -> jax.ShapeDtypeStruct:
        placed = sharding(plan, mesh, d.letters)
        turned = _turned(d, plan)
        return jax.ShapeDtypeStruct(d.shape, kind, sharding=placed if turned is None else in_order(placed, d.shape, turned))

    def leaf(d: Declared) -> Any:
        if not d.quantized(plan.weights):
            return matrix(d, jnp.float32 if d.wide else dtype)
        scale = jax.ShapeDtypeStruct(d.scale_shape(), jnp.float32, sharding=sharding(plan, mesh, d.scale_letters()))
        return Quantized(matrix(d, jnp.int8), scale, d.contracted)

    return jax.tree.map(leaf, declare(runnable_model(plan), unrolled), is_leaf=lambda x: isinstance(x, Declared))


def _turned(d: Declared, plan: Plan) -> bool | None:
    """Whether matrices of experts lie turned on a device; None for weights whose order in memory is the compiler's choice."""
    if not d.by_groups:
        return None
    outputs, inputs = (d.shape[dim] // plan.ways(plan.letter_axes.get(d.letters[dim], ())) for dim in (-2, -1))
    each = math.prod(d.shape[d.letters.index("X") + 1 : -2])
    return lies_turned(outputs, inputs) if plan.slice.chip.platform.pins(each, outputs, inputs) else None


def random_params(plan: Plan, mesh: Mesh, unrolled: bool, seed: int = 0) -> Params:
    """Random weights of the right scale, made on the devices that hold them; the same on every mesh."""
    leaves, tree = jax.tree.flatten(declare(runnable_model(plan), unrolled), is_leaf=lambda x: isinstance(x, Declared))

    def make() -> Params:
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        return jax.tree.unflatten(tree, [_initial(plan, d, key) for d, key in zip(leaves, keys, strict=True)])

    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.format, abstract_params(plan, mesh, unrolled)))()


def params_bytes_per_device(plan: Plan) -> int:
    """Bytes of parameters that one device holds."""
    ways = {letter: plan.ways(axes) for letter, axes in plan.letter_axes.items()}
    return held_bytes(runnable_model(plan), ways, plan.weights, plan.slice.chip.platform.held_entries)


def _initial(plan: Plan, d: Declared, key: jax.Array) -> Any:
    dtype = jnp.float32 if d.wide else activation_dtype(plan)
    if d.fill is not None:
        return jnp.full(d.shape, d.fill, dtype)
    fan_in = math.prod(d.shape[dim] for dim in d.contracted or (-1,))
    weights = jax.random.normal(key, d.shape, jnp.float32) * fan_in**-0.5
    return quantize(weights, d.contracted) if d.quantized(plan.weights) else weights.astype(dtype)
