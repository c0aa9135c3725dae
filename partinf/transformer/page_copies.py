"""KV pages between the devices and host memory: two compiled programs, and what is kept.

Pages leave from the place in the mesh that has them and come back to it: nothing crosses the mesh, and every process keeps what its own
devices have, once. A place is a shard of the batch axes, or one of its sequence shards where such axes split the pages of a sequence. All
processes run the same two programs; places that have no page of a group read nothing (their ids are out of range), and what the devices
of other shards hand out is not kept. Copies happen in the order of the devices' work, and with memory that devices can reach
(`pinned_host`) no step waits for them.

In a pipeline every stage has its own part of a page, its layers', and moves that when the step that asks for it arrives there: a stage may
still write what an earlier one has already handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from partinf.partition.sharding import dimensions, put
from partinf.plans import Plan
from partinf.transformer.step import abstract_state

PAGES = 16  # of a place that one program moves
_NOWHERE = np.iinfo(np.int32).max  # a page that there is not: read as 0 and not written


def compile_take(plan: Plan, mesh: Mesh, unrolled: bool, group: int) -> Any:
    """(a group of the cache, ids [stages, places, PAGES]) → these pages of every place and layer; ids are local to the place."""
    shapes = _Shapes(plan, mesh, unrolled, group)

    def take(kv: Any, ids: jax.Array) -> Any:
        return jax.tree.map(lambda array: array.at[(*shapes.where, ids[0, 0])].get(mode="fill", fill_value=0), kv)

    in_specs = (_specs(shapes.kv), shapes.ids.sharding.spec)
    local = jax.shard_map(take, mesh=mesh, in_specs=in_specs, out_specs=_specs(shapes.pages), check_vma=False)
    return jax.jit(local, out_shardings=_shardings(shapes.pages)).lower(shapes.kv, shapes.ids).compile()


def compile_put(plan: Plan, mesh: Mesh, unrolled: bool, group: int) -> Any:
    """(a group of the cache, ids [stages, places, PAGES], pages) → it with these pages there; the old one is given up."""
    shapes = _Shapes(plan, mesh, unrolled, group)

    def put_back(kv: Any, ids: jax.Array, new: Any) -> Any:
        return jax.tree.map(lambda array, pages: array.at[(*shapes.where, ids[0, 0])].set(pages, mode="drop"), kv, new)

    in_specs = (_specs(shapes.kv), shapes.ids.sharding.spec, _specs(shapes.pages))
    local = jax.shard_map(put_back, mesh=mesh, in_specs=in_specs, out_specs=_specs(shapes.kv), check_vma=False)
    compiled = jax.jit(local, donate_argnums=0, out_shardings=_shardings(shapes.kv))
    return compiled.lower(shapes.kv, shapes.ids, shapes.pages).compile()


class HostPages:
    """Pages of one group of the cache in host memory, by stage and the first of their places there."""

    def __init__(self, plan: Plan, mesh: Mesh, unrolled: bool, group: int, take: Callable[..., Any], put_back: Callable[..., Any]) -> None:
        """
        Args:
            take, put_back: from `compile_take` and `compile_put`.
        """
        self._take, self._put = take, put_back
        self._held: dict[tuple[int, int], list[list[_Part]]] = {}
        self._shapes = _Shapes(plan, mesh, unrolled, group)
        cached = plan.cache_groups[group]
        self._ways, self._held_by_each = plan.num_sequence_shards, cached.pages_per_shard // plan.num_sequence_shards
        self._layers_per_stage = len(cached.layers) // plan.num_stages
        device = mesh.local_devices[0]
        kinds = {memory.kind for memory in device.addressable_memories()} - {device.default_memory().kind}
        self._pinned = "pinned_host" in kinds
        leaves, self._tree = jax.tree.flatten(self._shapes.pages)
        # What devices of other shards are given with the pages of one: their own blank, made once.
        self._blanks = [
            {d: jax.device_put(np.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype), d) for d in mesh.local_devices}
            for leaf in leaves
        ]
        self._leaves = leaves

    @property
    def num_bytes(self) -> int:
        """Bytes that this process keeps."""
        return sum(part.num_bytes for groups in self._held.values() for group in groups for part in group)

    def out(self, kv: Any, pages: Sequence[int], host_pages: Sequence[int], stage: int = 0) -> None:
        """Keep these pages of a stage, all of one shard; their ids are global."""
        for page in host_pages:
            self._held.pop((stage, page), None)  # of a request that was cancelled while it was there
        shard, groups = pages[0] // self._held_by_each // self._ways, []
        for ids in self._groups(pages, stage):
            taken = jax.tree.leaves(self._take(kv, ids))
            groups.append([_Part(self._of(array, stage, shard), self._pinned) for array in taken])
        self._held[stage, host_pages[0]] = groups

    def back(self, kv: Any, pages: Sequence[int], host_pages: Sequence[int], stage: int = 0) -> Any:
        """The cache with these pages of a stage under their new ids, each at the place in the mesh where it was before."""
        for ids, group in zip(self._groups(pages, stage), self._held.pop((stage, host_pages[0])), strict=True):
            parts = zip(group, self._leaves, self._blanks, strict=True)
            new = [part.restored(leaf.shape, leaf.sharding, blanks) for part, leaf, blanks in parts]
            kv = self._put(kv, ids, jax.tree.unflatten(self._tree, new))
        return kv

    def clear(self) -> None:
        """Forget all of them."""
        self._held.clear()

    def _groups(self, pages: Sequence[int], stage: int) -> list[jax.Array]:
        """The pages in groups of what one program moves, as ids of their places; places of other shards and stages have none."""
        at_place: dict[int, list[int]] = {}
        for page in pages:
            place, local = divmod(page, self._held_by_each)
            at_place.setdefault(place, []).append(local)
        groups = []
        for first in range(0, max(map(len, at_place.values())), PAGES):
            ids = np.full((*self._shapes.ids.shape[:-1], PAGES), _NOWHERE, np.int32)
            for place, held in at_place.items():
                chosen = held[first : first + PAGES]
                ids[stage, place, : len(chosen)] = chosen
            groups.append(put(ids, self._shapes.ids.sharding))
        return groups

    def _of(self, array: jax.Array, stage: int, shard: int) -> list[Any]:
        """The shards of an array that hold pages of this stage and of this shard of the batch axes."""
        layers = (stage * self._layers_per_stage,) * len(self._shapes.where)
        places = range(shard * self._ways * PAGES, (shard + 1) * self._ways * PAGES)

        def ours(index: tuple[slice, ...]) -> bool:
            *before, page = (part.start or 0 for part in index[: len(layers) + 1])
            return tuple(before) == layers and page in places

        return [each for each in array.addressable_shards if ours(each.index)]


class _Part:
    """This process's part of the pages of one leaf, each different piece once."""

    def __init__(self, shards: list[Any], pinned: bool) -> None:
        self._pieces: dict[str, Any] = {}
        self._places = {each.device: str(each.index) for each in shards}
        for each in shards:
            if str(each.index) not in self._pieces:
                host = SingleDeviceSharding(each.device, memory_kind="pinned_host") if pinned else None
                self._pieces[str(each.index)] = np.asarray(each.data) if host is None else jax.device_put(each.data, host)

    @property
    def num_bytes(self) -> int:
        return sum(piece.nbytes for piece in self._pieces.values())

    def restored(self, shape: tuple[int, ...], sharding: NamedSharding, blanks: dict[Any, jax.Array]) -> jax.Array:
        """The array again; devices of other shards have blanks."""
        ours = {device: jax.device_put(self._pieces[place], SingleDeviceSharding(device)) for device, place in self._places.items()}
        return jax.make_array_from_single_device_arrays(shape, sharding, [ours.get(device, blank) for device, blank in blanks.items()])


class _Shapes:
    """A group of the cache, the pages that one program moves, and the ids, as `jax.ShapeDtypeStruct`s with shardings.

    Attributes:
        where: what comes before the index of a page: the axis of the layers, if there is one.
    """

    def __init__(self, plan: Plan, mesh: Mesh, unrolled: bool, group: int) -> None:
        self.kv = abstract_state(plan, mesh, unrolled).kv[group]
        axis = 0 if isinstance(self.kv, tuple) else 1
        self.where = (slice(None),) * axis
        places, split = plan.num_shards * plan.num_sequence_shards, dimensions(mesh, plan.stage_axes, plan.page_axes, ())
        self.ids = jax.ShapeDtypeStruct((plan.num_stages, places, PAGES), np.int32, sharding=split)

        def some_pages(leaf: Any) -> Any:
            shape = (*leaf.shape[:axis], places * PAGES, *leaf.shape[axis + 1 :])
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

        self.pages = jax.tree.map(some_pages, self.kv)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _specs(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding.spec, tree)
