"""Hugging Face directories to sharded parameters, and back.

Owns the step from files to devices: everything is checked by header first, then each device's shard is built from the bytes under it and
no others, so a host needs memory for its own shards of one leaf at a time, not for the model. Names and shapes come from `hf_names`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import save_file

from partinf.checkpoint.hf_leaves import read_leaf, stored_in, write_part
from partinf.checkpoint.hf_names import LeafSource, leaf_sources, naming_of, packed, tensor_shapes, tied_offences, tolerated
from partinf.checkpoint.offences import compare_shapes
from partinf.checkpoint.safetensors_files import INDEX_FILE, SINGLE_FILE, TensorReader
from partinf.checkpoint.tree_paths import by_path, shapes_by_path
from partinf.foundation.errors import raise_offences
from partinf.model.config import ModelConfig
from partinf.model.hf_write import config_to_hf
from partinf.partition.quantize import Quantized, quantize

_AT_ONCE = 64 << 20  # bytes of a weight that is quantised while it is loaded

Params = Any  # the plain nested dict of arrays that `transformer.params` declares


def load_hf(directory: str | Path, config: ModelConfig, abstract_params: Params, padded_heads: int = 0) -> Params:
    """The weights of a Hugging Face directory as sharded arrays.

    Args:
        directory: Holds `model.safetensors`, or shards with or without an index.
        config: The architecture, which says what must be there.
        abstract_params: The tree to build, of `jax.ShapeDtypeStruct` with sharding; its `layers` are a sequence of dicts, or one dict of
            arrays stacked on a leading layer dimension. Weights are cast to its types; rows beyond the vocabulary are zero.
        padded_heads: query heads in the tree (and key-value heads, where they are as many); those beyond the model's are zero.

    Raises:
        InvalidInput: before any device is used, with every missing, unexpected, truncated or misshapen tensor and every bad file.
    """
    with TensorReader(directory) as reader:
        return load_from(reader, config, abstract_params, padded_heads)


def load_from(reader: TensorReader, config: ModelConfig, abstract_params: Params, padded_heads: int = 0) -> Params:
    """`load_hf` from an open reader, whose `bytes_read` then tells what was read."""
    naming = naming_of(config, reader.inventory.names)
    sources = leaf_sources(config, isinstance(abstract_params.get("layers"), Mapping), padded_heads, naming)
    leaves = by_path(abstract_params, quantized_whole=True)
    expected = {path: source.leaf_shape for path, source in sources.items()}
    wanted = shapes_by_path(abstract_params, quantized_whole=True)
    disagreements = compare_shapes(wanted, expected, "the parameter tree", f"the model {config.name}")
    reader.check(tensor_shapes(config, naming), tolerated(config, naming), more=disagreements, aside=naming.aside, packed=packed(naming))
    raise_offences(tied_offences(reader, config, naming))
    loaded = {}
    for path in sorted(
        leaves, key=lambda path: -math.prod(leaves[path].shape)
    ):  # what is read and placed at once is least where most is there
        loaded[path] = _load_leaf(reader, sources[path], leaves[path])
        reader.release()
    arrays = [loaded[path] for path in leaves]
    structure = jax.tree.structure(abstract_params, is_leaf=lambda x: isinstance(x, Quantized))
    return jax.tree.unflatten(structure, arrays)


def _load_quantized(reader: TensorReader, source: LeafSource, leaf: Quantized) -> Quantized:
    """Quantise while loading: a shard's scales need the whole contraction, so its rows are read whole and then cut."""
    places = leaf.values.sharding.addressable_devices_indices_map(leaf.shape)
    whole = {
        device: tuple(slice(None) if dim in leaf.contracted_dims else part for dim, part in enumerate(index))
        for device, index in places.items()
    }
    values: list[jax.Array] = []
    scales: list[jax.Array] = []
    for rows, devices in _by_shard(whole, leaf.shape):
        block = _read_quantized(reader, source, rows, leaf)
        for device in devices:
            cut = tuple(part if dim in leaf.contracted_dims else slice(None) for dim, part in enumerate(places[device]))
            values.append(jax.device_put(block.values[cut], _onto(device, leaf.values)))
            scales.append(jax.device_put(block.scale, device))
        jax.block_until_ready((values, scales))
        del block
    made = jax.make_array_from_single_device_arrays
    return Quantized(made(leaf.shape, leaf.values.sharding, values), made(leaf.scale.shape, leaf.scale.sharding, scales), leaf.contracted)


