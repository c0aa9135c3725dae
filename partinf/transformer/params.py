"""Parameters: each weight is declared once; shapes, shardings, bytes and initial values are derived from the declaration.

Weights are stored [out, in], as Hugging Face stores them: skinny products read such rows two to three times faster on CPU, and a
TPU chooses its own tiling. Two matrices that see the same input are one array, so that they share a matmul and a collective.
The tree is a plain dict; `layers` is one dict of arrays stacked on a leading layer dimension (a scan runs over it), or a tuple with
one dict per layer (unrolled, faster on CPU).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from partinf.errors import InvalidInput
from partinf.model.config import Block, ModelConfig, Norm, Position
from partinf.partition.quantize import Quantized, quantize
from partinf.partition.sharding import letter_axes, platform_of, sharding
from partinf.plans import Plan
from partinf.workload import DType

Params = dict[str, Any]


@dataclass(frozen=True)
class OneOf:
    """One layer of a stacked weight, not sliced yet: whoever needs only a part of it takes that part in the same slice."""

    layers: Any
    index: Any


@dataclass(frozen=True)
class Declared:
    """One weight: its shape, the letter of each dimension (`.` is never split), and its initial values: the constant `fill`, or normally
    distributed with deviation 1/√(size of the contraction).

    Attributes:
        contracted: dimensions over which a layer's product with this weight sums, counted from the end; none for vectors and tables,
            which are never quantised.
    """

    shape: tuple[int, ...]
    letters: str
    contracted: tuple[int, ...] = ()
    fill: float | None = None

    def scale_letters(self) -> str:
        return "".join(letter for dim, letter in enumerate(self.letters) if dim - len(self.letters) not in self.contracted)

    def scale_shape(self) -> tuple[int, ...]:
        return tuple(size for dim, size in enumerate(self.shape) if dim - len(self.shape) not in self.contracted)


def declare_layer(model: ModelConfig) -> dict[str, Declared]:
    """The weights of one layer. Vectors (norms and biases) are whole on every device: they are small, and slicing them is free."""
    embed, ffn, heads, kv_heads, head = model.embed_dim, model.ffn_dim, model.num_heads, model.num_kv_heads, model.head_dim
    inner = 2 if model.gated else 1
    layer = {
        "wq": Declared((heads, head, embed), "H.E", (-1,)),
        "wkv": Declared((2, kv_heads, head, embed), ".K.E", (-1,)),  # keys, values
        "wo": Declared((embed, heads * head), "EH", (-1,)),  # one dimension: a TPU would tile few local heads badly
        "w_in": Declared((inner, ffn, embed), ".FE", (-1,)),  # gate and up, or one matrix
        "w_out": Declared((embed, ffn), "EF", (-1,)),
    }
    layer |= _declare_norm("attention_norm", model)
    if model.block is Block.SERIAL:
        layer |= _declare_norm("ffn_norm", model)
    if model.qk_norm:
        layer |= {"q_norm": Declared((head,), ".", fill=1.0), "k_norm": Declared((head,), ".", fill=1.0)}
    if model.biases:
        shapes = {"bq": (heads, head), "bkv": (2, kv_heads, head), "bo": (embed,), "b_in": (inner, ffn), "b_out": (embed,)}
        layer |= {name: Declared(shape, "." * len(shape), fill=0.0) for name, shape in shapes.items()}
    return layer


def _declare_norm(name: str, model: ModelConfig) -> dict[str, Declared]:
    found = {name: Declared((model.embed_dim,), ".", fill=1.0)}
    if model.norm is Norm.LAYER:
        found[f"{name}_bias"] = Declared((model.embed_dim,), ".", fill=0.0)
    return found


def declare(model: ModelConfig, unrolled: bool) -> Params:
    """The tree of declarations of a whole model."""
    layer = declare_layer(model)
    layers: Any = tuple(dict(layer) for _ in range(model.num_layers))
    if not unrolled:
        layers = {name: replace(d, shape=(model.num_layers, *d.shape), letters="N" + d.letters) for name, d in layer.items()}
    table = Declared((model.padded_vocab_size, model.embed_dim), ".D")  # never quantised: logits are what int8 would hurt most
    tree: Params = {"embed": table, "layers": layers, **_declare_norm("final_norm", model)}
    if not model.tied_embeddings:
        tree["unembed"] = table
    if model.position is Position.LEARNED:
        tree["positions"] = Declared((model.max_len, model.embed_dim), ".D")
    return tree


def activation_dtype(plan: Plan) -> jnp.dtype:
    """The type of activations, norms and biases, and of weights that are not quantised."""
    return jnp.dtype(jnp.float32 if plan.weights is DType.F32 else jnp.bfloat16)


def runnable_model(plan: Plan) -> ModelConfig:
    """The architecture as it is stored and computed, with its padded heads.

    Raises:
        InvalidInput: a plan that cannot be run.
    """
    if plan.runnable is not None:
        raise InvalidInput(f"model {plan.model.name} can be planned but not run yet on {plan.slice.name}: {plan.runnable}")
    return plan.padded_model


def abstract_params(plan: Plan, mesh: Mesh | AbstractMesh, unrolled: bool) -> Params:
    """The tree as `jax.ShapeDtypeStruct`s with shardings: what loaders, checkpoints and the compiler take.

    Raises:
        InvalidInput: a plan that cannot be run, or separate layers where stages split them.
    """
    if unrolled and plan.num_stages > 1:
        raise InvalidInput(f"{plan.num_stages} stages hold their layers stacked, so that one program runs on all: unrolled=False")
    dtype = activation_dtype(plan)

    def leaf(d: Declared) -> Any:
        def array(shape: tuple[int, ...], kind: Any, letters: str) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, kind, sharding=sharding(plan, mesh, letters))

        if not _is_quantized(plan, d):
            return array(d.shape, dtype, d.letters)
        return Quantized(array(d.shape, jnp.int8, d.letters), array(d.scale_shape(), jnp.float32, d.scale_letters()), d.contracted)

    return jax.tree.map(leaf, declare(runnable_model(plan), unrolled), is_leaf=lambda x: isinstance(x, Declared))


def prefers_unrolled(plan: Plan, mesh: Mesh) -> bool:
    """Whether layers are compiled one by one, as these devices prefer. Stages share one program, so theirs are stacked."""
    return platform_of(mesh).unrolled and plan.num_stages == 1


def random_params(plan: Plan, mesh: Mesh, unrolled: bool, seed: int = 0) -> Params:
    """Random weights of the right scale, made on the devices that hold them; the same on every mesh."""
    leaves, tree = jax.tree.flatten(declare(runnable_model(plan), unrolled), is_leaf=lambda x: isinstance(x, Declared))

    def make() -> Params:
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        return jax.tree.unflatten(tree, [_initial(plan, d, key) for d, key in zip(leaves, keys, strict=True)])

    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract_params(plan, mesh, unrolled)))()


def params_bytes_per_device(plan: Plan) -> int:
    """Bytes of parameters that one device holds."""
    axes, sizes, itemsize = letter_axes(plan), plan.axis_sizes, activation_dtype(plan).itemsize

    def held(shape: tuple[int, ...], letters: str) -> int:
        return math.prod(shape) // math.prod(sizes[axis] for letter in letters for axis in axes.get(letter, ()))

    total = 0
    for d in jax.tree.leaves(declare(runnable_model(plan), unrolled=False), is_leaf=lambda x: isinstance(x, Declared)):
        if _is_quantized(plan, d):
            total += held(d.shape, d.letters) + 4 * held(d.scale_shape(), d.scale_letters())
        else:
            total += held(d.shape, d.letters) * itemsize
    return total


def _is_quantized(plan: Plan, d: Declared) -> bool:
    return plan.weights is DType.INT8 and bool(d.contracted)


def _initial(plan: Plan, d: Declared, key: jax.Array) -> Any:
    dtype = activation_dtype(plan)
    if d.fill is not None:
        return jnp.full(d.shape, d.fill, dtype)
    fan_in = math.prod(d.shape[dim] for dim in d.contracted or (-1,))
    weights = jax.random.normal(key, d.shape, jnp.float32) * fan_in**-0.5
    return quantize(weights, d.contracted) if _is_quantized(plan, d) else weights.astype(dtype)
