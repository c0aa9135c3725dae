"""Leaves of a parameter tree by readable path, such as `layers/0/wq`: the key under which checkpoints are compared and reported."""

from __future__ import annotations

from typing import Any

import jax


def by_path(tree: Any) -> dict[str, Any]:
    """Path → leaf, in the order in which jax flattens the tree."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def shapes_by_path(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path → shape."""
    return {path: tuple(leaf.shape) for path, leaf in by_path(tree).items()}