def _by_shard(places: Mapping[Any, tuple[slice, ...]], shape: tuple[int, ...]) -> Iterator[tuple[tuple[slice, ...], list[Any]]]:
    """Each shard of an array once, with the devices that hold it."""
    found: dict[tuple[tuple[int, int, int], ...], tuple[tuple[slice, ...], list[Any]]] = {}
    for device, index in places.items():
        key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        found.setdefault(key, (index, []))[1].append(device)
    yield from found.values()


def _read_quantized(reader: TensorReader, source: LeafSource, index: tuple[slice, ...], leaf: Quantized) -> Quantized:
    """Part of a leaf, whole along its contraction, quantised piece by piece: little of it exists in float32 at a time."""
    ranges = [range(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True)]
    shape = [len(one) for one in ranges]
    lead = min(leaf.contracted_dims)
    values = np.empty(shape, np.int8)
    scale = np.empty([size for dim, size in enumerate(shape) if dim not in leaf.contracted_dims], np.float32)
    for piece in _pieces(shape, lead):
        there = tuple(slice(one.start + cut.start, one.start + cut.stop) for one, cut in zip(ranges, piece, strict=False))
        found = quantize(read_leaf(reader, source, there + index[lead:], np.dtype(np.float32)), leaf.contracted)
        values[piece], scale[piece] = found.values, found.scale
    return Quantized(values, scale, leaf.contracted)


