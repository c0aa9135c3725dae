"""Which tensors a directory of safetensors files holds, and slices of them.

Owns the file format side of loading: the three ways in which a directory is laid out (one file, an index with shards, shards without an
index), the check that every file is whole, and a reader that counts its bytes. It parses headers itself, because the reader of the
safetensors package says only that a file is bad, not which tensors are cut off; and it collects offences instead of raising, so that a
broken file and a tensor of the wrong shape are reported together.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from partinf.checkpoint.offences import condense
from partinf.foundation import documents
from partinf.foundation.errors import InvalidInput, nearest, raise_offences

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The types that weights may be stored in. Tensors of other types may be present, but are not loaded.
READABLE_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_BYTES = {"U8": np.dtype(np.uint8)}  # of which packed weights are made
_MAX_HEADER_BYTES = 32 << 20  # of a hundred thousand tensors in one file; the format allows three times as many, which no writer produces
_MAX_DIMS = 16
_LONGEST_NAME, _LONGEST_TYPE = 512, 16  # characters
_MOST_LINES = 20  # of entries that contradict themselves
_COMPARED_AT_ONCE = 1 << 22  # numbers
_SHARD = re.compile(r"(?P<stem>[\w.-]+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


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
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _tensor_bytes(entry: Any) -> int | None:
    """Bytes of a header's entry, or None where it contradicts itself."""
    if not isinstance(entry, dict):
        return None
    shape, offsets, dtype = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(shape) > _MAX_DIMS or len(offsets) != 2:
        return None
    if not isinstance(dtype, str) or len(dtype) > _LONGEST_TYPE:
        return None
    if not all(_plain_int(number) for number in (*shape, *offsets)):
        return None
    size = offsets[1] - offsets[0]
    known = READABLE_DTYPES | _BYTES
    return size if dtype not in known or size == math.prod(shape) * known[dtype].itemsize else None


def _parse_header(path: Path) -> tuple[dict[str, Any], int, str]:
    """The header of a file, where its data begin, and the offence, if any, that makes the header unreadable."""
    if path.is_symlink() and not path.exists():
        return {}, 0, f"{path}: a link to {path.readlink()}, which does not exist; download the file again"
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            announced = f"{size} bytes do not hold the header that its first 8 bytes announce"
            kind = documents.looks_like(prefix + file.read(64))
            return {}, 0, f"{path}: truncated, or no safetensors file: {announced}{kind}"
        try:
            header = documents.json_of(file.read(length), "")
        except InvalidInput as error:
            return {}, 0, f"{path}: the header is not JSON{error}; expected a safetensors file"
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
    contradictory: list[str] = []
    for name, entry in header.items():
        if len(name) > _LONGEST_NAME or _tensor_bytes(entry) is None:
            contradictory.append(name)
            continue
        begin, end = (start + offset for offset in entry["data_offsets"])
        tensors[name] = StoredTensor(name, path, tuple(entry["shape"]), entry["dtype"], begin)
        announced = max(announced, end)
        if end > size:
            cut_off.append(name)
    for name in contradictory[:_MOST_LINES]:
        found = f"found {documents.shown(header[name], 120)}; expected type, shape and offsets that agree"
        offences.append(f"{path}: the header contradicts itself about {documents.shown(name)[1:-1]}: {found}")
    if contradictory[_MOST_LINES:]:
        offences.append(f"{path}: the header contradicts itself about {len(contradictory) - _MOST_LINES} more tensors")
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
    twice: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if name in inventory.tensors:
            twice.setdefault(inventory.tensors[name].path.name, []).append(name)
        inventory.tensors.setdefault(name, tensor)
    for other, names in twice.items():
        more = f", as are {len(names) - 1} more of its tensors" if names[1:] else ""
        inventory.offences.append(
            f"{path}: {names[0]} is also in {other}{more}; expected each tensor in one file; remove the file that is not meant"
        )
    return readable


