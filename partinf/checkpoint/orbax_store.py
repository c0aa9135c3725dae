"""Parameters in an orbax checkpoint, restored into any mesh.

The checkpoint keeps whole arrays by path; the shardings of the tree that is requested decide what each host reads. This module adds what
orbax leaves out: the comparison of the stored tree with the wanted one before anything is restored, all differences at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from partinf.checkpoint.offences import compare_shapes
from partinf.checkpoint.tree_paths import shapes_by_path
from partinf.foundation.errors import InvalidInput, raise_offences


def save(params: Any, path: str | Path) -> None:
    """Write a tree of arrays and return when it is on disk. Every host of a multi-host mesh calls it.

    Raises:
        InvalidInput: where `path` exists.
    """
    path = Path(path).resolve()
    if path.exists():
        raise InvalidInput(f"{path}: exists; expected the name of a new checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params)
        checkpointer.wait_until_finished()


def stored_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Shape of every stored array by its path, such as `layers/0/wq`, without reading the arrays.

    Raises:
        InvalidInput: where `path` is no orbax checkpoint.
    """
    path = Path(path).resolve()
    if not path.is_dir():
        raise InvalidInput(f"{path}: no such directory; expected an orbax checkpoint")
    if not (path / "_METADATA").is_file():
        present = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise InvalidInput(f"{path}: no orbax checkpoint of a tree: found {present}; expected _METADATA among the files")
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            tree = checkpointer.metadata(path).item_metadata.tree
        except (ValueError, KeyError, OSError) as error:
            raise InvalidInput(f"{path}: the checkpoint's metadata cannot be read ({error})") from error
    return shapes_by_path(tree)


def restore(path: str | Path, abstract_params: Any) -> Any:
    """The stored tree as arrays of the wanted shardings, orders in memory and types, whatever mesh it was saved from.

    Args:
        path: What `save` wrote.
        abstract_params: Tree of `jax.ShapeDtypeStruct` with sharding.

    Raises:
        InvalidInput: no checkpoint there, or every leaf that is missing, surplus or of another shape.
    """
    path = Path(path).resolve()
    raise_offences(compare_shapes(stored_shapes(path), shapes_by_path(abstract_params), f"the checkpoint {path.name}", "the model"))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path, abstract_params)
    in_order = lambda array, leaf: array if leaf.format.layout is None else jax.device_put(array, leaf.format)  # noqa: E731
    return jax.tree.map(in_order, restored, abstract_params)
