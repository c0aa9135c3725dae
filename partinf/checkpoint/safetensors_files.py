"""Which tensors a directory of safetensors files holds, and slices of them.

Owns the file format side of loading: the three ways in which a directory is laid out (one file, an index with shards, shards without an
index), the check that every file is whole, and a reader that counts its bytes. It parses headers itself, because the reader of the
safetensors package says only that a file is bad, not which tensors are cut off; and it collects offences instead of raising, so that a
broken file and a tensor of the wrong shape are reported together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from partinf.checkpoint.offences import condense
from partinf.errors import nearest, raise_offences

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The types that weights may be stored in. Tensors of other types may be present, but are not loaded.
READABLE_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file's header announces it; `dtype` is the format's name, such as BF16, and `start` the place of its first byte."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    start: int


@dataclass
class Inventory:
    """What was found in a directory.

    Attributes:
        tensors: Every tensor by name, those of damaged files included as far as their header can be read.
        offences: What is wrong with the files themselves.
        explained: Names whose absence an offence already explains, so that they are not reported again as missing.
        unlisted: Whether an unreadable file might have held any tensor, so that nothing can be called missing.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    offences: list[str] = field(default_factory=list)
    explained: set[str] = field(default_factory=set)
    unlisted: bool = False

    @property
    def names(self) -> set[str]:
        """Every tensor that is there, or that an index says should be."""
        return {*self.tensors, *self.explained}


def _plain_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tensor_bytes(entry: Any) -> int | None:
    """Bytes of a header's entry, or None where it contradicts itself."""
    if not isinstance(entry, dict):
        return None
    shape, offsets, dtype = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and isinstance(dtype, str)):
        return None
    if not all(_plain_int(number) for number in (*shape, *offsets)):
        return None
    size = offsets[1] - offsets[0]
    return size if dtype not in READABLE_DTYPES or size == math.prod(shape) * READABLE_DTYPES[dtype].itemsize else None


def _parse_header(path: Path) -> tuple[dict[str, Any], int, str]:
    """The header of a file, where its data begin, and the offence, if any, that makes the header unreadable."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            return {}, 0, f"{path}: truncated, or no safetensors file: {size} bytes do not hold the header that its first 8 bytes announce"
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            return {}, 0, f"{path}: the header is not JSON ({error}); expected a safetensors file"
    if not isinstance(header, dict):
        return {}, 0, f"{path}: the header is a {type(header).__name__}; expected a JSON object of tensors"
    header.pop("__metadata__", None)
    return header, 8 + length, ""


def read_header(path: Path) -> tuple[dict[str, StoredTensor], list[str], bool]:
    """The tensors that a file announces, its offences, and whether the header could be read at all."""
    try:
        header, start, unreadable = _parse_header(path)
    except OSError as error:
        return {}, [f"{path}: cannot be read ({error.strerror})"], False
    if unreadable:
        return {}, [unreadable], False
    size, announced = path.stat().st_size, start
    tensors: dict[str, StoredTensor] = {}
    offences: list[str] = []
    cut_off: list[str] = []
    for name, entry in header.items():
        if _tensor_bytes(entry) is None:
            offences.append(
                f"{path}: the header contradicts itself about {name}: found {entry}; expected type, shape and offsets that agree"
            )
            continue
        begin, end = (start + offset for offset in entry["data_offsets"])
        tensors[name] = StoredTensor(name, path, tuple(entry["shape"]), entry["dtype"], begin)
        announced = max(announced, end)
        if end > size:
            cut_off.append(name)
    if cut_off:
        some = ", ".join(f"{name} {tensors[name].shape}" for name in cut_off[:3]) + (" and others" if len(cut_off) > 3 else "")
        offences.append(
            f"{path}: truncated: found {size} bytes, expected {announced}; {len(cut_off)} of {len(header)} tensors cut off: {some}"
        )
    elif not offences and announced != size:
        offences.append(f"{path}: found {size} bytes, expected {announced} from its header; the file is damaged")
    return tensors, offences or _refusal(path), True


def _refusal(path: Path) -> list[str]:
    """What the format's own reader finds in a file that looks whole, such as overlapping tensors; found here, not amid loading."""
    try:
        with safe_open(path, framework="np"):
            return []
    except (SafetensorError, OSError) as error:
        return [f"{path}: no valid safetensors file ({error})"]


def _add_file(inventory: Inventory, path: Path) -> bool:
    tensors, offences, readable = read_header(path)
    inventory.offences += offences
    for name, tensor in tensors.items():
        if name in inventory.tensors:
            inventory.offences.append(f"{path}: {name} is also in {inventory.tensors[name].path.name}; expected each tensor in one file")
        inventory.tensors.setdefault(name, tensor)
    return readable