def _pieces(shape: list[int], lead: int) -> Iterator[tuple[slice, ...]]:
    """The leading dimensions of a shape cut into pieces of at most `_AT_ONCE` bytes in float32, or one row of the others."""
    steps, size = [1] * lead, 4 * math.prod(shape[lead:])
    for dim in reversed(range(lead)):
        steps[dim] = min(max(_AT_ONCE // size, 1), shape[dim])
        size *= steps[dim]
    for starts in itertools.product(*(range(0, shape[dim], steps[dim]) for dim in range(lead))):
        yield tuple(slice(start, min(start + step, most)) for start, step, most in zip(starts, steps, shape, strict=False))


def _load_leaf(reader: TensorReader, source: LeafSource, leaf: jax.ShapeDtypeStruct | Quantized) -> jax.Array | Quantized:
    """Shard by shard: the host holds the one that is read, and the devices those before it."""
    if isinstance(leaf, Quantized):
        return _load_quantized(reader, source, leaf)
    if leaf.sharding is None:
        return jax.numpy.asarray(read_leaf(reader, source, (slice(None),) * len(leaf.shape), leaf.dtype))
    arrays: list[jax.Array] = []
    for index, devices in _by_shard(leaf.sharding.addressable_devices_indices_map(leaf.shape), leaf.shape):
        block = read_leaf(reader, source, index, leaf.dtype)
        arrays += [jax.device_put(block, _onto(device, leaf)) for device in devices]
        jax.block_until_ready(arrays)
        del block
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)


def _onto(device: jax.Device, leaf: jax.ShapeDtypeStruct) -> jax.Device | Format:
    """Where `jax.device_put` puts this device's part of an array: in the order in which it is to lie there, if one is wanted."""
    layout = leaf.format.layout
    return device if layout is None else Format(layout, SingleDeviceSharding(device))


def check_hf(directory: str | Path, config: ModelConfig) -> None:
    """Raise `InvalidInput` with every offence of the weights in a directory. Reads headers only, so it takes milliseconds for any size."""
    with TensorReader(directory) as reader:
        naming = naming_of(config, reader.inventory.names)
        reader.check(tensor_shapes(config, naming), tolerated(config, naming), aside=naming.aside, packed=packed(naming))


def save_hf(
    params: Params,
    config: ModelConfig,
    directory: str | Path,
    *,
    config_fields: Mapping[str, Any] | None = None,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Write parameters as a Hugging Face directory that transformers 4 and 5 and `load_hf` read.

    Args:
        params: The whole tree; its padding of the vocabulary is dropped and its types are kept.
        config: Written as config.json.
        directory: Made if it does not exist. It must not hold safetensors yet: stale shards would be read with the new ones.
        config_fields: More fields of config.json, such as `bos_token_id` and `eos_token_id`.
        max_file_bytes: Weights beyond it are split over several files with an index.

    Raises:
        InvalidInput: blocks that no family's directory can describe, a tree that is not this model's, arrays that live partly on other
            hosts, or a directory with weights.
    """
    config = replace(config, table_dim=0)  # the tables are written as they are used
    directory, described = Path(directory), config_to_hf(config)
    sources = leaf_sources(config, stacked=isinstance(params.get("layers"), Mapping))
    expected = {path: source.leaf_shape for path, source in sources.items()}
    offences = compare_shapes(shapes_by_path(params), expected, "the parameters", f"the model {config.name}")
    leaves = by_path(params)
    remote = [path for path, leaf in leaves.items() if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable]
    if remote:
        offences.append(f"{len(remote)} leaves ({remote[0]} first) live partly on other hosts; save them with orbax, or gather them first")
    present = sorted(file.name for file in directory.glob("*.safetensors*")) if directory.is_dir() else []
    if present:
        offences.append(f"{directory}: already holds {', '.join(present)}; expected a directory without weights")
    raise_offences(offences)

    directory.mkdir(parents=True, exist_ok=True)
    files = _assign_files(sources, leaves, max_file_bytes)
    _write_weights(directory, sources, leaves, files)
    dtypes = sorted({str(leaf.dtype) for leaf in leaves.values()})
    dtype = dtypes[0] if len(dtypes) == 1 else "float32"
    fields = described | {"dtype": dtype, "torch_dtype": dtype} | dict(config_fields or {})  # of transformers 5, and of 4
    (directory / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _assign_files(sources: Mapping[str, LeafSource], leaves: Mapping[str, Any], max_file_bytes: int) -> dict[str, str]:
    """The file of each tensor: filled in the order of the tree, leaf by leaf, so that only one file's weights are on the host at a time."""
    numbers: dict[str, int] = {}
    number = used = 0
    for name, [(path, _), *_] in stored_in(sources).items():
        size = math.prod(sources[path].tensor_shape) * leaves[path].dtype.itemsize
        if used and used + size > max_file_bytes:
            number, used = number + 1, 0
        numbers[name] = number
        used += size
    if number == 0:
        return dict.fromkeys(numbers, SINGLE_FILE)
    return {name: f"model-{place + 1:05d}-of-{number + 1:05d}.safetensors" for name, place in numbers.items()}


def _write_weights(directory: Path, sources: Mapping[str, LeafSource], leaves: Mapping[str, Any], files: Mapping[str, str]) -> None:
    parts, total = stored_in(sources), 0

    def tensor(name: str) -> np.ndarray:
        path, _ = parts[name][0]
        made = np.zeros(sources[path].tensor_shape, leaves[path].dtype)  # rows that no leaf has, as before OPT's positions, are 0
        for path, number in parts[name]:
            write_part(made, sources[path], number, np.asarray(leaves[path]))
        return made

    for file, names in itertools.groupby(files, files.__getitem__):
        tensors = {name: tensor(name) for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})  # transformers refuses files without this mark
        total += sum(one.nbytes for one in tensors.values())
    if SINGLE_FILE not in files.values():
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
