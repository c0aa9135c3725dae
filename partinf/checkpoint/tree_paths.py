"""Leaves of a parameter tree by readable path, such as `layers/0/wq`: the key under which checkpoints are compared and reported."""

from __future__ import annotations

from typing import Any

import jax

from partinf.partition.quantize import Quantized


def by_path(tree: Any, quantized_whole: bool = False) -> dict[str, Any]:
    """Path → leaf, in the order in which jax flattens the tree.

    Args:
        quantized_whole: take a quantised weight as one leaf instead of as its values and scales.
    """
    is_leaf = (lambda x: isinstance(x, Quantized)) if quantized_whole else None
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def shapes_by_path(tree: Any, quantized_whole: bool = False) -> dict[str, tuple[int, ...]]:
    """Path → shape."""
    return {path: tuple(leaf.shape) for path, leaf in by_path(tree, quantized_whole).items()}