def _read_index(path: Path) -> tuple[dict[str, str], list[str]]:
    """The weight map, name → file, of an index; bad entries are offences."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, [f"{path}: no safetensors index ({type(error).__name__}: {error}); expected JSON with a 'weight_map', tensor → file"]
    if not isinstance(weight_map, dict):
        return {}, [f"{path}: 'weight_map' is a {type(weight_map).__name__}; expected an object of tensor → file"]
    # A path out of the directory would let a downloaded index read any file.
    bad = sorted({str(file) for file in weight_map.values() if not isinstance(file, str) or Path(file).name != file})
    offences = [f"{path}: names the file {file!r}; expected the plain name of a file beside the index" for file in bad]
    return {name: file for name, file in weight_map.items() if str(file) not in bad}, offences


def _from_index(path: Path) -> Inventory:
    inventory = Inventory()
    weight_map, offences = _read_index(path)
    inventory.offences += offences
    inventory.unlisted = bool(offences)
    present = sorted(file.name for file in path.parent.glob("*.safetensors"))
    for file in sorted(set(weight_map.values())):
        names = {name for name, where in weight_map.items() if where == file}
        if not (path.parent / file).is_file():
            others = ", ".join(present) or "none"
            inventory.offences.append(f"{path}: places {len(names)} tensors in {file}, which does not exist; present: {others}")
            inventory.explained |= names
        elif not _add_file(inventory, path.parent / file):
            inventory.explained |= names
    for name in sorted(weight_map.keys() - inventory.tensors.keys() - inventory.explained):
        inventory.offences.append(f"{path}: places {name} in {weight_map[name]}, which does not hold it{nearest(name, inventory.tensors)}")
        inventory.explained.add(name)
    for name in sorted(weight_map.keys() & inventory.tensors.keys()):
        if inventory.tensors[name].path.name != weight_map[name]:
            inventory.offences.append(f"{path}: places {name} in {weight_map[name]}; found in {inventory.tensors[name].path.name}")
    return inventory


def find_tensors(directory: str | Path) -> Inventory:
    """Every tensor of a directory, by header alone.

    `model.safetensors` wins over an index, and an index over shards without one: the order in which transformers looks.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return Inventory(offences=[f"{directory}: no such directory; expected one with config.json and safetensors files"], unlisted=True)
    if (directory / INDEX_FILE).is_file() and not (directory / SINGLE_FILE).is_file():
        return _from_index(directory / INDEX_FILE)
    files = [directory / SINGLE_FILE] if (directory / SINGLE_FILE).is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        other = sorted(file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f"found {', '.join(other)}, which are not read" if other else "found none"
        offence = f"{directory}: no safetensors file: {found}; expected {SINGLE_FILE} or {INDEX_FILE} with its shards"
        return Inventory(offences=[offence], unlisted=True)
    inventory = Inventory()
    for file in files:
        inventory.unlisted |= not _add_file(inventory, file)
    return inventory


def check_tensors(inventory: Inventory, expected: Mapping[str, tuple[int, ...]], tolerated: Collection[str] = ()) -> list[str]:
    """Offences of the files and of their tensors against the expected names and shapes; layers that offend alike share a line.

    Args:
        inventory: What was found.
        expected: Shape of every tensor that is needed.
        tolerated: Endings of names that may be there and are not read.
    """
    found = inventory.tensors
    offences = list(inventory.offences)
    absent = [] if inventory.unlisted else [name for name in expected if name not in found and name not in inventory.explained]
    offences += condense((name, f"missing; expected shape {expected[name]}") for name in absent)
    shared = [name for name in expected if name in found]
    offences += condense(
        (name, f"found shape {found[name].shape}, expected {expected[name]}") for name in shared if found[name].shape != expected[name]
    )
    offences += condense(
        (name, f"stored as {found[name].dtype}; expected one of {', '.join(READABLE_DTYPES)}")
        for name in shared
        if found[name].dtype not in READABLE_DTYPES
    )
    surplus = [name for name in found if name not in expected and not name.endswith(tuple(tolerated))]
    offences += condense((name, f"unexpected: found shape {found[name].shape}; the architecture has no such tensor") for name in surplus)
    return offences


class TensorReader:
    """Reads slices of the tensors of one directory and counts the bytes; a context manager, for the files stay mapped meanwhile.

    Slices are views of the mapped file, so casting them into place is the only copy: several times faster than slices of `safe_open`.

    Attributes:
        inventory: What the directory holds.
        bytes_read: Bytes of all slices read so far, in the stored type.
    """

    def __init__(self, directory: str | Path) -> None:
        self.inventory = find_tensors(directory)
        self.bytes_read = 0
        self._maps: dict[Path, np.ndarray] = {}

    def check(self, expected: Mapping[str, tuple[int, ...]], tolerated: Collection[str] = (), more: Iterable[str] = ()) -> None:
        """Raise `InvalidInput` with every offence of `check_tensors` and the `more` that the caller found."""
        raise_offences([*more, *check_tensors(self.inventory, expected, tolerated)])

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A view of `tensor[index]` in the stored type, valid while the reader is open. `check` must have passed."""
        tensor = self.inventory.tensors[name]
        if tensor.path not in self._maps:
            self._maps[tensor.path] = np.memmap(tensor.path, np.uint8, mode="r")
        dtype = READABLE_DTYPES[tensor.dtype]
        stop = tensor.start + math.prod(tensor.shape) * dtype.itemsize
        view = self._maps[tensor.path][tensor.start : stop].view(dtype).reshape(tensor.shape)[index]
        self.bytes_read += view.nbytes
        return view

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._maps.clear()  # a file is unmapped when its last view is gone
