"""Parameters as a Flax (nnx) state, and back.

The conversion is by name alone. A state has the paths of the parameter tree, with integer keys where the tree has a sequence:

    params["embed"]             ↔  state["embed"]             the attribute `embed` of the module
    params["layers"][0]["wq"]   ↔  state["layers"][0]["wq"]   `layers[0].wq`, layers being an `nnx.List`
    params["layers"]["wq"]      ↔  state["layers"]["wq"]      where layers are stacked on a leading dimension

and each leaf is an `nnx.Param` around the same array: nothing is copied, transposed or resharded. So a module whose attributes have these
names takes the parameters by `nnx.update(module, to_nnx_state(params))` and gives them by `from_nnx_state(nnx.state(module, nnx.Param))`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from partinf.foundation.errors import InvalidInput


def to_nnx_state(params: Any) -> nnx.State:
    """A state of `nnx.Param` with the paths of `params`, which is nested dicts, lists and tuples of arrays."""
    return nnx.State(_to_nested(params))


def _to_nested(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _to_nested(child) for name, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        return {place: _to_nested(child) for place, child in enumerate(tree)}
    return nnx.Param(tree)


def from_nnx_state(state: nnx.State) -> Any:
    """Nested dicts and tuples of arrays with the paths of `state`; keys 0 … n-1 become a tuple.

    Raises:
        InvalidInput: integer keys with gaps, which no sequence has.
    """
    return _from_nested(nnx.to_pure_dict(state), "")


def _from_nested(tree: Any, path: str) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    if tree and all(isinstance(key, int) for key in tree):
        if sorted(tree) != list(range(len(tree))):
            raise InvalidInput(f"{path or 'state'}: found the keys {sorted(tree)}; expected 0 to {len(tree) - 1} without gaps")
        return tuple(_from_nested(tree[place], f"{path}/{place}".lstrip("/")) for place in range(len(tree)))
    return {name: _from_nested(child, f"{path}/{name}".lstrip("/")) for name, child in tree.items()}
