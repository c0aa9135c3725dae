"""What the checkpoint tests share: the fixture directories, small meshes, and parameter trees as a plan would declare them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from partinf.checkpoint.hf_names import leaf_sources
from partinf.model.config import ModelConfig

# Every dimension that a layout may split is split somewhere: heads, head size, d_model, d_ff and the vocabulary.
SPECS = {
    "embed": (None, ("x", "y")),
    "unembed": ("y", "x"),
    "final_norm": ("x",),
    "attention_norm": (None,),
    "wq": ("y", None, "x"),
    "wkv": (None, "y", "x", None),
    "wo": ("x", "y"),
    "ffn_norm": ("y",),
    "w_in": (None, "y", "x"),
    "w_out": ("x", "y"),
    # GPT-2's and OPT's, and Qwen 3's norms of the heads.
    "positions": ("y", "x"),
    "final_norm_bias": ("x",),
    "attention_norm_bias": (None,),
    "ffn_norm_bias": ("y",),
    "bq": ("y", None),
    "bkv": (None, "y", "x"),
    "bo": ("x",),
    "b_in": (None, "y"),
    "b_out": ("y",),
    "q_norm": (None,),
    "k_norm": ("x",),
}


def make_mesh(rows: int, columns: int) -> Mesh:
    return jax.make_mesh((rows, columns), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def all_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a directory, whole: the plain twin of the sliced reader."""
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def nested(leaves: dict[str, Any]) -> Any:
    """A parameter tree from path → leaf; keys that count become a tuple."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        place = tree
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = leaf
    if "0" in tree.get("layers", {}):
        tree["layers"] = tuple(tree["layers"][str(number)] for number in range(len(tree["layers"])))
    return tree


def _divides(mesh: Mesh, axis: str | tuple[str, ...] | None, size: int) -> bool:
    return axis is not None and size % math.prod(mesh.shape[name] for name in axis) == 0


def abstract_tree(config: ModelConfig, mesh: Mesh, *, stacked: bool = False, dtype: Any = jnp.float32, specs: Any = SPECS) -> Any:
    """ShapeDtypeStructs with shardings; a dimension that its axis does not divide, and that of stacked layers, is not split."""

    def leaf(path: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        lead = (None,) if stacked and path.startswith("layers/") else ()
        axes = (*lead, *specs.get(path.split("/")[-1], ()))
        fitting = [axis if _divides(mesh, axis, size) else None for axis, size in zip(axes, shape, strict=False)]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*fitting)))

    return nested({path: leaf(path, source.leaf_shape) for path, source in leaf_sources(config, stacked).items()})


def random_params(config: ModelConfig, *, stacked: bool = False) -> Any:
    """A tree of distinct float32 numbers with a zero padding of the vocabulary, on one device."""
    generator = np.random.default_rng(0)
    leaves = {}
    for path, source in leaf_sources(config, stacked).items():
        leaf = generator.standard_normal(source.leaf_shape).astype(np.float32)
        if path in ("embed", "unembed", "unembed_bias"):
            leaf[config.vocab_size :] = 0
        leaves[path] = jnp.asarray(leaf)
    return nested(leaves)


def assert_same(found: Any, expected: Any) -> None:
    """Equal structure, shapes, types and every number; a failure names the leaf."""
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(expected))