def _read_index(path: Path) -> tuple[dict[str, str], list[str]]:
    """The weight map, name → file, of an index; bad entries are offences."""
    try:
        index = documents.read_json(path, most=_MAX_HEADER_BYTES)
    except InvalidInput as error:
        return {}, [f"{error}; expected JSON with a 'weight_map', tensor → file"]
    if not isinstance(index, dict) or "weight_map" not in index:
        return {}, [f"{path}: no safetensors index; expected JSON with a 'weight_map', tensor → file"]
    weight_map = index["weight_map"]
    if not isinstance(weight_map, dict):
        return {}, [f"{path}: 'weight_map' is a {type(weight_map).__name__}; expected an object of tensor → file"]
    # A path out of the directory would let a downloaded index read any file.
    bad = {name: file for name, file in weight_map.items() if not _is_plain_name(file) or len(name) > _LONGEST_NAME}
    named = list(dict.fromkeys(documents.shown(file) for file in bad.values()))
    offences = [f"{path}: names the file {file}; expected the plain name of a file next to the index" for file in named[:_MOST_LINES]]
    return {name: file for name, file in weight_map.items() if name not in bad}, offences


def _is_plain_name(file: Any) -> bool:
    return isinstance(file, str) and 0 < len(file.encode()) < 256 and "\0" not in file and Path(file).name == file


def _from_index(path: Path) -> Inventory:
    inventory = Inventory()
    weight_map, offences = _read_index(path)
    inventory.offences += offences
    inventory.unlisted = bool(offences)
    present = sorted(file.name for file in path.parent.glob("*.safetensors"))
    for file in sorted(set(weight_map.values())):
        names = {name for name, where in weight_map.items() if where == file}
        if not (path.parent / file).is_file() and not (path.parent / file).is_symlink():
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

    One file or an index with shards; where there are both, it is unclear which is the model, and that is an offence. Without either, the
    numbered shards if there are any, all of them; else every safetensors file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return Inventory(offences=[f"{directory}: no such directory; expected one with config.json and safetensors files"], unlisted=True)
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    adapters = sorted(file.name for file in directory.glob("adapter_*") if file.name in _ADAPTER_FILES)
    if adapters:
        offence = f"{directory}: holds an adapter ({', '.join(adapters)}), which is not applied; merge it into the weights, or remove it"
        return Inventory(offences=[offence], unlisted=True)
    shards = _shards(directory, index) - {SINGLE_FILE}
    if _there(single) and shards:
        both = f"{SINGLE_FILE} and shards of a model ({min(shards)} first)"
        offence = f"{directory}: holds {both}; only one of them can be meant; remove the other, and an index that belongs to it"
        return Inventory(offences=[offence], unlisted=True)
    if _there(index) and not _there(single):
        return _from_index(index)
    files, missing = ([single], []) if _there(single) else _without_index(directory)
    if not files:
        other = sorted(file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f"found {', '.join(other)}, which are not read" if other else "found none"
        offence = f"{directory}: no safetensors file: {found}; expected {SINGLE_FILE} or {INDEX_FILE} with its shards"
        return Inventory(offences=[offence], unlisted=True)
    inventory = Inventory(offences=missing, unlisted=bool(missing))
    for file in files:
        inventory.unlisted |= not _add_file(inventory, file)
    return inventory


def _shards(directory: Path, index: Path) -> set[str]:
    """The files in a directory that are shards by their number, or by what an index says."""
    named = set(_read_index(index)[0].values()) if _there(index) else set()
    return {file.name for file in directory.glob("*.safetensors") if file.name in named or _SHARD.fullmatch(file.name)}


def _there(path: Path) -> bool:
    """Whether there is a file, or a link to one that is gone, which is reported on reading."""
    return path.is_file() or path.is_symlink()


def _without_index(directory: Path) -> tuple[list[Path], list[str]]:
    """The files of a directory without an index, and the offence of each set of numbered shards that lacks some."""
    files = sorted(directory.glob("*.safetensors"))
    sets: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, (_SHARD.fullmatch(file.name) for file in files)):
        sets.setdefault((match["stem"], match["total"]), set()).add(int(match["number"]))
    offences = []
    for (stem, total), numbers in sets.items():
        lacking = sorted({*range(1, int(total) + 1)} - numbers)
        if lacking:
            named = ", ".join(f"{stem}-{number:05d}-of-{total}.safetensors" for number in lacking[:3])
            more = " and others" if lacking[3:] else ""
            offences.append(f"{directory}: {len(lacking)} of {int(total)} shards are missing: {named}{more}; download them")
    return files, offences


