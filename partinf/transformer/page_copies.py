"""KV pages between the devices and host memory: two compiled programs, and what is kept.

Pages are gathered on every device that holds their heads, so a shard of any batch axis can take them back. Each process keeps what its own
devices hold, once. Copies happen in the order of the devices' work; with memory that devices can reach (`pinned_host`) nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from partinf.plans import Plan
from partinf.sharding import put
from partinf.transformer.step import abstract_state

PAGES = 16  # that one program moves
_NOWHERE = np.iinfo(np.int32).max  # a page that there is not: read as 0 and not written


def compile_take(plan: Plan, mesh: Mesh, unrolled: bool) -> Any:
    """(cache, ids [PAGES]) → these pages of every layer, on all batch shards."""
    kv, pages, where = _shapes(plan, mesh, unrolled)
    take = lambda kv, ids: jax.tree.map(lambda a: a.at[(*where, ids)].get(mode="fill", fill_value=0), kv)  # noqa: E731
    return jax.jit(take, out_shardings=_shardings(pages)).lower(kv, _ids(mesh)).compile()


def compile_put(plan: Plan, mesh: Mesh, unrolled: bool) -> Any:
    """(cache, ids [PAGES], pages) → the cache with these pages at their places; the old one is given up."""
    kv, pages, where = _shapes(plan, mesh, unrolled)
    put_back = lambda kv, ids, new: jax.tree.map(lambda a, b: a.at[(*where, ids)].set(b, mode="drop"), kv, new)  # noqa: E731
    return jax.jit(put_back, donate_argnums=0, out_shardings=_shardings(kv)).lower(kv, _ids(mesh), pages).compile()


class HostPages:
    """Pages in host memory, by the first of their places there."""

    def __init__(self, plan: Plan, mesh: Mesh, unrolled: bool, take: Callable[..., Any], put_back: Callable[..., Any]) -> None:
        """
        Args:
            take, put_back: from `compile_take` and `compile_put`.
        """
        self._take, self._put = take, put_back
        self._held: dict[int, list[Any]] = {}
        self._everywhere = NamedSharding(mesh, P())
        self._shardings = _shardings(_shapes(plan, mesh, unrolled)[1])
        device = mesh.local_devices[0]
        kinds = {memory.kind for memory in device.addressable_memories()} - {device.default_memory().kind}
        pinned = lambda sharding: sharding.with_memory_kind("pinned_host")  # noqa: E731
        self._pinned = jax.tree.map(pinned, self._shardings) if "pinned_host" in kinds else None

    def out(self, kv: Any, pages: Sequence[int], host_pages: Sequence[int]) -> None:
        """Keep these pages."""
        for page in host_pages:
            self._held.pop(page, None)  # of a request that was cancelled while it was there
        taken = [self._take(kv, ids) for ids in self._groups(pages)]
        self._held[host_pages[0]] = [
            jax.tree.map(_Kept, group) if self._pinned is None else jax.device_put(group, self._pinned) for group in taken
        ]

    def back(self, kv: Any, pages: Sequence[int], host_pages: Sequence[int]) -> Any:
        """The cache with these pages at their new places."""
        for ids, group in zip(self._groups(pages), self._held.pop(host_pages[0]), strict=True):
            kept = self._pinned is None
            new = jax.tree.map(_Kept.restored, group, self._shardings) if kept else jax.device_put(group, self._shardings)
            kv = self._put(kv, ids, new)
        return kv

    def clear(self) -> None:
        """Forget all of them."""
        self._held.clear()

    def _groups(self, pages: Sequence[int]) -> list[jax.Array]:
        """The pages in groups of what one program moves."""
        groups = []
        for first in range(0, len(pages), PAGES):
            ids = np.full(PAGES, _NOWHERE, np.int32)
            chosen = pages[first : first + PAGES]
            ids[: len(chosen)] = chosen
            groups.append(put(ids, self._everywhere))
        return groups


class _Kept:
    """This process's part of an array, each different shard once."""

    def __init__(self, array: jax.Array) -> None:
        self._shape = array.shape
        self._parts: dict[str, np.ndarray] = {}
        for shard in array.addressable_shards:
            if str(shard.index) not in self._parts:
                self._parts[str(shard.index)] = np.asarray(shard.data)

    def restored(self, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(self._shape, sharding, lambda index: self._parts[str(index)])


def _shapes(plan: Plan, mesh: Mesh, unrolled: bool) -> tuple[Any, Any, tuple[slice, ...]]:
    """The cache, its pages that one program moves, and where their axis is: behind that of the layers, if there is one."""
    axis = 0 if unrolled else 1
    kv = abstract_state(plan, mesh, unrolled).kv

    def gathered(leaf: Any) -> Any:
        spec = (*leaf.sharding.spec, *(None,) * len(leaf.shape))[: len(leaf.shape)]
        shape = (*leaf.shape[:axis], PAGES, *leaf.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(mesh, P(*spec[:axis], None, *spec[axis + 1 :])))

    return kv, jax.tree.map(gathered, kv), (slice(None),) * axis


def _ids(mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((PAGES,), np.int32, sharding=NamedSharding(mesh, P()))


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
