"""The rotations of a `config.json`: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of version 4; one for all layers,
or one for each type of layer.

They are read as transformers 5 reads them: `rope_scaling`, where it is given, is used instead of `rope_parameters`; what stands within
either counts before what stands next to it, and that before what the family does without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from partinf.foundation.documents import finite
from partinf.model.hf_file import HfFile, as_written
from partinf.model.rotation import MOST_POSITIONS, Dynamic, Linear, Llama3, LongRope, Rotation, Scaling, Yarn, yarn_amplitude

_SHARED = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"})
_STRETCHED = frozenset({"alpha", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"})  # of which the first alone is read
_MOST_ALPHA = 1e12


@dataclass(frozen=True)
class Rope:
    """How a family's configuration describes rotations.

    Attributes:
        theta: where the file does not say. theta_key: the key next to the others that says.
        partial: the part of a head that is rotated where the file does not say; 0 where heads are always rotated whole.
        partial_key: the key next to the others that says.
        dims_key: instead of a part, the key of the number of rotated dimensions, and what a missing key means; null means all.
        optional_dims_key: the key of the number of rotated dimensions, which counts instead of a part where it is given.
        by_type: type of layer → the key of its theta and what a missing key means, where types rotate differently.
        original: whether `original_max_position_embeddings` may stand next to it, where it counts before the one within.
        renamed: names of ways of scaling that mean others in this family. missing: the rotation of a file that describes none.
        growth_key: within, how much queries grow with each original length, which the file must then have.
        alpha: whether dynamic scaling with an `alpha` is a theta that is stretched by it once, whatever is served.
    """

    theta: float = 10_000.0
    theta_key: str = "rope_theta"
    partial: float = 0.0
    partial_key: str = "partial_rotary_factor"
    dims_key: tuple[str, int] = ("", 0)
    optional_dims_key: str = ""
    by_type: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    original: bool = True
    renamed: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, Any] = field(default_factory=dict)
    alpha: bool = False
    growth_key: str = ""

    @property
    def keys(self) -> frozenset[str]:
        """What is read of the file."""
        if self.dims_key[0]:
            return frozenset({self.dims_key[0]})
        original = {"original_max_position_embeddings"} if self.original else set()
        return frozenset(
            {"rope_parameters", "rope_scaling", "partial_rotary_factor", self.theta_key, self.partial_key, *original}
            | {key for key in (self.optional_dims_key, *(key for key, _ in self.by_type.values())) if key}
        )


HALVES = Rope()


class RopeReader:
    """The rotations of one file.

    Args:
        head_dim: dimensions of a head; 0 where the file is wrong about them.
        max_len: the longest context that the file states; 0 where it states none.
    """

    def __init__(self, file: HfFile, rope: Rope, head_dim: int, max_len: int) -> None:
        self._file, self._rope, self._head_dim, self._max_len = (
            file,
            rope,
            min(max(head_dim, 0), MOST_POSITIONS),
            min(max(max_len, 0), MOST_POSITIONS),
        )

    def rotation(self) -> Rotation:
        """The rotation of all layers."""
        rope = self._rope
        if rope.dims_key[0]:
            key, absent = rope.dims_key
            dims = self._head_dim if self._file.data.get(key, absent) is None else self._file.whole(key, absent) or 0
            return Rotation(rope.theta, 0 if dims == self._head_dim else dims)
        key = next((key for key in ("rope_scaling", "rope_parameters") if self._file.data.get(key) not in (None, {})), "")
        found = self._object(key) if key else dict(rope.missing)
        nested = [one for one, value in found.items() if isinstance(value, dict)]
        if nested:
            self._file.offend(f"{key} has a rotation for each of {', '.join(map(str, nested))}; this family has one for all layers")
            return Rotation()
        return self._one(found, key, rope.theta_key, rope.theta)

    def by_type(self) -> dict[str, Rotation]:
        """The rotation of every type of layer, of a family whose types rotate differently."""
        given = self._object("rope_parameters") if self._file.data.get("rope_parameters") not in (None, {}) else {}
        strange = sorted(str(one) for one in given.keys() - self._rope.by_type.keys())
        if strange:
            self._file.offend(
                f"rope_parameters: {', '.join(strange[:5])} is no type of layer; valid: {', '.join(self._rope.by_type)}, an object for each"
            )
            return {}
        found = {}
        first = next(iter(self._rope.by_type))
        for kind, (theta_key, theta) in self._rope.by_type.items():
            own = given.get(kind) or {}
            if not isinstance(own, dict):
                self._file.offend(f"rope_parameters: {kind} = {as_written(own)}; an object is needed")
                continue
            if kind == first and self._file.data.get("rope_scaling") not in (None, {}):  # version 4 scales the first type alone
                own = own | self._object("rope_scaling")
            found[kind] = self._one(own, f"rope_parameters: {kind}", theta_key, theta)
        return found

    def _object(self, key: str) -> dict[str, Any]:
        found = self._file.data[key]
        if isinstance(found, dict):
            return found
        self._file.offend(f"{key} = {as_written(found)}; an object is needed")
        return {}

    def _one(self, found: dict[str, Any], key: str, theta_key: str, theta: float) -> Rotation:
        inner = self._file.inside(found, key)
        theta = self._file.number(theta_key, theta) if theta_key else theta
        own = inner.number("rope_theta", theta) if found.get("rope_theta") is not None else theta
        if own != theta and theta_key in self._file.data:
            self._file.offend(f"{theta_key} = {theta:g}, and {own:g} in {key}; remove the one that is not meant")
        dims = self._dims(inner)
        kind = found.get("rope_type", found.get("type")) or "default"
        kind = self._rope.renamed.get(kind, kind) if isinstance(kind, str) else kind
        reader = self._READERS.get(kind) if isinstance(kind, str) else None
        second = found.get("type", kind)
        if reader is None or (second != kind and self._rope.renamed.get(str(second)) != kind):
            wrong = second if reader else kind
            self._file.offend(f"{key}: rope type {as_written(wrong)} is not supported; supported: {', '.join(map(repr, self._READERS))}")
            return Rotation()
        if self._rope.alpha and kind == "dynamic" and self._has(inner, "alpha"):
            inner.unknown({*_SHARED, *_STRETCHED})
            return Rotation(self._stretched(own, inner), dims)
        needed, more, make = reader
        grows = self._rope.growth_key
        inner.unknown({*_SHARED, *needed, *more, *((grows, "max_position_embeddings") if grows else ())})
        needed = (*needed, grows) if grows else needed
        missing = [one for one in needed if one not in found]
        if missing:
            inner.offend(f"{kind} rope scaling lacks {', '.join(missing)}")
            return Rotation()
        before = len(self._file.offences)
        scaling = make(self, inner)
        growth = (inner.number(grows, 0.0), self._length(inner)) if grows else (0.0, 0)
        growth = growth if growth[0] else (0.0, 0)
        return Rotation(own, dims, scaling, *growth) if len(self._file.offences) == before else Rotation(own, dims)

    def _stretched(self, theta: float, inner: HfFile) -> float:
        """Theta such that the longest wavelength is `alpha` times as long."""
        alpha = inner.number("alpha", 1.0)
        if self._head_dim < 4 or not 0 < alpha < _MOST_ALPHA:
            inner.offend(f"alpha = {alpha:g}; a number above 0 and below {_MOST_ALPHA:g} is needed, and heads of at least 4 dimensions")
            return theta
        return theta * alpha ** (self._head_dim / (self._head_dim - 2))

    def _dims(self, inner: HfFile) -> int:
        """Rotated dimensions, 0 for all of a head."""
        place, key = (inner, "partial_rotary_factor") if self._has(inner, "partial_rotary_factor") else (self._file, self._rope.partial_key)
        part = place.number(key, 1.0) if self._has(place, key) else self._rope.partial
        if not self._head_dim:
            return 0
        if self._rope.optional_dims_key and self._has(self._file, self._rope.optional_dims_key) and place is self._file:
            dims = self._file.whole(self._rope.optional_dims_key) or 0
            return 0 if dims == self._head_dim else dims
        if not self._rope.partial:
            if part not in (0.0, 1.0):
                place.offend(f"{key} = {part:g} is not supported; heads are rotated whole, which is 1.0")
            return 0
        dims = int(self._head_dim * part) if 0 < part <= 1 else 0
        if dims < 2 or dims % 2:
            place.offend(f"{key} = {part:g} rotates {dims} of {self._head_dim} dimensions; an even number is needed")
            return 0
        return 0 if dims == self._head_dim else dims

    @staticmethod
    def _has(file: HfFile, key: str) -> bool:
        return file.data.get(key) is not None

    def _length(self, inner: HfFile) -> int:
        """The longest context of the training: next to the rotation, within it, or the longest of all."""
        key = "original_max_position_embeddings"
        place = self._file if self._rope.original and self._has(self._file, key) else inner
        if not self._has(place, key):
            if key in place.data or not self._max_len:
                place.offend(f"{key} = {as_written(place.data.get(key))}; a whole number is needed")
            return self._max_len
        value = finite(place.data[key])
        if value is None or value != int(value):
            place.offend(f"{key} = {as_written(place.data[key])}; a whole number is needed")
            return 1
        return int(value)

    def _stretch(self, inner: HfFile, length: int) -> float:
        """By how much contexts grow: `factor`, or the ratio of the lengths where the file leaves it out."""
        if self._has(inner, "factor"):
            return inner.number("factor", 1.0)
        return self._max_len / length if self._max_len and length > 0 else 1.0

    def _linear(self, inner: HfFile) -> Scaling:
        return Linear(inner.number("factor", 1.0))

    def _llama3(self, inner: HfFile) -> Scaling:
        factor, low, high = (inner.number(one, 1.0) for one in ("factor", "low_freq_factor", "high_freq_factor"))
        return Llama3(factor, low, high, self._length(inner))

    def _dynamic(self, inner: HfFile) -> Scaling:
        if not self._max_len:
            inner.offend("dynamic rope scaling needs max_position_embeddings")
        return Dynamic(inner.number("factor", 1.0), self._max_len)

    def _yarn(self, inner: HfFile) -> Scaling:
        length = self._length(inner)
        factor = self._stretch(inner, length)
        optional = {key: inner.number(key, 0.0) for key in ("attention_factor", "mscale", "mscale_all_dim") if self._has(inner, key)}
        attention = optional.get("attention_factor", 0.0)
        if "attention_factor" not in optional and optional.get("mscale") and optional.get("mscale_all_dim") and factor > 0:
            attention = yarn_amplitude(factor, optional["mscale"]) / yarn_amplitude(factor, optional["mscale_all_dim"])
        fast, slow = (inner.number(key, 0.0) if self._has(inner, key) else 0.0 for key in ("beta_fast", "beta_slow"))
        truncate = inner.flag("truncate", True)
        if not truncate and self._rope.by_type:
            inner.offend("truncate = false is not supported for one type of layer; transformers does not read it there")
        return Yarn(factor, length, fast or 32.0, slow or 1.0, attention, truncate)

    def _longrope(self, inner: HfFile) -> Scaling:
        length = self._length(inner)
        factor = self._stretch(inner, length)
        attention = inner.number("attention_factor", 0.0) if self._has(inner, "attention_factor") else 0.0
        if not attention:
            attention = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 and length > 1 else 1.0
        return LongRope(self._factors(inner, "short_factor"), self._factors(inner, "long_factor"), length, attention)

    def _factors(self, inner: HfFile, key: str) -> tuple[float, ...]:
        found = inner.data[key]
        numbers = [finite(one) for one in found] if isinstance(found, list) else [None]
        if any(one is None for one in numbers):
            inner.offend(f"{key} = {as_written(found)}; a list of numbers is needed")
        return tuple(one for one in numbers if one is not None)

    _READERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], Any]] = {
        "default": ((), (), lambda self, inner: None),
        "linear": (("factor",), (), _linear),
        "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (), _llama3),
        "yarn": (
            ("factor",),
            ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
            _yarn,
        ),
        "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor"), _longrope),
        "dynamic": (("factor",), (), _dynamic),
    }


def rope_to_hf(rotation: Rotation, head_dim: int, max_len: int, rope: Rope = HALVES) -> dict[str, Any]:
    """The keys from which `RopeReader` reads a rotation again, as transformers 5 has them and as version 4 had them."""
    if rope.dims_key[0]:
        return {rope.dims_key[0]: rotation.dims or head_dim}
    scaled, part = _scaling_to_hf(rotation.scaling, max_len), _part_to_hf(rotation, head_dim, rope)
    if rope.growth_key:
        grown = {rope.growth_key: rotation.query_growth, "original_max_position_embeddings": rotation.growth_every}
        scaled = {"rope_type": "default"} | grown | scaled
    data: dict[str, Any] = {
        "rope_parameters": {"rope_type": "default", "rope_theta": rotation.theta, **part, **scaled},
        rope.theta_key: rotation.theta,
        "rope_scaling": scaled or None,
    }
    data |= dict.fromkeys({*part, rope.partial_key} if part else (), next(iter(part.values()), None))
    if rope.original and isinstance(rotation.scaling, LongRope):
        data["original_max_position_embeddings"] = rotation.scaling.original_max_len
    return data


def ropes_to_hf(rotations: Mapping[str, Rotation], head_dim: int, max_len: int, rope: Rope) -> dict[str, Any]:
    """The same for a family whose types of layers rotate differently; types that no layer has are left to what the family does."""
    by_type: dict[str, Any] = {}
    data: dict[str, Any] = {"rope_parameters": by_type}
    for number, (kind, (theta_key, theta)) in enumerate(rope.by_type.items()):
        rotation = rotations.get(kind, Rotation(theta))
        scaled = _scaling_to_hf(rotation.scaling, max_len)
        by_type[kind] = {"rope_type": "default", "rope_theta": rotation.theta, **_part_to_hf(rotation, head_dim, rope), **scaled}
        data |= {theta_key: rotation.theta} if theta_key else {}
        data |= {"rope_scaling": scaled or None} if number == 0 else {}
    return data


def _part_to_hf(rotation: Rotation, head_dim: int, rope: Rope) -> dict[str, float]:
    """The part of a head that is rotated, such that no product with it is rounded down; nothing where it goes without saying."""
    if not rotation.dims and not rope.partial:
        return {}
    return {"partial_rotary_factor": math.nextafter(rotation.dims / head_dim, 1.0) if rotation.dims else 1.0}


def _scaling_to_hf(scaling: Scaling | None, max_len: int) -> dict[str, Any]:
    more: dict[str, Any]
    match scaling:
        case Linear(factor) | Dynamic(factor):
            return {"rope_type": scaling.name, "factor": factor}
        case Llama3(factor, low, high, length):
            more = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        case Yarn(factor, length, fast, slow, attention, truncate):
            more = {"factor": factor, "beta_fast": fast, "beta_slow": slow, "truncate": truncate}
            more |= {"attention_factor": attention} if attention else {}
        case LongRope(short, long, length, attention):
            more = {"short_factor": list(short), "long_factor": list(long), "attention_factor": attention, "factor": max_len / length}
        case _:
            return {}
    return {"rope_type": scaling.name, **more, "original_max_position_embeddings": length}