def check_tensors(
    inventory: Inventory,
    expected: Mapping[str, tuple[int, ...]],
    tolerated: Collection[str] = (),
    aside: Collection[str] = (),
    packed: Collection[str] = (),
) -> list[str]:
    """Offences of the files and of their tensors against the expected names and shapes; layers that offend alike share a line.

    Args:
        inventory: What was found.
        expected: Shape of every tensor that is needed.
        tolerated: Endings of names that may be there and are not read. aside: Beginnings of such names.
        packed: Endings of the names of what holds bytes.
    """
    found = inventory.tensors
    offences = list(inventory.offences)
    absent = [] if inventory.unlisted else [name for name in expected if name not in found and name not in inventory.explained]
    offences += condense((name, f"missing; expected shape {expected[name]}") for name in absent)
    shared = [name for name in expected if name in found]
    offences += condense(
        (name, f"found shape {found[name].shape}, expected {expected[name]}") for name in shared if found[name].shape != expected[name]
    )
    types = {name: _BYTES if name.endswith(tuple(packed)) else READABLE_DTYPES for name in shared}
    offences += condense(
        (name, f"stored as {found[name].dtype}; expected one of {', '.join(types[name])}")
        for name in shared
        if found[name].dtype not in types[name]
    )
    surplus = [name for name in found if name not in expected and not name.endswith(tuple(tolerated)) and not name.startswith(tuple(aside))]
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
        self._maps: dict[Path, mmap.mmap] = {}

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        tolerated: Collection[str] = (),
        more: Iterable[str] = (),
        aside: Collection[str] = (),
        packed: Collection[str] = (),
    ) -> None:
        """Raise `InvalidInput` with every offence of `check_tensors` and the `more` that the caller found."""
        raise_offences([*more, *check_tensors(self.inventory, expected, tolerated, aside, packed)])

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A view of `tensor[index]` in the stored type, valid while the reader is open. `check` must have passed."""
        tensor = self.inventory.tensors[name]
        if tensor.path not in self._maps:
            with tensor.path.open("rb") as file:
                self._maps[tensor.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        dtype = (READABLE_DTYPES | _BYTES)[tensor.dtype]
        whole = np.frombuffer(self._maps[tensor.path], dtype, math.prod(tensor.shape), tensor.start)
        view = whole.reshape(tensor.shape)[index]
        self.bytes_read += view.nbytes
        return view

    def release(self) -> None:
        """Give back the memory of what was read, which the files' pages would count as until the reader is closed."""
        for mapped in self._maps.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)  # of a file that is only read: its pages are read again where they are wanted again

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers. `check` must have passed."""
        pair = [self.inventory.tensors[name] for name in (one, other)]
        shape = pair[0].shape
        if shape != pair[1].shape or any(tensor.dtype not in READABLE_DTYPES for tensor in pair):
            return False
        rows = max(1, _COMPARED_AT_ONCE // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0] if shape else 1, rows):
            index = (slice(start, start + rows),) if shape else ()
            if not np.array_equal(self.read(one, index), self.read(other, index)):
                return False
        return True

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._maps.clear()  # a file is unmapped when its last view is gone
