"""Parameters: each weight is declared once; shapes, shardings, bytes and initial values are derived from the declaration.

Weights are stored [out, in], as Hugging Face stores them: skinny products read such rows two to three times faster on CPU, and a
TPU chooses its own tiling. Two matrices that see the same input are one array, so that they share a matmul and a collective.
The tree is a plain dict; `layers` is one dict of arrays stacked on a leading layer dimension (a scan runs over it), or a tuple with
one dict per layer (unrolled, faster on CPU).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from partinf.errors import InvalidInput
from partinf.model_config import Block, ModelConfig, Norm, Position
from partinf.plan import Plan
from partinf.sharding import letter_axes, sharding
from partinf.workload import DType

Params = dict[str, Any]


@dataclass(frozen=True)
class Declared:
    """One weight: its shape, the letter of each dimension (`.` is never split), and its initial values.

    Attributes:
        fan_in: normally distributed with deviation fan_in^-1/2; 0 for the constant `fill`.
    """

    shape: tuple[int, ...]
    letters: str
    fan_in: int = 0
    fill: float = 1.0


def declare_layer(model: ModelConfig) -> dict[str, Declared]:
    """The weights of one layer. Vectors (norms and biases) are whole on every device: they are small, and slicing them is free."""
    embed, ffn, heads, kv_heads, head = model.embed_dim, model.ffn_dim, model.num_heads, model.num_kv_heads, model.head_dim
    inner = 2 if model.gated else 1
    layer = {
        "wq": Declared((heads, head, embed), "H.E", embed),
        "wkv": Declared((2, kv_heads, head, embed), ".K.E", embed),  # keys, values
        "wo": Declared((embed, heads, head), "EH.", heads * head),
        "w_in": Declared((inner, ffn, embed), ".FE", embed),  # gate and up, or one matrix
        "w_out": Declared((embed, ffn), "EF", ffn),
    }
    layer |= _declare_norm("attention_norm", model)
    if model.block is Block.SERIAL:
        layer |= _declare_norm("ffn_norm", model)
    if model.qk_norm:
        layer |= {"q_norm": Declared((head,), "."), "k_norm": Declared((head,), ".")}
    if model.biases:
        shapes = {"bq": (heads, head), "bkv": (2, kv_heads, head), "bo": (embed,), "b_in": (inner, ffn), "b_out": (embed,)}
        layer |= {name: Declared(shape, "." * len(shape), fill=0.0) for name, shape in shapes.items()}
    return layer


def _declare_norm(name: str, model: ModelConfig) -> dict[str, Declared]:
    found = {name: Declared((model.embed_dim,), ".")}
    if model.norm is Norm.LAYER:
        found[f"{name}_bias"] = Declared((model.embed_dim,), ".", fill=0.0)
    return found


def declare(model: ModelConfig, unrolled: bool) -> Params:
    """The tree of declarations of a whole model."""
    layer = declare_layer(model)
    layers: Any = tuple(dict(layer) for _ in range(model.num_layers))
    if not unrolled:
        layers = {name: replace(d, shape=(model.num_layers, *d.shape), letters="." + d.letters) for name, d in layer.items()}
    table = Declared((model.padded_vocab_size, model.embed_dim), ".D", model.embed_dim)
    tree: Params = {"embed": table, "layers": layers, **_declare_norm("final_norm", model)}
    if not model.tied_embeddings:
        tree["unembed"] = table
    if model.position is Position.LEARNED:
        tree["positions"] = Declared((model.max_len, model.embed_dim), ".D", model.embed_dim)
    return tree


def param_dtype(plan: Plan) -> jnp.dtype:
    """The type in which weights and activations are computed.

    Raises:
        InvalidInput: for a storage type that can be planned but not run.
    """
    types = {DType.BF16: jnp.bfloat16, DType.F32: jnp.float32}
    if plan.weights not in types:
        raise InvalidInput(f"{plan.weights} weights can be planned but not run yet; runnable: {', '.join(types)}")
    return jnp.dtype(types[plan.weights])


def abstract_params(plan: Plan, mesh: Mesh | AbstractMesh, unrolled: bool) -> Params:
    """The tree as `jax.ShapeDtypeStruct`s with shardings: what loaders, checkpoints and the compiler take."""
    dtype = param_dtype(plan)
    return _map(lambda d: jax.ShapeDtypeStruct(d.shape, dtype, sharding=sharding(plan, mesh, d.letters)), declare(plan.model, unrolled))


def random_params(plan: Plan, mesh: Mesh, unrolled: bool, seed: int = 0) -> Params:
    """Random weights of the right scale, made on the devices that hold them; the same on every mesh."""
    dtype = param_dtype(plan)
    leaves, tree = jax.tree.flatten(declare(plan.model, unrolled), is_leaf=lambda x: isinstance(x, Declared))

    def make() -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        return [_initial(d, key, dtype) for d, key in zip(leaves, keys, strict=True)]

    targets = [sharding(plan, mesh, d.letters) for d in leaves]
    return jax.tree.unflatten(tree, jax.jit(make, out_shardings=targets)())


def params_bytes_per_device(plan: Plan) -> int:
    """Bytes of parameters that one device holds."""
    axes, sizes, itemsize = letter_axes(plan), plan.axis_sizes, param_dtype(plan).itemsize
    total = 0
    for d in jax.tree.leaves(declare(plan.model, unrolled=False), is_leaf=lambda x: isinstance(x, Declared)):
        ways = math.prod(sizes[axis] for letter in d.letters for axis in axes.get(letter, ()))
        total += math.prod(d.shape) * itemsize // ways
    return total


def _initial(d: Declared, key: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if d.fan_in == 0:
        return jnp.full(d.shape, d.fill, dtype)
    return (jax.random.normal(key, d.shape, jnp.float32) * d.fan_in**-0.5).astype(dtype)


def _map(function: Callable[[Declared], Any], tree: Params) -> Params:
    return jax.tree.map(function, tree, is_leaf=lambda x: isinstance(x, Declared))
